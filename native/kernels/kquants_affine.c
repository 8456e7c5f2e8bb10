/* Q2_K, Q4_K and Q5_K: sub-blocks with a scale and a min, both rounded against a super-block's two
 * float16 factors. Mirrors quantize_row_q{2,4,5}_K_ref (without importance weights) and
 * quantize_row_q{2,4,5}_K_impl (with them) in ggml-quants.c.
 */
#include "kernels.h"
#include "search_affine.h"
#include "search_sweeps.h"
#include "superblock.h"

struct affine_type {
    int length;             /* weights in a sub-block */
    int top;                /* the largest code */
    int scale_top;          /* the largest code of a sub-block's scale or min */
    int absolute;           /* without importance, errors are absolute and weights are |x| */
    struct trials plain, weighted;
    int halves;             /* the byte offset of the two float16 */
    int nbytes;
};

static const struct affine_type
    Q2_K = {16, 3, 15, 1, {-0.5f, 0.1f, 15}, {-0.9f, 0.05f, 36}, 80, 84},
    Q4_K = {32, 15, 63, 0, {-1.f, 0.1f, 20}, {-0.9f, 0.05f, 36}, 0, 144},
    Q5_K = {32, 31, 63, 0, {-0.5f, 0.1f, 15}, {-0.9f, 0.05f, 36}, 0, 176};

#define SUBS_MAX 16

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

/* The bytes of the scales and mins as they will be read: Q2_K's nibbles ... */
QK_INLINE void scatter_nibble_scales(uint8_t *const *dst, vi *restrict scales, vi *restrict mins) {
    vi bytes[16];
    for (int j = 0; j < 16; ++j) {
        bytes[j] = (scales[j] | (mins[j] << 4)) & 0xff;
        scales[j] = bytes[j] & 15;
        mins[j] = bytes[j] >> 4;
    }
    scatter_bytes(dst, 0, bytes, 16);
}

/* ... or Q4_K's and Q5_K's twelve bytes of eight each: the low 6 bits of the first four scales and
 * mins, then the low nibbles of the rest, whose high bits top up the first eight bytes. What
 * exceeds six bits spills into a neighbour, and is read back so. */
QK_INLINE void scatter_6bit_scales(uint8_t *const *dst, vi *restrict scales, vi *restrict mins) {
    vi bytes[12];
    for (int j = 0; j < 4; ++j) {
        bytes[j] = (scales[j] | (scales[j + 4] >> 4 << 6)) & 0xff;
        bytes[j + 4] = (mins[j] | (mins[j + 4] >> 4 << 6)) & 0xff;
        bytes[j + 8] = (scales[j + 4] & 15) | ((mins[j + 4] & 15) << 4);
    }
    scatter_bytes(dst, 4, bytes, 12);
    for (int j = 0; j < 4; ++j) {
        scales[j] = bytes[j] & 63;
        mins[j] = bytes[j + 4] & 63;
        scales[j + 4] = (bytes[j + 8] & 15) | (bytes[j] >> 6 << 4);
        mins[j + 4] = (bytes[j + 8] >> 4) | (bytes[j + 4] >> 6 << 4);
    }
}

/* Codes under the rounded scales; where one is zero, the code that the search chose stays. */
QK_INLINE void round_affine(const vf *x, const int length, const int top, vf scale, vf min,
                            const vi *scales, const vi *mins, const struct code_rule *rules,
                            vi *restrict codes) {
    for (int j = 0; j < SUPER / length; ++j) {
        const vf d = scale * vf_from(scales[j]), m = min * vf_from(mins[j]);
        const vi none = d == 0.f;
        const int any_none = vi_any(none);
        for (int i = j * length; i < (j + 1) * length; ++i) {
            const vi code = vi_nearest((x[i] + m) / d);
            codes[i] = vi_max(vi_set1(0), vi_min(vi_set1(top), code));
            if (any_none) codes[i] = vi_sel(none, rule_code(rules[j], x[i], 0, top), codes[i]);
        }
    }
}

QK_INLINE void encode_affine(const struct batch *batch, const int weighted,
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
    vi scale, min;
    if (weighted) {
        scale = vi_to_half(fit_positive(scales, weights, subs, type.scale_top, scale_codes));
        min = vi_to_half(fit_positive(mins, weights, subs, type.scale_top, min_codes));
    } else {
        const float top = (float)type.scale_top;
        scale = vi_to_half(round_to_largest(scales, subs, type.scale_top, scale_codes) / top);
        min = vi_to_half(round_to_largest(mins, subs, type.scale_top, min_codes) / top);
    }
    uint8_t *const *dst = batch->dst;
    if (type.length == 16) {
        scatter_nibble_scales(dst, scale_codes, min_codes);
    } else {
        /* Only quantize_row_q4_K_impl lets a code above 63 through. */
        const vi most = vi_set1(weighted && type.top == 15 ? 255 : 63);
        for (int j = 0; j < subs; ++j) {
            scale_codes[j] = vi_min(scale_codes[j], most);
            min_codes[j] = vi_min(min_codes[j], most);
        }
        scatter_6bit_scales(dst, scale_codes, min_codes);
    }
    scatter_halves(dst, type.halves, scale);
    scatter_halves(dst, type.halves + 2, min);

    vi codes[SUPER];
    round_affine(x, type.length, type.top, vf_from_half(scale), vf_from_half(min), scale_codes,
                 min_codes, rules, codes);
    if (type.top == 3) {
        scatter_planes(dst, 16, codes, 2, 0, 32);
    } else if (type.top == 15) {
        scatter_planes(dst, 16, codes, 4, 0, 32);
    } else {
        scatter_planes(dst, 16, codes, 1, 4, 32);
        scatter_planes(dst, 48, codes, 4, 0, 32);
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
