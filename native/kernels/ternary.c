/* TQ1_0, TQ2_0, Q1_0 and Q2_0: codes of one bit, two bits or a trit under one float16 scale.
 *
 * Mirrors quantize_row_tq1_0_ref and its siblings in ggml-quants.c; importance weights do not apply.
 * Rounding to -1, 0 or 1 is two comparisons. Where a scale is too small to invert, the quotients
 * are infinite or NaN, and each type has the code that x86 makes of those.
 */
#include "kernels.h"
#include "tile.h"

#define TERNARY 256 /* weights of a block of TQ1_0 and TQ2_0 */
#define ONE_BIT 128
#define TWO_BIT 64

QK_INLINE float peak_of(const float *x, int n) {
    vf even = vf_abs(vf_load(x)), odd = vf_abs(vf_load(x + QK_LANES));
    for (int i = 2 * QK_LANES; i < n; i += 2 * QK_LANES) {
        even = vf_max(even, vf_abs(vf_load(x + i)));
        odd = vf_max(odd, vf_abs(vf_load(x + i + QK_LANES)));
    }
    even = vf_max(even, odd);
    float peak = even[0];
    for (int lane = 1; lane < QK_LANES; ++lane) peak = even[lane] > peak ? even[lane] : peak;
    return peak;
}

QK_INLINE float inverse_of(float scale, float too_small) {
    const float inverse = scale == 0.f ? 0.f : 1.f / scale;
    return inverse == HUGE_VALF ? too_small : inverse;
}

/* 0, 1 or 2 for -1, 0 or 1: halves go away from zero (roundf), and NaN gives 0. */
QK_INLINE vi codes_at(const float *x, float inverse) {
    const vf v = vf_load(x) * inverse;
    return -((v > -0.5f) + (v >= 0.5f));
}

QK_INLINE void put_scale(uint8_t *dst, float scale) {
    const uint16_t half = qk_to_half(scale);
    memcpy(dst, &half, sizeof half);
}

/* Five trits as a byte: the number in base 3, spread over 0 .. 255 and rounded up, so that
 * multiplying by 3 carries out the first trit. The product is exactly the division by 243. */
QK_INLINE vi spread(vi trits) { return ((trits * 256 + 242) * 17261) >> 22; }

/* width bytes from five runs of as many weights. */
QK_INLINE void pack_trits(const float *x, float inverse, uint8_t *dst, int width) {
    for (int m = 0; m < width; m += QK_LANES) {
        vi trits = {0};
        for (int n = 0; n < 5; ++n) trits = trits * 3 + codes_at(x + m + n * width, inverse);
        vi_store_u8(dst + m, spread(trits));
    }
}

int QK_FN(encode_tq1_0)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                        const float *weights) {
    (void)weights;
    for (const float *end = x + nrows * ncols; x < end; x += TERNARY, dst += 54) {
        const float scale = peak_of(x, TERNARY), inverse = inverse_of(scale, 0);
        pack_trits(x, inverse, dst, 32);
        pack_trits(x + 160, inverse, dst + 32, 16);
        /* The last 16 weights: four trits a byte, and a zero for the fifth. */
        uint8_t codes[16], ends[QK_LANES];
        int32_t last[QK_LANES] = {0};
        for (int m = 0; m < 16; m += QK_LANES) vi_store_u8(codes + m, codes_at(x + 240 + m, inverse));
        for (int j = 0; j < 4; ++j) {
            last[j] = 3 * (codes[j + 12] + 3 * (codes[j + 8] + 3 * (codes[j + 4] + 3 * codes[j])));
        }
        vi_store_u8(ends, spread(vi_load(last)));
        memcpy(dst + 48, ends, 4);
        put_scale(dst + 52, scale);
    }
    return 0;
}

int QK_FN(encode_tq2_0)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                        const float *weights) {
    (void)weights;
    for (const float *end = x + nrows * ncols; x < end; x += TERNARY, dst += 66) {
        const float scale = peak_of(x, TERNARY), inverse = inverse_of(scale, 0);
        for (int half = 0; half < 2; ++half) {
            for (int m = 0; m < 32; m += QK_LANES) {
                vi quad = {0};
                for (int n = 3; n >= 0; --n) {
                    quad = quad * 4 + codes_at(x + 128 * half + m + 32 * n, inverse);
                }
                vi_store_u8(dst + 32 * half + m, quad);
            }
        }
        put_scale(dst + 64, scale);
    }
    return 0;
}

int QK_FN(encode_q2_0)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                       const float *weights) {
    (void)weights;
    for (const float *end = x + nrows * ncols; x < end; x += TWO_BIT, dst += 18) {
        const float scale = peak_of(x, TWO_BIT), inverse = inverse_of(scale, NAN);
        int32_t quads[TWO_BIT / 4];
        for (int i = 0; i < TWO_BIT; i += QK_LANES) {
            vi_store_u8((uint8_t *)quads + i, codes_at(x + i, inverse));
        }
        /* Four code bytes a word; the product gathers them in its highest byte. */
        for (int i = 0; i < TWO_BIT / 4; i += QK_LANES) {
            const vu gathered = (vu)vi_load(quads + i) * 0x01041040u;
            vi_store_u8(dst + 2 + i, (vi)(gathered >> 24));
        }
        put_scale(dst, scale);
    }
    return 0;
}

