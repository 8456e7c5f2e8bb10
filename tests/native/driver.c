/* Runs kernels outside Python: cases from stdin, results to stdout.
 *
 * Built with sanitizers, or for another machine and run in an emulator; the caller (kernel_driver.py
 * in tests/support) compares what comes out. Every buffer is a heap block of exactly the size that
 * the case names, so a step beyond it is one beyond an allocation.
 *
 *   driver           a line for every type: its id, weights and bytes of a block, and whether there
 *                    are an encoder and a decoder; before them the instruction sets, best first
 *   driver ISA       for every case on stdin the result (int64) and the bytes of what was written
 *
 * Numbers are int64 in the machine's order, which is little-endian wherever this runs.
 */
#include "grids.h"
#include "qk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    ENCODE, DECODE, FIND_SCALE, SET_GRID, FEEDBACK, SWEEP, FEEDBACK_POINTS, SWEEP_POINTS,
    LARGEST, SMALL_FLOATS
};
enum { OPTIONS_MAX = 20, BUFFERS_MAX = 12 };

/* One case. Its buffers are in the order of the kernel's arguments in qk.h: first what is only
 * read, then what is read and written, then what is only written. The contents of the first `given`
 * ones follow in the stream; those from number `returned` on are written to stdout. */
struct task {
    int64_t operation;
    int64_t nrows, ncols;
    int64_t options[OPTIONS_MAX]; /* whatever else the operation takes, see perform */
    int64_t given, returned;
    int64_t bytes[BUFFERS_MAX]; /* of each buffer; 0 for one that is not there */
};

static void fail(const char *why) {
    fprintf(stderr, "driver: %s\n", why);
    exit(2);
}

/* A heap block of exactly n bytes, or NULL for none. */
static void *exact(int64_t n) {
    if (n == 0) return NULL;
    void *block = malloc((size_t)n);
    if (block == NULL) fail("out of memory");
    return block;
}

static void *read_exact(int64_t n) {
    void *block = exact(n);
    if (n > 0 && fread(block, 1, (size_t)n, stdin) != (size_t)n) fail("a case is cut short");
    return block;
}

/* A lattice as it is described by ten options: its integers, in the order of the struct. */
static struct qk_lattice lattice_of(const int64_t *o, const void *levels) {
    return (struct qk_lattice){
        .levels = levels, .count = (int)o[0], .uniform = (int)o[1], .sub = (int)o[2],
        .block = (int)o[3], .half = (int)o[4], .odd = (int)o[5],
        .scale_range = {(int)o[6], (int)o[7]}, .min_range = {(int)o[8], (int)o[9]},
    };
}

/* A codebook grid as it is described by seven, likewise, and its first three buffers. The distance
 * between halves of the points is in eighths. */
static struct qk_points points_of(const int64_t *o, void *const *b) {
    return (struct qk_points){
        .count = (int)o[0], .group = (int)o[1], .width = (int)o[2], .signs = (int)o[3],
        .half_count = {(int)o[4], (int)o[5]}, .apart = (float)o[6] / 8, .halves = {b[0], b[1]}, .patterns = b[2],
    };
}

