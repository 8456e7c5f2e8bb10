/* The driver between the binding and the kernels: stored dtype -> float32 -> blocks.
 *
 * Rows are converted a few at a time into a scratch that stays in the cache, checked, and encoded.
 * All of it runs in the default floating-point environment: a library in the same process may have
 * set flush-to-zero, which would change the bytes of tiny weights.
 */
#include "qk.h"

#include <fenv.h>
#include <stdlib.h>
#include <string.h>

#define SCRATCH_FLOATS (64 * 1024)

static int is_float_array(int src_type, const uint8_t *src) {
    return src_type == QK_F32 && (uintptr_t)src % sizeof(float) == 0;
}

int64_t qk_encode_rows(const struct qk_table *table, int type, int src_type,
                       const uint8_t *src, int64_t nrows, int64_t ncols, uint8_t *dst,
                       const float *weights) {
    if (nrows == 0 || ncols == 0) return QK_ALL_FINITE;
    const int64_t row_bytes = ncols / qk_type_sizes[type].block * qk_type_sizes[type].nbytes;
    const int64_t src_bytes = ncols * qk_type_sizes[src_type].nbytes;
    int64_t step = SCRATCH_FLOATS / ncols > 0 ? SCRATCH_FLOATS / ncols : 1;
    if (step > nrows) step = nrows;
    float *scratch = NULL;
    if (!is_float_array(src_type, src)) {
        scratch = malloc((size_t)step * (size_t)ncols * sizeof(float));
        if (scratch == NULL) return QK_NO_MEMORY;
    }
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    int64_t result = QK_ALL_FINITE;
    for (int64_t row = 0; row < nrows && result == QK_ALL_FINITE; row += step) {
        const int64_t rows = nrows - row < step ? nrows - row : step;
        const uint8_t *from = src + row * src_bytes;
        const float *x = (const float *)from;
        if (scratch != NULL) {
            table->decode[src_type](from, scratch, rows * ncols);
            x = scratch;
        }
        const int64_t bad = table->first_nonfinite(x, rows * ncols);
        if (bad >= 0) {
            result = row * ncols + bad;
        } else if (table->encode[type](x, dst + row * row_bytes, rows, ncols, weights) != 0) {
            result = QK_NO_MEMORY;
        }
    }
    fesetenv(&environment);
    free(scratch);
    return result;
}

void qk_decode_all(const struct qk_table *table, int type, const uint8_t *src, float *dst,
                   int64_t n) {
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    table->decode[type](src, dst, n);
    fesetenv(&environment);
}

static int has_exponent(const uint8_t *scale, int exponent) {
    uint16_t bits;
    memcpy(&bits, scale, sizeof bits);
    return (bits & exponent) == exponent;
}

int64_t qk_first_infinite_scale(const uint8_t *blocks, int64_t nblocks, int nbytes,
                                const int *offsets, int count, int exponent) {
    int64_t i = 0;
    if (nbytes == 2) { /* F16 and BF16: every element is its own scale, so look at many at once */
        for (; i + 64 <= nblocks; i += 64) {
            int any = 0;
            for (int k = 0; k < 64; ++k) any |= has_exponent(blocks + 2 * (i + k), exponent);
            if (any) break;
        }
    }
    for (; i < nblocks; ++i) {
        for (int k = 0; k < count; ++k) {
            if (has_exponent(blocks + i * nbytes + offsets[k], exponent)) return i;
        }
    }
    return -1;
}