/* A block in each lane: the scale is a sum, whose order counts. */
static void encode_signs(const float *const *x, uint8_t *const *dst) {
    vf tile[ONE_BIT], sum = {0};
    vi words[ONE_BIT / 32] = {{0}};
    gather_tile(tile, x, ONE_BIT);
    for (int k = 0; k < ONE_BIT / 32; ++k) {
        for (int i = 0; i < 32; ++i) {
            const vf v = tile[32 * k + i];
            sum += vf_abs(v);
            words[k] |= (v >= 0.f) & (int32_t)(1u << i);
        }
    }
    scatter_halves(dst, 0, vi_to_half(sum / (float)ONE_BIT));
    scatter_words(dst, 2, words, ONE_BIT / 32);
}

int QK_FN(encode_q1_0)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                       const float *weights) {
    const int64_t count = nrows * ncols / ONE_BIT;
    (void)weights;
    for (int64_t start = 0; start < count; start += QK_LANES) {
        const float *rows[QK_LANES];
        uint8_t *blocks[QK_LANES];
        for (int lane = 0; lane < QK_LANES; ++lane) {
            /* Lanes beyond the last block repeat it. */
            const int64_t i = start + lane < count ? start + lane : count - 1;
            rows[lane] = x + i * ONE_BIT;
            blocks[lane] = dst + i * 18;
        }
        encode_signs(rows, blocks);
    }
    return 0;
}

QK_INLINE float scale_at(const uint8_t *src) {
    uint16_t half;
    memcpy(&half, src, sizeof half);
    return qk_from_half(half);
}

/* count runs of width weights from as many bytes: trit n comes out on top of byte * 3^n. */
QK_INLINE float *unpack_trits(const uint8_t *src, float scale, float *dst, int width, int count) {
    int power = 1;
#pragma GCC unroll 5
    for (int n = 0; n < count; ++n, power *= 3, dst += width) {
        for (int m = 0; m < width; m += QK_LANES) {
            const vi trit = ((vi_load_u8(src + m) * power & 0xff) * 3) >> 8;
            vf_store(dst + m, vf_from(trit - 1) * scale);
        }
    }
    return dst;
}

void QK_FN(decode_tq1_0)(const uint8_t *src, float *dst, int64_t n) {
    for (const float *end = dst + n; dst < end; src += 54) {
        const float scale = scale_at(src + 52);
        dst = unpack_trits(src, scale, dst, 32, 5);
        dst = unpack_trits(src + 32, scale, dst, 16, 5);
        /* Runs of four bytes, fewer than lanes: laid out as one run first. */
        uint8_t last[16];
        for (int i = 0; i < 16; ++i) {
            static const uint8_t powers[4] = {1, 3, 9, 27};
            last[i] = (uint8_t)(src[48 + i % 4] * powers[i / 4]);
        }
        dst = unpack_trits(last, scale, dst, 16, 1);
    }
}

void QK_FN(decode_tq2_0)(const uint8_t *src, float *dst, int64_t n) {
    for (const float *end = dst + n; dst < end; dst += TERNARY, src += 66) {
        const float scale = scale_at(src + 64);
        for (int i = 0; i < 64; i += QK_LANES) {
            const vi quad = vi_load_u8(src + i);
            float *run = dst + i % 32 + i / 32 * 128;
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                vf_store(run + 32 * k, vf_from((quad >> (2 * k) & 3) - 1) * scale);
            }
        }
    }
}

void QK_FN(decode_q1_0)(const uint8_t *src, float *dst, int64_t n) {
    for (const float *end = dst + n; dst < end; dst += ONE_BIT, src += 18) {
        const vi scale = (vi)vf_set1(scale_at(src));
        for (int k = 0; k < ONE_BIT; k += 32) {
            int32_t signs;
            memcpy(&signs, src + 2 + k / 8, sizeof signs);
            for (int i = 0; i < 32; i += QK_LANES) {
                const vi bit = vi_set1(signs) >> (lane_numbers() + i) & 1;
                vf_store(dst + k + i, (vf)(scale ^ ((bit - 1) & INT32_MIN)));
            }
        }
    }
}

void QK_FN(decode_q2_0)(const uint8_t *src, float *dst, int64_t n) {
    for (const float *end = dst + n; dst < end; dst += TWO_BIT, src += 18) {
        const float scale = scale_at(src);
        for (int k = 0; k < TWO_BIT; k += 16) {
            int32_t codes;
            memcpy(&codes, src + 2 + k / 4, sizeof codes);
            for (int i = 0; i < 16; i += QK_LANES) {
                const vi code = vi_set1(codes) >> (2 * (lane_numbers() + i)) & 3;
                vf_store(dst + k + i, vf_from(code - 1) * scale);
            }
        }
    }
}
