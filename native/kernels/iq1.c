/* IQ1_S and IQ1_M: eight weights at a time as one point of a grid of 2048, shifted up or down by
 * an eighth (ggml: quantize_row_iq1_*_impl).
 *
 * Scales have three bits under the super-block's float16 one. The search is in iq1_search.h.
 */
#include "iq1_search.h"
#include "kernels.h"

enum { S_BYTES = 50, M_BYTES = 56, S_BLOCK = 32, M_BLOCK = 16 };

/* Float16 scale, the indices' low bytes, and per block four times three high bits, the scale and
 * the shift. */
static void encode_s_batch(const struct batch *batch, int weighted) {
    enum { COUNT = SUPER / S_BLOCK };
    const struct qk_grid *grid = qk_grid_get(QK_IQ1_S);
    vf x[SUPER], w[SUPER], largest = {0};
    struct block blocks[COUNT];
    gather_tile(x, batch->x, SUPER);
    gather_tile(w, batch->weights, SUPER);
    weigh(x, w, weighted);
    for (int b = 0; b < COUNT; ++b) {
        search_block(grid, x + S_BLOCK * b, w + S_BLOCK * b, S_BLOCK, 0, 1e-12f, &blocks[b]);
        largest = larger_or_nan(blocks[b].scale, largest);
    }
    const vf d = largest / 15, inverse = 1.f / d;
    const vi halves = vi_to_half(d * 1.125f), empty = largest == 0.f;
    vi scales[COUNT];
    for (int b = 0; b < COUNT; ++b) {
        const vi scale = round_step(inverse, blocks[b].scale) << 12 | blocks[b].shift << 15;
        scales[b] = scale & ~empty;
    }
    for (int lane = 0; lane < QK_LANES; ++lane) {
        uint8_t *dst = batch->dst[lane];
        const uint16_t half = (uint16_t)(empty[lane] ? 0 : halves[lane]);
        memcpy(dst, &half, sizeof half);
        for (int b = 0; b < COUNT; ++b) {
            uint16_t word = (uint16_t)scales[b][lane];
            for (int k = 0; k < 4; ++k) {
                const int index = blocks[b].found[lane] ? grid->slots[blocks[b].codes[k][lane]] : 0;
                dst[2 + 4 * b + k] = (uint8_t)index;
                word |= (uint16_t)(index >> 8 << (3 * k));
            }
            memcpy(dst + 34 + 2 * b, &word, sizeof word);
        }
    }
}

/* The scale that fits the points best once the blocks' scales are rounded. */
QK_INLINE vf refit(const vf *x, const vf *w, const struct block *blocks, const vi *steps, vf d) {
    vf sumqx = {0}, sumq2 = {0};
    for (int b = 0; b < SUPER / M_BLOCK; ++b) {
        const vf times = vf_from(2 * steps[b] + 1);
        for (int i = 0; i < M_BLOCK; ++i) {
            const vi down = are_down(1, blocks[b].shift, i / 8);
            const vf q = level_worth(blocks[b].codes[i / 8] >> (2 * (i % 8)), down) * times;
            sumqx += w[M_BLOCK * b + i] * q * x[M_BLOCK * b + i];
            sumq2 += w[M_BLOCK * b + i] * q * q;
        }
    }
    return vf_sel((sumq2 > 0.f) & (d == d), sumqx / sumq2, d);
}

/* The indices' low bytes, then per block twice three high bits and the shift, and words of four
 * scales with four bits of the float16 scale on top. */
