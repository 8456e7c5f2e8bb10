/* Q4_0, Q4_1, Q5_0 and Q5_1 with importance weights: the scale is searched for, a block per lane.
 *
 * Mirrors quantize_row_q4_0_impl and its three siblings in ggml-quants.c. A batch of blocks runs on
 * across the rows of a group; lanes beyond the last block encode zeros into a spare block.
 */
#include "block32.h"
#include "search_affine.h"
#include "search_symmetric.h"
#include "tile.h"

#define WIDTH (GROUPS * QK_LANES)

struct batch {
    const float *x[WIDTH];
    const float *importance[WIDTH];
    float variance[WIDTH];
    uint8_t *dst[WIDTH];
};

/* Mean squares of up to QK_LANES rows, a row per lane: one row alone would wait for its own sum. */
static void row_variances(const float *x, int64_t nrows, int64_t ncols, float *variances) {
    const float *rows[QK_LANES];
    for (int lane = 0; lane < QK_LANES; ++lane) rows[lane] = x + (lane < nrows ? lane : 0) * ncols;
    vf sum = {0};
    for (int64_t start = 0; start < ncols; start += BLOCK) {
        vf tile[BLOCK];
        gather_tile(tile, rows, BLOCK);
        for (int i = 0; i < BLOCK; ++i) sum += tile[i] * tile[i];
        for (int lane = 0; lane < QK_LANES; ++lane) rows[lane] += BLOCK;
    }
    vf_store(variances, sum / (float)ncols);
}

QK_INLINE void pack(const vi *codes, uint8_t *const *dst, const struct type32 type) {
    vi words[4];
    for (int k = 0; k < 4; ++k) {
        const vi *low = codes + 4 * k, *high = low + 16;
        words[k] = pack_bytes(low[0] & 15, low[1] & 15, low[2] & 15, low[3] & 15)
            | (pack_bytes(high[0] & 15, high[1] & 15, high[2] & 15, high[3] & 15) << 4);
    }
    scatter_words(dst, nibble_offset(type), words, 4);
    if (type.bits == 5) {
        vi word = {0};
        for (int i = 0; i < BLOCK; ++i) word |= ((codes[i] >> 4) & 1) << i;
        scatter_words(dst, fifth_offset(type), &word, 1);
    }
}

QK_INLINE void encode_batch(const struct batch *batch, const struct type32 type) {
    static const struct trials trials = {-0.9f, 0.05f, 36};
    vf x[GROUPS * BLOCK], w[GROUPS * BLOCK];
    for (int g = 0; g < GROUPS; ++g) {
        gather_tile(x + g * BLOCK, batch->x + g * QK_LANES, BLOCK);
        gather_tile(w + g * BLOCK, batch->importance + g * QK_LANES, BLOCK);
        const vf variance = vf_load(batch->variance + g * QK_LANES);
        for (int i = g * BLOCK; i < (g + 1) * BLOCK; ++i) w[i] *= vf_sqrt(variance + x[i] * x[i]);
    }
    struct affine_fit fit[GROUPS];
    if (type.affine) fit_affine(x, w, BLOCK, (1 << type.bits) - 1, trials, 0, fit);
    for (int g = 0; g < GROUPS; ++g) {
        uint8_t *const *dst = batch->dst + g * QK_LANES;
        vi codes[BLOCK];
        if (type.affine) {
            scatter_halves(dst, 0, vi_to_half(fit[g].scale));
            scatter_halves(dst, 2, vi_to_half(-fit[g].min));
            for (int i = 0; i < BLOCK; ++i) {
                codes[i] = rule_code(fit[g].rule, x[g * BLOCK + i], 0, (1 << type.bits) - 1);
            }
        } else {
            const int nmax = 1 << (type.bits - 1);
            struct symmetric_fit found;
            fit_symmetric(x + g * BLOCK, w + g * BLOCK, BLOCK, nmax, 0, &found);
            scatter_halves(dst, 0, vi_to_half(found.scale));
            for (int i = 0; i < BLOCK; ++i) {
                codes[i] = rule_code(found.rule, x[g * BLOCK + i], -nmax, nmax - 1) + nmax;
                codes[i] &= ~found.zero;
            }
        }
        pack(codes, dst, type);
    }
}

QK_INLINE void encode_rows(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                           const float *importance, const struct type32 type) {
    static const float zeros[BLOCK];
    const int64_t columns = ncols / BLOCK;
    const int nbytes = block_bytes(type);
    uint8_t spare[BLOCK];
    for (int64_t row = 0; row < nrows; row += QK_LANES) {
        const int64_t rows = nrows - row < QK_LANES ? nrows - row : QK_LANES;
        const int64_t count = rows * columns;
        float variances[QK_LANES];
        row_variances(x, rows, ncols, variances);
        int64_t column = 0, variance = 0;
        for (int64_t start = 0; start < count; start += WIDTH) {
            struct batch batch;
            for (int lane = 0; lane < WIDTH; ++lane) {
                const int64_t i = start + lane;
                const int real = i < count;
                batch.x[lane] = real ? x + i * BLOCK : zeros;
                batch.importance[lane] = real ? importance + column * BLOCK : zeros;
                batch.variance[lane] = real ? variances[variance] : 0;
                batch.dst[lane] = real ? dst + i * nbytes : spare;
                if (++column == columns) {
                    column = 0;
                    ++variance;
                }
            }
            encode_batch(&batch, type);
        }
        x += rows * ncols;
        dst += count * nbytes;
    }
}

#define SEARCHED(name, type)                                                                      \
    void QK_FN(search_##name)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,         \
                              const float *weights) {                                             \
        encode_rows(x, dst, nrows, ncols, weights, type);                                         \
    }

SEARCHED(q4_0, Q4_0)
SEARCHED(q4_1, Q4_1)
SEARCHED(q5_0, Q5_0)
SEARCHED(q5_1, Q5_1)
