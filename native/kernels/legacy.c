/* Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 without importance weights: one pass for the scale, one for the
 * codes. With weights the first four are searched for (legacy_search.c); Q8_0 ignores them.
 *
 * Mirrors quantize_row_q4_0_ref and its siblings in ggml-quants.c. A maximum needs no order, so
 * the lanes hold a block's elements here, and the blocks of a batch only for the scales.
 */
#include "block32.h"
#include "tile.h"

#define VECTORS (BLOCK / QK_LANES) /* of a block */

/* The largest and smallest element (or the largest magnitude) of each of count blocks. */
QK_INLINE void extremes(const float *x, int count, int magnitude, vf *high, vf *low) {
    vf highs[QK_LANES], lows[QK_LANES];
    for (int b = 0; b < QK_LANES; ++b) {
        const float *block = x + (b < count ? b : 0) * BLOCK;
        highs[b] = lows[b] = magnitude ? vf_abs(vf_load(block)) : vf_load(block);
        for (int k = 1; k < VECTORS; ++k) {
            const vf v = vf_load(block + k * QK_LANES);
            highs[b] = vf_max(highs[b], magnitude ? vf_abs(v) : v);
            if (!magnitude) lows[b] = vf_min(lows[b], v);
        }
    }
    transpose(highs);
    *high = highs[0];
    for (int k = 1; k < QK_LANES; ++k) *high = vf_max(*high, highs[k]);
    if (magnitude) return;
    transpose(lows);
    *low = lows[0];
    for (int k = 1; k < QK_LANES; ++k) *low = vf_min(*low, lows[k]);
}

/* In each chosen lane, the first element of the lane's block with that magnitude: where several
 * share it the reference keeps the first one's sign. */
static vf first_of_magnitude(const float *x, int count, vi chosen, vf magnitude, vf otherwise) {
    for (int b = 0; b < count; ++b) {
        if (!chosen[b]) continue;
        const float *block = x + b * BLOCK, wanted = magnitude[b];
        int i = 0;
        while (i < BLOCK - 1 && fabsf(block[i]) != wanted) ++i;
        otherwise[b] = block[i];
    }
    return otherwise;
}

QK_INLINE vf inverse_of(vf scale) { return vf_sel(scale == 0.f, vf_set1(0), 1.f / scale); }

/* 32 code bytes to 16 bytes of nibbles and, for five bits, a word of fifth bits. */
QK_INLINE void pack(const uint8_t *codes, uint8_t *dst, const struct type32 type) {
    uint64_t quarter[4];
    memcpy(quarter, codes, sizeof quarter);
    const uint64_t nibble = 0x0f0f0f0f0f0f0f0f;
    for (int k = 0; k < 2; ++k) {
        const uint64_t pair = (quarter[k] & nibble) | ((quarter[k + 2] & nibble) << 4);
        memcpy(dst + nibble_offset(type) + 8 * k, &pair, sizeof pair);
    }
    if (type.bits == 5) {
        uint32_t fifths = 0;
        for (int k = 0; k < 4; ++k) {
            /* The product gathers the lowest bits of eight bytes in its highest byte. */
            const uint64_t bits = (quarter[k] >> 4) & 0x0101010101010101;
            fifths |= (uint32_t)((bits * 0x0102040810204080) >> 56) << (8 * k);
        }
        memcpy(dst + fifth_offset(type), &fifths, sizeof fifths);
    }
}