static void encode_m_batch(const struct batch *batch, int weighted) {
    enum { COUNT = SUPER / M_BLOCK };
    const struct qk_grid *grid = qk_grid_get(QK_IQ1_M);
    vf x[SUPER], w[SUPER], largest = {0};
    struct block blocks[COUNT];
    vi steps[COUNT];
    gather_tile(x, batch->x, SUPER);
    gather_tile(w, batch->weights, SUPER);
    weigh(x, w, weighted);
    for (int b = 0; b < COUNT; ++b) {
        search_block(grid, x + M_BLOCK * b, w + M_BLOCK * b, M_BLOCK, 1, 1e-7f, &blocks[b]);
        largest = larger_or_nan(blocks[b].scale, largest);
        for (int k = 0; k < 2; ++k) {
            blocks[b].codes[k] = vi_sel(blocks[b].found, blocks[b].codes[k],
                                        vi_set1(grid->codes[0]));
        }
    }
    const vf first = largest / 15, inverse = 1.f / first;
    for (int b = 0; b < COUNT; ++b) steps[b] = round_step(inverse, blocks[b].scale);
    const vi halves = vi_to_half(refit(x, w, blocks, steps, first) * 1.1125f);
    const vi coded = largest != 0.f;
    for (int lane = 0; lane < QK_LANES; ++lane) {
        uint8_t *dst = batch->dst[lane];
        uint16_t words[COUNT / 4] = {0};
        for (int b = 0; b < COUNT; ++b) {
            const int first_index = grid->slots[blocks[b].codes[0][lane]];
            const int second_index = grid->slots[blocks[b].codes[1][lane]];
            int high = first_index >> 8 | second_index >> 8 << 4;
            dst[2 * b] = (uint8_t)first_index;
            dst[2 * b + 1] = (uint8_t)second_index;
            if (coded[lane]) {
                const int shift = blocks[b].shift[lane];
                high |= is_down(1, shift, 0) << 3 | is_down(1, shift, 1) << 7;
                words[b / 4] |= (uint16_t)(steps[b][lane] << (3 * (b % 4)));
            }
            dst[32 + b] = (uint8_t)high;
        }
        for (int i = 0; i < COUNT / 4 && coded[lane]; ++i) {
            words[i] |= (uint16_t)((halves[lane] >> (4 * i) & 15) << 12);
        }
        memcpy(dst + 48, words, sizeof words);
    }
}

int QK_FN(encode_iq1_s)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                        const float *weights) {
    each_batch(x, dst, nrows, ncols, weights, S_BYTES, encode_s_batch);
    return 0;
}

int QK_FN(encode_iq1_m)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                        const float *weights) {
    each_batch(x, dst, nrows, ncols, weights, M_BYTES, encode_m_batch);
    return 0;
}

QK_INLINE void decode_eight(const struct qk_grid *grid, int index, int down, float scale,
                            float *dst) {
    const float shift = down ? -SHIFT : SHIFT;
    for (int i = 0; i < 8; ++i) dst[i] = scale * ((float)grid->points[8 * index + i] + shift);
}

void QK_FN(decode_iq1_s)(const uint8_t *src, float *dst, int64_t n) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ1_S);
    for (; n > 0; n -= SUPER, src += S_BYTES) {
        const float d = load_half(src);
        for (int i = 0; i < SUPER / 8; ++i, dst += 8) {
            uint16_t word;
            memcpy(&word, src + 34 + i / 4 * 2, sizeof word);
            const int index = src[2 + i] | (word >> (3 * (i % 4)) & 7) << 8;
            decode_eight(grid, index, word >> 15, d * (float)(2 * (word >> 12 & 7) + 1), dst);
        }
    }
}

void QK_FN(decode_iq1_m)(const uint8_t *src, float *dst, int64_t n) {
    const struct qk_grid *grid = qk_grid_get(QK_IQ1_M);
    for (; n > 0; n -= SUPER, src += M_BYTES) {
        uint16_t words[4];
        int half = 0;
        memcpy(words, src + 48, sizeof words);
        for (int i = 0; i < 4; ++i) half |= words[i] >> 12 << (4 * i);
        const float d = qk_from_half((uint16_t)half);
        for (int i = 0; i < SUPER / 8; ++i, dst += 8) {
            const int b = i / 2, high = src[32 + b] >> (4 * (i % 2)) & 15;
            const int step = words[b / 4] >> (3 * (b % 4)) & 7;
            decode_eight(grid, src[i] | (high & 7) << 8, high >> 3, d * (float)(2 * step + 1), dst);
        }
    }
}
