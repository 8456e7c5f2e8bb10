/* Runs kernels outside Python: cases from stdin, results to stdout.
 *
 * Built with sanitizers, or for another machine and run in an emulator; the caller (kernel_driver.py
 * in tests/support) compares what comes out. Every buffer is a heap block of exactly the size that
 * the case names, so a step beyond it is one beyond an allocation.
 *
 *   driver           a line for every type: its id, weights and bytes of a block, and whether there
 *                    are an encoder and a decoder; before them the instruction sets, best first
 *   driver ISA       for every case on stdin the result (int64) and the output bytes
 *
 * Numbers are int64 in the machine's order, which is little-endian wherever this runs.
 */
#include "grids.h"
#include "qk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ENCODE, DECODE, FIND_SCALE, SET_GRID };

/* One case; its source bytes and its second input follow it in the stream. */
struct task {
    int64_t operation;
    int64_t type;
    int64_t detail; /* ENCODE: the stored dtype; FIND_SCALE: the exponent mask */
    int64_t nrows, ncols;
    int64_t source_bytes;
    int64_t second_bytes; /* ENCODE: weights; FIND_SCALE: offsets; SET_GRID: values; 0 for none */
    int64_t output_bytes;
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

static int64_t perform(const struct qk_table *table, const struct task *task, const void *source,
                       const void *second, void *output) {
    const int type = (int)task->type, detail = (int)task->detail;
    switch (task->operation) {
    case ENCODE:
        return qk_encode_rows(table, type, detail, source, task->nrows, task->ncols, output,
                              second);
    case DECODE:
        qk_decode_all(table, type, source, output, task->nrows * task->ncols);
        return 0;
    case FIND_SCALE:
        return qk_first_infinite_scale(source, task->nrows, qk_type_sizes[type].nbytes, second,
                                       (int)task->ncols, detail);
    case SET_GRID:
        return qk_grid_set(type, source, (int)task->nrows, (int)task->ncols, second,
                           (int)task->second_bytes);
    default:
        fail("an operation is unknown");
        return 0;
    }
}

static void run_case(const struct qk_table *table, const struct task *task) {
    void *source = read_exact(task->source_bytes);
    void *second = read_exact(task->second_bytes);
    void *output = exact(task->output_bytes);
    const int64_t result = perform(table, task, source, second, output);
    /* An encoder stops at a value that is not finite, and leaves the rest as it was. */
    const int stopped = task->operation == ENCODE && result != QK_ALL_FINITE;
    if (stopped && output != NULL) memset(output, 0, (size_t)task->output_bytes);
    fwrite(&result, sizeof result, 1, stdout);
    if (output != NULL) fwrite(output, 1, (size_t)task->output_bytes, stdout);
    fflush(stdout); /* so that the caller can tell which case ended the process */
    free(source);
    free(second);
    free(output);
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
