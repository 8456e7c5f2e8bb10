/* Faults of a filesystem, for one folder, without a filesystem: preloaded with LD_PRELOAD.
 *
 * faults_set(prefix, spec) arms one fault for paths below `prefix`; faults_count() tells how many
 * calls it has counted since. Specs:
 *   count          every call that changes something is counted, none fails
 *   kill:N         the process is killed before the Nth of them
 *   torn:N         half of it is done where it is a write, all of it otherwise, then it is killed
 *   enospc:N       the disk has room for N bytes
 *   eio-write:N eio-read:N eio-fsync:N eio-rename:N eio-open:N   the Nth such call fails with EIO
 *   short          a write takes half of what it is given, a read gives half
 *   eintr          every other call is interrupted, of those that POSIX lets be
 *   no-flock:E     flock fails with the error number E
 *   no-fallocate   fallocate fails with EOPNOTSUPP; writes are counted
 *   writes         writes are counted, none fails
 *   exdev          a rename into another folder fails with EXDEV
 *   slow-rename:M  a rename takes M milliseconds
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, WRITE, READ, FSYNC, RENAME, OTHER };

static char prefix[PATH_MAX];
static char fault[32];
static long number;
static atomic_long counted, taken;

void faults_set(const char *below, const char *spec) {
    const char *colon = strchr(spec, ':');
    size_t length = colon ? (size_t)(colon - spec) : strlen(spec);
    prefix[0] = 0;
    snprintf(fault, sizeof fault, "%.*s", (int)length, spec);
    number = colon ? atol(colon + 1) : 0;
    atomic_store(&counted, 0);
    atomic_store(&taken, 0);
    snprintf(prefix, sizeof prefix, "%s", below);
}

long faults_count(void) { return atomic_load(&counted); }

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int is(const char *name) { return strcmp(fault, name) == 0; }

static int below(int folder, const char *path) {
    char whole[2 * PATH_MAX], link[64], base[PATH_MAX];
    if (!prefix[0]) return 0;
    if (path[0] == '/')
        snprintf(whole, sizeof whole, "%s", path);
    else {
        ssize_t length = 0;
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            length = readlink(link, base, sizeof base - 1);
            if (length < 0) return 0;
            base[length] = 0;
        }
        snprintf(whole, sizeof whole, "%s/%s", base, path);
    }
    return strncmp(whole, prefix, strlen(prefix)) == 0;
}

static int held(int descriptor) {
    char link[64], path[PATH_MAX];
    ssize_t length;
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, prefix, strlen(prefix)) == 0;
}

/* What becomes of a call: 0, or the error number that it fails with. Sets *torn where the process
 * is to end after it. */
static int meet(enum kind kind, int *torn) {
    static const char *eio[] = {"eio-open", "eio-write", "eio-read", "eio-fsync", "eio-rename", ""};
    *torn = 0;
    if (is("count") || is("kill") || is("torn")) {
        if (kind == READ) return 0;
        long now = atomic_fetch_add(&counted, 1) + 1;
        if (now == number && is("kill")) kill(getpid(), SIGKILL);
        if (now == number && is("torn")) *torn = 1;
        return 0;
    }
    if (kind == WRITE && (is("writes") || is("no-fallocate"))) atomic_fetch_add(&counted, 1);
    if (is("eintr") && kind != RENAME && kind != OTHER)
        return atomic_fetch_add(&counted, 1) % 2 ? 0 : EINTR;
    if (is(eio[kind])) return atomic_fetch_add(&counted, 1) + 1 == number ? EIO : 0;
    return 0;
}

#define MEET(kind) \
    int torn, failed = meet(kind, &torn); \
    if (failed) { errno = failed; return -1; }
#define LEAVE(type, call) \
    type result = (call); \
    if (torn) kill(getpid(), SIGKILL); \
    return result

/* How much of a write goes through; -1 where there is no room for any of it. */
static ssize_t room(size_t size, int torn) {
    if (is("enospc")) {
        long before = atomic_fetch_add(&taken, (long)size);
        if (before >= number) return -1;
        return before + (long)size > number ? number - before : (long)size;
    }
    return torn || is("short") ? (ssize_t)(size + 1) / 2 : (ssize_t)size;
}

#define WRITER(name, parameters, call) \
    ssize_t name parameters { \
        NEXT(name); \
        if (!held(fd)) return call; \
        MEET(WRITE) \
        ssize_t part = room(size, torn); \
        if (part < 0) { errno = ENOSPC; return -1; } \
        size = (size_t)part; \
        LEAVE(ssize_t, call); \
    }
