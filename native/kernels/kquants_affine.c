/* Q2_K, Q4_K and Q5_K: sub-blocks with a scale and a min, both rounded against a super-block's two
 * float16 factors. Mirrors quantize_row_q{2,4,5}_K_ref (without importance weights) and
 * quantize_row_q{2,4,5}_K_impl (with them) in ggml-quants.c.
 */
#include "kernels.h"
#include "ksearch.h"
#include "superblock.h"

struct affine_type {
    int length;      /* weights in a sub-block */
    int top;         /* the largest code */
    int scale_top;   /* the largest code of a sub-block's scale or min */
    int absolute;    /* without importance, errors are absolute and weights are |x| */
    struct trials plain, weighted;
    int nbytes;
};

static const struct affine_type Q2_K = {16, 3, 15, 1, {-0.5f, 0.1f, 15}, {-0.9f, 0.05f, 36}, 84};
static const struct affine_type Q4_K = {32, 15, 63, 0, {-1.f, 0.1f, 20}, {-0.9f, 0.05f, 36}, 144};
static const struct affine_type Q5_K = {32, 31, 63, 0, {-0.5f, 0.1f, 15}, {-0.9f, 0.05f, 36}, 176};

#define SUBS_MAX 16

/* The importance q becomes q * sqrt(sigma^2 + x^2), sigma^2 = factor * mean of x^2. */
QK_INLINE void scale_importance(const vf *x, vf *restrict w, float factor) {
    vf sum = {0};
    for (int i = 0; i < SUPER; ++i) sum += x[i] * x[i];
    const vf variance = factor * sum / (float)SUPER;
    for (int i = 0; i < SUPER; ++i) w[i] *= vf_sqrt(variance + x[i] * x[i]);
}

/* Without importance, |x| (Q2_K) or |x| + the sub-block's root mean square. */
QK_INLINE void plain_weights(const vf *x, vf *restrict w, const struct affine_type type) {
    for (int start = 0; start < SUPER; start += type.length) {
        vf floor = {0};
        if (!type.absolute) {
            for (int i = 0; i < type.length; ++i) floor += x[start + i] * x[start + i];
            floor = vf_sqrt(floor / (float)type.length);
        }
        for (int i = 0; i < type.length; ++i) w[start + i] = floor + vf_abs(x[start + i]);
    }
}

/* Codes of n scales relative to the largest, which becomes top: bytes. Returns the largest. */
QK_INLINE vf round_to_largest(const vf *scales, const int n, const int top, vi *restrict codes) {
    vf largest = {0};
    for (int j = 0; j < n; ++j) largest = vf_max(scales[j], largest);
    const vi some = largest > 0.f;
    const vf inverse = vf_sel(some, (float)top / largest, vf_set1(0));
    for (int j = 0; j < n; ++j) codes[j] = vi_nearest(inverse * scales[j]) & 0xff & some;
    return largest;
}

/* Twelve bytes hold eight 6-bit scales and mins: the low 6 bits of the first four of each, then
 * the low nibbles of the rest, whose high bits top up the first eight bytes. */
QK_INLINE void pack_scales_6bit(const vi *scales, const vi *mins, vi *restrict words) {
    vi bytes[12];
    for (int j = 0; j < 4; ++j) {
        bytes[j] = (scales[j] | (scales[j + 4] >> 4 << 6)) & 0xff;
        bytes[j + 4] = (mins[j] | (mins[j + 4] >> 4 << 6)) & 0xff;
        bytes[j + 8] = (scales[j + 4] & 15) | ((mins[j + 4] & 15) << 4);
    }
    for (int k = 0; k < 3; ++k) {
        words[k] = pack_bytes(bytes[4 * k], bytes[4 * k + 1], bytes[4 * k + 2], bytes[4 * k + 3]);
    }
}

QK_INLINE void pack_q2(const vi *codes, uint8_t *const *dst) {
    vi words[16];
    for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 8; ++k) {
            const vi *c = codes + 128 * half + 4 * k;
            vi word = {0};
            for (int plane = 0; plane < 4; ++plane, c += 32) {
                word |= pack_bytes(c[0], c[1], c[2], c[3]) << (2 * plane);
            }
            words[8 * half + k] = word;
        }
    }
    scatter_words(dst, 16, words, 16);
}

QK_INLINE void pack_nibbles(const vi *codes, uint8_t *const *dst, int offset) {
    vi words[32];
    for (int k = 0; k < 32; ++k) {
        const vi *low = codes + k / 8 * 64 + k % 8 * 4, *high = low + 32;
        words[k] = pack_bytes(low[0] & 15, low[1] & 15, low[2] & 15, low[3] & 15)
            | (pack_bytes(high[0] & 15, high[1] & 15, high[2] & 15, high[3] & 15) << 4);
    }
    scatter_words(dst, offset, words, 32);
}

/* Bit b of byte i is the fifth bit of code 32*b + i. */
QK_INLINE void pack_fifth_bits(const vi *codes, uint8_t *const *dst, int offset) {
    vi words[8] = {0};
    for (int k = 0; k < 8; ++k) {
        vi word = {0};
        for (int plane = 0; plane < 8; ++plane) {
            const vi *c = codes + 32 * plane + 4 * k;
            word |= pack_bytes(c[0] >> 4, c[1] >> 4, c[2] >> 4, c[3] >> 4) << plane;
        }
        words[k] = word;
    }
    scatter_words(dst, offset, words, 8);
}

