/* IQ3_XXS and IQ3_S: four weights at a time as one point of a grid (ggml: quantize_row_iq3_*_impl).
 *
 * A sub-block of 32 is eight grid indices, signs, and a four-bit scale under the super-block's
 * float16 one. The search is in iq3_search.h.
 */
#include "iq3_search.h"
#include "kernels.h"

static const struct variant XXS = {QK_IQ3_XXS, 98, 15, 1e-8f, 1.0125f, 1, 0};
static const struct variant S = {QK_IQ3_S, 110, 9, FLT_TRUE_MIN, 1.033f, 0, 1};

static int grid_index(const struct qk_grid *grid, int32_t word) {
    return grid->slots[code_of(word)];
}

/* Float16 scale, the grid indices, then per sub-block a word: seven signs of every eight weights,
 * the eighth being their parity, and the scale on top. */
int QK_FN(encode_iq3_xxs)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                          const float *weights) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ3_XXS);
    struct trials trials = {0};
    struct block blocks[NBLOCKS];
    for (int64_t at = 0; at < nrows * ncols; at += SUPER, dst += XXS.nbytes) {
        const float *importance = weights != NULL ? weights + at % ncols : NULL;
        const float largest = search_super(&XXS, grid, x + at, importance, blocks, &trials);
        const float d = largest / 31;
        memset(dst, 0, (size_t)XXS.nbytes);
        if (largest == 0) continue;
        store_half(d * XXS.fudge, dst);
        for (int b = 0; b < NBLOCKS; ++b) {
            const struct block *block = &blocks[b];
            uint32_t word = round_scale(1 / d, block->scale) << 28;
            for (int k = 0; k < GROUPS && !block->empty; ++k) {
                dst[2 + GROUPS * b + k] = (uint8_t)grid_index(grid, block->words[k]);
            }
            for (int k = 0; k < 4 && !block->empty; ++k) {
                word |= (uint32_t)(block->signs[k] & 127) << (7 * k);
            }
            memcpy(dst + 66 + 4 * b, &word, sizeof word);
        }
    }
    return 0;
}

/* Float16 scale, the indices' low bytes, their ninth bits, signs, scales. An empty sub-block writes
 * no indices and no signs, and those of the next one take their place: the reference moves on only
 * past what it has written. Ninth bits and scales stay in theirs. */
int QK_FN(encode_iq3_s)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                        const float *weights) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ3_S);
    struct trials trials = {0};
    struct block blocks[NBLOCKS];
    for (int64_t at = 0; at < nrows * ncols; at += SUPER, dst += S.nbytes) {
        const float *importance = weights != NULL ? weights + at % ncols : NULL;
        const float largest = search_super(&S, grid, x + at, importance, blocks, &trials);
        const float d = largest / 31;
        uint8_t *low = dst + 2, *high = dst + 66, *signs = dst + 74, *scales = dst + 106;
        memset(dst, 0, (size_t)S.nbytes);
        for (int b = 0; b < NBLOCKS; ++b) {
            const struct block *block = &blocks[b];
            for (int k = 0; k < GROUPS && !block->empty; ++k) {
                const int index = grid_index(grid, block->words[k]);
                *low++ = (uint8_t)index;
                high[b] |= (uint8_t)(index >> 8 << k);
            }
            for (int k = 0; k < 4 && !block->empty; ++k) *signs++ = block->signs[k];
            if (largest == 0) continue;
            scales[b / 2] |= (uint8_t)(round_scale(1 / d, block->scale) << (4 * (b % 2)));
        }
        if (largest != 0) store_half(d * S.fudge, dst);
    }
    return 0;
}

/* The 32 weights of a sub-block: scale * point, negated where the sign's bit is set. */
QK_INLINE void decode_block(const int8_t *points, uint32_t signs, float scale, float *dst) {
    vi bit;
    for (int lane = 0; lane < QK_LANES; ++lane) bit[lane] = 1 << lane;
    for (int i = 0; i < BLOCK; i += QK_LANES) {
        const vf value = scale * vf_from(vi_load_i8((const uint8_t *)points + i));
        const vi minus = (vi_set1((int32_t)(signs >> i)) & bit) != 0;
        vf_store(dst + i, (vf)((vi)value ^ (minus & INT32_MIN)));
    }
}

void QK_FN(decode_iq3_xxs)(const uint8_t *src, float *dst, int64_t n) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ3_XXS);
    for (; n > 0; n -= SUPER, src += XXS.nbytes) {
        const float d = load_half(src);
        for (int b = 0; b < NBLOCKS; ++b, dst += BLOCK) {
            int8_t points[BLOCK];
            uint32_t word, signs = 0;
            memcpy(&word, src + 66 + 4 * b, sizeof word);
            for (int k = 0; k < GROUPS; ++k) {
                memcpy(points + 4 * k, grid->points + 4 * src[2 + GROUPS * b + k], 4);
            }
            for (int k = 0; k < 4; ++k) {
                signs |= all_signs(word >> (7 * k) & 127) << (8 * k);
            }
            decode_block(points, signs, d * (0.5f + (float)(word >> 28)) * 0.5f, dst);
        }
    }
}

void QK_FN(decode_iq3_s)(const uint8_t *src, float *dst, int64_t n) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ3_S);
    for (; n > 0; n -= SUPER, src += S.nbytes) {
        const float d = load_half(src);
        for (int b = 0; b < NBLOCKS; ++b, dst += BLOCK) {
            int8_t points[BLOCK];
            uint32_t signs;
            memcpy(&signs, src + 74 + 4 * b, sizeof signs);
            for (int k = 0; k < GROUPS; ++k) {
                const int index = src[2 + GROUPS * b + k] | (src[66 + b] >> k & 1) << 8;
                memcpy(points + 4 * k, grid->points + 4 * index, 4);
            }
            const int scale = src[106 + b / 2] >> (4 * (b % 2)) & 15;
            decode_block(points, signs, d * (float)(1 + 2 * scale), dst);
        }
    }
}