static int64_t perform(const struct qk_table *table, const struct task *task, void *const *b) {
    const int64_t *o = task->options, nrows = task->nrows;
    const int ncols = (int)task->ncols;
    switch (task->operation) {
    case ENCODE: /* rows, weights; blocks. Options: type, stored dtype */
        return qk_encode_rows(table, (int)o[0], (int)o[1], b[0], nrows, task->ncols, b[2], b[1]);
    case DECODE: /* blocks; values. Options: type */
        qk_decode_all(table, (int)o[0], b[0], b[1], nrows * task->ncols);
        return 0;
    case FIND_SCALE: /* blocks, offsets. Options: type, exponent mask */
        return qk_first_infinite_scale(b[0], nrows, qk_type_sizes[o[0]].nbytes, b[1], ncols,
                                       (int)o[1]);
    case SET_GRID: /* levels, values. Options: type */
        return qk_grid_set((int)o[0], b[0], (int)nrows, ncols, b[1], (int)task->bytes[1]);
    case FEEDBACK: { /* Options: the lattice */
        const struct qk_lattice lattice = lattice_of(o, b[0]);
        table->feedback(&lattice, b[1], b[2], b[3], b[4], b[5], nrows, ncols, b[6], b[7]);
        return 0;
    }
    case SWEEP: { /* Options: the lattice, scales_too */
        const struct qk_lattice lattice = lattice_of(o, b[0]);
        table->sweep(&lattice, b[1], b[2], b[3], nrows, ncols, (int)o[10], b[4], b[5], b[6], b[7],
                     b[8]);
        return 0;
    }
    case FEEDBACK_POINTS: { /* Options: the points, sub, spread, most */
        const struct qk_points points = points_of(o, b);
        table->feedback_points(&points, (int)o[7], (int)o[8], (int)o[9], b[3], b[4], b[5], b[6],
                               b[7], b[8], nrows, ncols, b[9], b[10], b[11]);
        return 0;
    }
    case SWEEP_POINTS: { /* Options: the points, the lattice, scales_too */
        const struct qk_points points = points_of(o, b);
        const struct qk_lattice lattice = lattice_of(o + 7, NULL);
        table->sweep_points(&points, &lattice, b[3], b[4], b[5], nrows, ncols, (int)o[17], b[6],
                            b[7], b[8]);
        return 0;
    }
    case LARGEST: /* rows; magnitudes. Options: stored dtype, width */
        return qk_largest_rows(table, (int)o[0], b[0], nrows, task->ncols, o[1], b[1]);
    case SMALL_FLOATS: /* rows, scales; codes. Options: kind, stored dtype, width */
        qk_small_rows(table, (int)o[0], (int)o[1], b[0], b[1], nrows, task->ncols, o[2], b[2]);
        return 0;
    default:
        fail("an operation is unknown");
        return 0;
    }
}

static void run_case(const struct qk_table *table, const struct task *task) {
    void *buffers[BUFFERS_MAX];
    for (int i = 0; i < BUFFERS_MAX; ++i) {
        buffers[i] = i < task->given ? read_exact(task->bytes[i]) : exact(task->bytes[i]);
    }
    const int64_t result = perform(table, task, buffers);
    /* An encoder stops at a value that is not finite, and leaves the rest as it was. */
    const int stopped = task->operation == ENCODE && result != QK_ALL_FINITE;
    fwrite(&result, sizeof result, 1, stdout);
    for (int i = 0; i < BUFFERS_MAX; ++i) {
        if (i >= task->returned && buffers[i] != NULL) {
            if (stopped) memset(buffers[i], 0, (size_t)task->bytes[i]);
            fwrite(buffers[i], 1, (size_t)task->bytes[i], stdout);
        }
        free(buffers[i]);
    }
    fflush(stdout); /* so that the caller can tell which case ended the process */
}

static void list_kernels(void) {
    const struct qk_table *table = NULL;
    for (int index = 0; (table = qk_available(index)) != NULL; ++index) {
        printf("%s%s", index > 0 ? " " : "", table->name);
    }
    printf("\n");
    table = qk_available(0);
    for (int type = 0; type < QK_TYPE_COUNT; ++type) {
        printf("%d %d %d %d %d\n", type, qk_type_sizes[type].block, qk_type_sizes[type].nbytes,
               table->encode[type] != NULL, table->decode[type] != NULL);
    }
}

int main(int argc, char **argv) {
    if (argc < 2) {
        list_kernels();
        return 0;
    }
    const struct qk_table *table = NULL;
    int index = 0;
    do {
        table = qk_available(index++);
    } while (table != NULL && strcmp(table->name, argv[1]) != 0);
    if (table == NULL) fail("there are no such kernels here");
    struct task task;
    while (fread(&task, sizeof task, 1, stdin) == 1) run_case(table, &task);
    return 0;
}