WRITER(write, (int fd, const void *data, size_t size), next(fd, data, size))
WRITER(pwrite, (int fd, const void *data, size_t size, off_t at), next(fd, data, size, at))
WRITER(pwrite64, (int fd, const void *data, size_t size, off64_t at), next(fd, data, size, at))

#define READER(name, parameters, call) \
    ssize_t name parameters { \
        NEXT(name); \
        if (!held(fd)) return call; \
        MEET(READ) \
        if (is("short")) size = (size + 1) / 2; \
        LEAVE(ssize_t, call); \
    }
READER(read, (int fd, void *data, size_t size), next(fd, data, size))
READER(pread, (int fd, void *data, size_t size, off_t at), next(fd, data, size, at))
READER(pread64, (int fd, void *data, size_t size, off64_t at), next(fd, data, size, at))

#define VECTOR(name, offset) \
    ssize_t name(int fd, const struct iovec *parts, int count, offset at) { \
        NEXT(name); \
        if (!held(fd)) return next(fd, parts, count, at); \
        MEET(READ) \
        if (is("short") && count) { \
            struct iovec first = {parts[0].iov_base, (parts[0].iov_len + 1) / 2}; \
            return next(fd, &first, 1, at); \
        } \
        LEAVE(ssize_t, next(fd, parts, count, at)); \
    }
VECTOR(preadv, off_t)
VECTOR(preadv64, off64_t)

#define OPENER(name, parameters, folder, call) \
    int name parameters { \
        NEXT(name); \
        mode_t mode = 0; \
        if (flags & O_CREAT) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = (mode_t)va_arg(rest, int); \
            va_end(rest); \
        } \
        if (!(flags & (O_CREAT | O_TRUNC)) || !below(folder, path)) return call; \
        MEET(OPEN) \
        LEAVE(int, call); \
    }
OPENER(open, (const char *path, int flags, ...), AT_FDCWD, next(path, flags, mode))
OPENER(open64, (const char *path, int flags, ...), AT_FDCWD, next(path, flags, mode))
OPENER(openat, (int fd, const char *path, int flags, ...), fd, next(fd, path, flags, mode))
OPENER(openat64, (int fd, const char *path, int flags, ...), fd, next(fd, path, flags, mode))

#define ON_FILE(name, kind) \
    int name(int fd) { \
        NEXT(name); \
        if (!held(fd)) return next(fd); \
        MEET(kind) \
        LEAVE(int, next(fd)); \
    }
ON_FILE(fsync, FSYNC)
ON_FILE(fdatasync, FSYNC)

#define ON_PATH(name, parameters, folder, call) \
    int name parameters { \
        NEXT(name); \
        if (!below(folder, path)) return call; \
        MEET(OTHER) \
        LEAVE(int, call); \
    }
ON_PATH(unlink, (const char *path), AT_FDCWD, next(path))
ON_PATH(unlinkat, (int fd, const char *path, int flags), fd, next(fd, path, flags))
ON_PATH(rmdir, (const char *path), AT_FDCWD, next(path))
ON_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, next(path, mode))

#define TRUNCATE(name, offset) \
    int name(int fd, offset size) { \
        NEXT(name); \
        if (!held(fd)) return next(fd, size); \
        MEET(OTHER) \
        LEAVE(int, next(fd, size)); \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define ALLOCATE(name, offset) \
    int name(int fd, int mode, offset start, offset size) { \
        NEXT(name); \
        if (!held(fd)) return next(fd, mode, start, size); \
        if (is("no-fallocate")) { errno = EOPNOTSUPP; return -1; } \
        MEET(is("eintr") ? WRITE : OTHER) \
        if (is("enospc") && atomic_load(&taken) + (long)size > number) { \
            errno = ENOSPC; \
            return -1; \
        } \
        LEAVE(int, next(fd, mode, start, size)); \
    }
ALLOCATE(fallocate, off_t)
ALLOCATE(fallocate64, off64_t)

int flock(int fd, int operation) {
    NEXT(flock);
    if (!held(fd)) return next(fd, operation);
    if (is("no-flock")) {
        errno = (int)number;
        return -1;
    }
    int torn, failed = is("eintr") ? meet(WRITE, &torn) : 0;
    if (failed) {
        errno = failed;
        return -1;
    }
    return next(fd, operation);
}

static size_t folder_length(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? (size_t)(slash - path) : 0;
}

int rename(const char *from, const char *path) {
    NEXT(rename);
    if (!below(AT_FDCWD, path)) return next(from, path);
    size_t length = folder_length(path);
    if (is("exdev") && (folder_length(from) != length || strncmp(from, path, length))) {
        errno = EXDEV;
        return -1;
    }
    if (is("slow-rename")) usleep((useconds_t)(1000 * number));
    MEET(RENAME)
    LEAVE(int, next(from, path));
}
