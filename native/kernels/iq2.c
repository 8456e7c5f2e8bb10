/* IQ2_XXS, IQ2_XS and IQ2_S: eight weights at a time as one point of a grid
 * (ggml: quantize_row_iq2_*_impl).
 *
 * A block of 16 or 32 weights has a four-bit scale under the super-block's float16 one. The search
 * is in iq2_search.h.
 */

/* Lists of neighbours are short, so that sixteen lanes would be half idle: eight are faster. */
#if QK_LANES == 16
#undef QK_LANES
#define QK_LANES 8
#endif
#include "iq2_search.h"
#include "kernels.h"

static const struct variant XXS = {QK_IQ2_XXS, 66, 32, 6, 1, 1e-15f, 1, 1, 1};
static const struct variant XS = {QK_IQ2_XS, 74, 16, 9, 1, 1e-15f, 1, 1, 0};
static const struct variant S = {QK_IQ2_S, 82, 16, 9, 2, 1e-8f, 0.9875f, 0, 0};

/* Float16 scale, then per block four grid indices, and a word: seven signs of every eight weights,
 * the eighth being their parity, and the scale on top. */
int QK_FN(encode_iq2_xxs)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                          const float *weights) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ2_XXS);
    struct search search = {0};
    struct block blocks[MOST_BLOCKS];
    for (int64_t at = 0; at < nrows * ncols; at += SUPER, dst += XXS.nbytes) {
        const float *importance = weights != NULL ? weights + at % ncols : NULL;
        const float largest = search_super(&XXS, grid, x + at, importance, blocks, &search);
        const float d = largest / 31;
        memset(dst, 0, (size_t)XXS.nbytes);
        if (largest == 0) continue;
        store_half(d, dst);
        for (int b = 0; b < SUPER / 32; ++b) {
            const struct block *block = &blocks[b];
            uint32_t word = round_scale(1 / d, block->scale) << 28;
            for (int k = 0; k < 4 && !block->empty; ++k) {
                dst[2 + 8 * b + k] = (uint8_t)grid->slots[block->codes[k]];
                word |= (uint32_t)(block->signs[k] & 127) << (7 * k);
            }
            memcpy(dst + 6 + 8 * b, &word, sizeof word);
        }
    }
    return 0;
}

/* Float16 scale, words of a nine-bit grid index and seven signs, scales. */
int QK_FN(encode_iq2_xs)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                         const float *weights) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ2_XS);
    struct search search = {0};
    struct block blocks[MOST_BLOCKS];
    for (int64_t at = 0; at < nrows * ncols; at += SUPER, dst += XS.nbytes) {
        const float *importance = weights != NULL ? weights + at % ncols : NULL;
        const float largest = search_super(&XS, grid, x + at, importance, blocks, &search);
        const float d = largest / 31;
        memset(dst, 0, (size_t)XS.nbytes);
        if (largest == 0) continue;
        store_half(d, dst);
        for (int b = 0; b < SUPER / 16; ++b) {
            const struct block *block = &blocks[b];
            for (int k = 0; k < 2 && !block->empty; ++k) {
                const uint16_t word = (uint16_t)(grid->slots[block->codes[k]]
                                               | (block->signs[k] & 127) << 9);
                memcpy(dst + 2 + 4 * b + 2 * k, &word, sizeof word);
            }
            dst[66 + b / 2] |= (uint8_t)(round_scale(1 / d, block->scale) << (4 * (b % 2)));
        }
    }
    return 0;
}

/* Float16 scale, the indices' low bytes, signs, the indices' two high bits, scales. */
int QK_FN(encode_iq2_s)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                        const float *weights) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ2_S);
    struct search search = {0};
    struct block blocks[MOST_BLOCKS];
    for (int64_t at = 0; at < nrows * ncols; at += SUPER, dst += S.nbytes) {
        const float *importance = weights != NULL ? weights + at % ncols : NULL;
        const float largest = search_super(&S, grid, x + at, importance, blocks, &search);
        const float d = largest / 31;
        memset(dst, 0, (size_t)S.nbytes);
        for (int b = 0; b < SUPER / 16; ++b) {
            const struct block *block = &blocks[b];
            for (int k = 0; k < 2 && !block->empty; ++k) {
                const int index = grid->slots[block->codes[k]], i = 2 * b + k;
                dst[2 + i] = (uint8_t)index;
                dst[34 + i] = block->signs[k];
                dst[66 + i / 4] |= (uint8_t)(index >> 8 << (2 * (i % 4)));
            }
            if (largest == 0) continue;
            dst[74 + b / 2] |= (uint8_t)(round_scale(1 / d, block->scale) << (4 * (b % 2)));
        }
        if (largest != 0) store_half(d * S.fudge, dst);
    }
    return 0;
}

/* Eight weights: scale * point, negated where the sign's bit is set. */
QK_INLINE void decode_eight(const int8_t *points, unsigned signs, float scale, float *dst) {
    for (int i = 0; i < 8; ++i) {
        const float value = scale * (float)points[i];
        dst[i] = signs >> i & 1 ? -value : value;
    }
}

static float block_scale(float d, unsigned scale) { return d * (0.5f + (float)scale) * 0.25f; }

void QK_FN(decode_iq2_xxs)(const uint8_t *src, float *dst, int64_t n) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ2_XXS);
    for (; n > 0; n -= SUPER, src += XXS.nbytes) {
        const float d = load_half(src);
        for (int b = 0; b < SUPER / 32; ++b) {
            uint32_t word;
            memcpy(&word, src + 6 + 8 * b, sizeof word);
            for (int k = 0; k < 4; ++k, dst += 8) {
                decode_eight(grid->points + 8 * src[2 + 8 * b + k],
                             all_signs(word >> (7 * k) & 127), block_scale(d, word >> 28), dst);
            }
        }
    }
}

void QK_FN(decode_iq2_xs)(const uint8_t *src, float *dst, int64_t n) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ2_XS);
    for (; n > 0; n -= SUPER, src += XS.nbytes) {
        const float d = load_half(src);
        for (int i = 0; i < SUPER / 8; ++i, dst += 8) {
            const unsigned scale = src[66 + i / 4] >> (4 * (i / 2 % 2)) & 15;
            uint16_t word;
            memcpy(&word, src + 2 + 2 * i, sizeof word);
            decode_eight(grid->points + 8 * (word & 511), all_signs(word >> 9),
                         block_scale(d, scale), dst);
        }
    }
}

void QK_FN(decode_iq2_s)(const uint8_t *src, float *dst, int64_t n) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ2_S);
    for (; n > 0; n -= SUPER, src += S.nbytes) {
        const float d = load_half(src);
        for (int i = 0; i < SUPER / 8; ++i, dst += 8) {
            const unsigned scale = src[74 + i / 4] >> (4 * (i / 2 % 2)) & 15;
            const int index = src[2 + i] | (src[66 + i / 4] >> (2 * (i % 4)) & 3) << 8;
            decode_eight(grid->points + 8 * index, src[34 + i], block_scale(d, scale), dst);
        }
    }
}