QK_INLINE void encode_affine(const struct batch *batch, int weighted,
                             const struct affine_type type) {
    const int subs = SUPER / type.length;
    vf x[SUPER], w[SUPER];
    gather_tile(x, batch->x, SUPER);
    if (weighted) {
        gather_tile(w, batch->weights, SUPER);
        scale_importance(x, w, type.length == 16 ? 1.f : 2.f);
    } else {
        plain_weights(x, w, type);
    }

    vf scales[SUBS_MAX], mins[SUBS_MAX], weights[SUBS_MAX];
    struct code_rule rules[SUBS_MAX];
    for (int j = 0; j < subs; j += GROUPS) {
        struct affine_fit fit[GROUPS];
        const vf *xj = x + j * type.length, *wj = w + j * type.length;
        if (weighted) fit_affine(xj, wj, type.length, type.top, type.weighted, 0, fit);
        else fit_affine(xj, wj, type.length, type.top, type.plain, type.absolute, fit);
        for (int g = 0; g < GROUPS; ++g) {
            scales[j + g] = fit[g].scale;
            mins[j + g] = fit[g].min;
            weights[j + g] = fit[g].weight;
            rules[j + g] = fit[g].rule;
        }
    }

    vi scale_codes[SUBS_MAX], min_codes[SUBS_MAX];
    vi scale_half, min_half;
    if (weighted) {
        scale_half = vi_to_half(fit_positive(scales, weights, subs, type.scale_top, scale_codes));
        min_half = vi_to_half(fit_positive(mins, weights, subs, type.scale_top, min_codes));
    } else {
        const float top = (float)type.scale_top;
        scale_half = vi_to_half(round_to_largest(scales, subs, type.scale_top, scale_codes) / top);
        min_half = vi_to_half(round_to_largest(mins, subs, type.scale_top, min_codes) / top);
    }
    vi words[4];
    if (type.length == 16) {
        for (int j = 0; j < 16; ++j) {
            const vi byte = (scale_codes[j] | (min_codes[j] << 4)) & 0xff;
            scale_codes[j] = byte & 15;
            min_codes[j] = byte >> 4;
        }
        for (int k = 0; k < 4; ++k) {
            const vi *s = scale_codes + 4 * k, *m = min_codes + 4 * k;
            words[k] = pack_bytes(s[0], s[1], s[2], s[3])
                | (pack_bytes(m[0], m[1], m[2], m[3]) << 4);
        }
        scatter_words(batch->dst, 0, words, 4);
        scatter_halves(batch->dst, 80, scale_half);
        scatter_halves(batch->dst, 82, min_half);
    } else {
        /* Bits beyond the sixth spill into the neighbours when packed, and are read back so. */
        if (!weighted || type.top == 31) {
            for (int j = 0; j < 8; ++j) {
                scale_codes[j] = vi_min(scale_codes[j], vi_set1(63));
                min_codes[j] = vi_min(min_codes[j], vi_set1(63));
            }
        }
        pack_scales_6bit(scale_codes, min_codes, words);
        scatter_halves(batch->dst, 0, scale_half);
        scatter_halves(batch->dst, 2, min_half);
        scatter_words(batch->dst, 4, words, 3);
        for (int j = 0; j < 4; ++j) {
            const vi low = words[0] >> (8 * j), mid = words[1] >> (8 * j), high = words[2] >> (8 * j);
            scale_codes[j] = low & 63;
            min_codes[j] = mid & 63;
            scale_codes[j + 4] = (high & 15) | (((low >> 6) & 3) << 4);
            min_codes[j + 4] = ((high >> 4) & 15) | (((mid >> 6) & 3) << 4);
        }
    }

    vi codes[SUPER];
    const vf scale = vf_from_half(scale_half), min = vf_from_half(min_half);
    for (int j = 0; j < subs; ++j) {
        const vf d = scale * vf_from(scale_codes[j]), m = min * vf_from(min_codes[j]);
        const vi none = d == 0.f;
        const int any_none = vi_any(none);
        for (int i = j * type.length; i < (j + 1) * type.length; ++i) {
            const vi code = vi_nearest((x[i] + m) / d);
            codes[i] = vi_max(vi_set1(0), vi_min(vi_set1(type.top), code));
            if (any_none) {
                codes[i] = vi_sel(none, rule_code(rules[j], x[i], 0, type.top), codes[i]);
            }
        }
    }
    if (type.length == 16) {
        pack_q2(codes, batch->dst);
    } else if (type.top == 15) {
        pack_nibbles(codes, batch->dst, 16);
    } else {
        pack_fifth_bits(codes, batch->dst, 16);
        pack_nibbles(codes, batch->dst, 48);
    }
}

#define AFFINE_ENCODER(name, type)                                                                \
    static void batch_##name(const struct batch *batch, int weighted) {                           \
        if (weighted) encode_affine(batch, 1, type);                                              \
        else encode_affine(batch, 0, type);                                                       \
    }                                                                                             \
    int QK_FN(encode_##name)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,          \
                             const float *weights) {                                              \
        each_batch(x, dst, nrows, ncols, weights, type.nbytes, batch_##name);                     \
        return 0;                                                                                 \
    }

AFFINE_ENCODER(q2_k, Q2_K)
AFFINE_ENCODER(q4_k, Q4_K)
AFFINE_ENCODER(q5_k, Q5_K)