/* Up to QK_LANES consecutive blocks. */
QK_INLINE void encode_plain(const float *x, uint8_t *dst, int count, const struct type32 type) {
    const int top = (1 << type.bits) - 1;
    vf high, low, scale, offset = {0};
    extremes(x, count, 0, &high, &low);
    if (type.affine) {
        const vi zero = low == 0.f;
        if (vi_any(zero)) {
            low = first_of_magnitude(x, count, zero, vf_set1(0), low);
            high = vf_sel(zero & (high == 0.f), low, high);
        }
        scale = (high - low) / (float)top;
        offset = low;
    } else {
        const vi tied = high == -low;
        vf peak = vf_sel(high > -low, high, low);
        if (vi_any(tied)) peak = first_of_magnitude(x, count, tied, high, peak);
        /* A block of zeros has the peak +0 and so the scale -0. */
        scale = vf_sel(peak == 0.f, vf_set1(0), peak) / -(float)(1 << (type.bits - 1));
    }
    const vf inverse = inverse_of(scale);
    const vi scale_half = vi_to_half(scale), low_half = vi_to_half(low);
    for (int b = 0; b < count; ++b, dst += block_bytes(type)) {
        const uint16_t halves[2] = {(uint16_t)scale_half[b], (uint16_t)low_half[b]};
        memcpy(dst, halves, type.affine ? 4 : 2);
        uint8_t codes[BLOCK];
        for (int k = 0; k < VECTORS; ++k) {
            const vf v = vf_load(x + b * BLOCK + k * QK_LANES);
            vf spread;
            if (type.affine) spread = (v - offset[b]) * inverse[b] + 0.5f;
            else spread = v * inverse[b] + ((float)(1 << (type.bits - 1)) + 0.5f);
            vi code = vi_trunc(spread) & 0xff;
            if (type.bits == 4 || !type.affine) code = vi_min(code, vi_set1(top));
            vi_store_u8(codes + k * QK_LANES, code);
        }
        pack(codes, dst, type);
    }
}

/* Nearest integers, halves away from zero (roundf), for |v| < 2^22: the largest float below 1/2 is
 * added, because 1/2 itself would carry 0.49999997 up to 1. */
QK_INLINE vi round_away(vf v) {
    const vf half = (vf)(((vi)v & (int32_t)0x80000000) | 0x3effffff);
    return vi_trunc(v + half);
}

static void encode_bytes(const float *x, uint8_t *dst, int count) {
    vf high;
    extremes(x, count, 1, &high, NULL);
    const vf scale = high / 127.f;
    vf inverse = inverse_of(scale);
    /* Too small to invert: x86 turns the reference's infinite quotients into zeros. */
    inverse = vf_sel(inverse == HUGE_VALF, vf_set1(0), inverse);
    const vi scale_half = vi_to_half(scale);
    for (int b = 0; b < count; ++b, dst += 2 + BLOCK) {
        const uint16_t half = (uint16_t)scale_half[b];
        memcpy(dst, &half, sizeof half);
        for (int k = 0; k < VECTORS; ++k) {
            const vf v = vf_load(x + b * BLOCK + k * QK_LANES);
            vi_store_u8(dst + 2 + k * QK_LANES, round_away(v * inverse[b]));
        }
    }
}

#define EACH_BATCH(count, batch, encode)                                                          \
    for (int64_t left = (count); left > 0; left -= QK_LANES) {                                    \
        const int batch = left < QK_LANES ? (int)left : QK_LANES;                                 \
        encode;                                                                                   \
    }

#define ENCODER(name, type)                                                                       \
    void QK_FN(search_##name)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,         \
                              const float *weights);                                              \
    int QK_FN(encode_##name)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,          \
                             const float *weights) {                                              \
        if (weights != NULL) {                                                                    \
            QK_FN(search_##name)(x, dst, nrows, ncols, weights);                                  \
            return 0;                                                                             \
        }                                                                                         \
        EACH_BATCH(nrows * ncols / BLOCK, batch, encode_plain(x, dst, batch, type);               \
                   x += QK_LANES * BLOCK; dst += QK_LANES * block_bytes(type))                    \
        return 0;                                                                                 \
    }

ENCODER(q4_0, Q4_0)
ENCODER(q4_1, Q4_1)
ENCODER(q5_0, Q5_0)
ENCODER(q5_1, Q5_1)

int QK_FN(encode_q8_0)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                       const float *weights) {
    (void)weights;
    EACH_BATCH(nrows * ncols / BLOCK, batch, encode_bytes(x, dst, batch);
               x += QK_LANES * BLOCK; dst += QK_LANES * (2 + BLOCK))
    return 0;
}
