/* The driver of the kernels for small floats: rows of a stored dtype, some thousand at a time.
 *
 * As in rows.c everything runs in the default floating-point environment.
 */
#include "qk.h"

#include <fenv.h>
#include <string.h>

#define PIECE 4096

/* A piece of a row as floats: where they lie, or converted into the scratch. */
static const float *as_floats(const struct qk_table *table, int src_type, const uint8_t *src,
                              int64_t n, float *scratch) {
    if (src_type == QK_F32 && (uintptr_t)src % sizeof(float) == 0) return (const float *)src;
    table->decode[src_type](src, scratch, n);
    return scratch;
}

/* How many columns from start on are worked on at once: whole runs, or a part of one. */
static int64_t piece_at(int64_t start, int64_t ncols, int64_t width) {
    int64_t n = PIECE;
    if (width < PIECE) {
        n = PIECE / width * width;
    } else if (width - start % width < PIECE) {
        n = width - start % width;
    }
    return ncols - start < n ? ncols - start : n;
}

int64_t qk_largest_rows(const struct qk_table *table, int src_type, const uint8_t *src,
                        int64_t nrows, int64_t ncols, int64_t width, float *out) {
    const int64_t size = qk_type_sizes[src_type].nbytes, runs = (ncols + width - 1) / width;
    float scratch[PIECE];
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    int64_t result = QK_ALL_FINITE;
    memset(out, 0, (size_t)(nrows * runs) * sizeof *out);
    for (int64_t row = 0; row < nrows && result == QK_ALL_FINITE; ++row, out += runs) {
        for (int64_t start = 0, n; start < ncols; start += n) {
            n = piece_at(start, ncols, width);
            const int64_t first = row * ncols + start;
            const float *x = as_floats(table, src_type, src + first * size, n, scratch);
            if (table->largest(x, n, width, out + start / width)) {
                result = first + table->first_nonfinite(x, n);
                break;
            }
        }
    }
    fesetenv(&environment);
    return result;
}

void qk_small_rows(const struct qk_table *table, int kind, int src_type, const uint8_t *src,
                   const float *scales, int64_t nrows, int64_t ncols, int64_t width,
                   uint8_t *dst) {
    const int64_t size = qk_type_sizes[src_type].nbytes, runs = (ncols + width - 1) / width;
    float scratch[PIECE];
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    for (int64_t row = 0; row < nrows; ++row, scales += runs) {
        for (int64_t start = 0, n; start < ncols; start += n) {
            n = piece_at(start, ncols, width);
            const int64_t first = row * ncols + start;
            const float *x = as_floats(table, src_type, src + first * size, n, scratch);
            table->small_floats(kind, x, scales + start / width, n, width, dst + first);
        }
    }
    fesetenv(&environment);
}
