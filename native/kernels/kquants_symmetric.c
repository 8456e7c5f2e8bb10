/* Q3_K and Q6_K: sub-blocks of 16 with a signed scale, rounded against a super-block's float16
 * factor. Mirrors quantize_row_q{3,6}_K_ref and quantize_row_q{3,6}_K_impl in ggml-quants.c; with
 * importance weights Q3_K scales them by the row's size and Q6_K takes them as they are.
 */
#include "kernels.h"
#include "search_sweeps.h"
#include "search_symmetric.h"
#include "superblock.h"

#define LENGTH 16
#define SUBS (SUPER / LENGTH)

/* code = clamp(round(x / d)) + nmax per sub-block. Where d is zero the search's code stays: the
 * one of its fit, or without fits what codes already holds. */
QK_INLINE void round_symmetric(const vf *x, vf scale, const vi *scale_codes, const int nmax,
                               const struct symmetric_fit *fits, vi *restrict codes) {
    for (int j = 0; j < SUBS; ++j) {
        const vf d = scale * vf_from(scale_codes[j]);
        const vi none = d == 0.f;
        const int any_none = vi_any(none);
        for (int i = j * LENGTH; i < (j + 1) * LENGTH; ++i) {
            vi code = vi_min(vi_set1(nmax - 1), vi_nearest(x[i] / d));
            code = vi_max(vi_set1(-nmax), code) + nmax;
            if (any_none) {
                vi kept = codes[i];
                if (fits != NULL) {
                    kept = rule_code(fits[j].rule, x[i], -nmax, nmax - 1) + nmax;
                    kept &= ~fits[j].zero;
                }
                code = vi_sel(none, kept, code);
            }
            codes[i] = code;
        }
    }
}

/* Twelve bytes of sixteen 6-bit scales: nibbles in eight, then two bits each in four more. */
QK_INLINE void scatter_q3_scales(uint8_t *const *dst, const vi *scales) {
    vi bytes[12];
    for (int j = 0; j < 8; ++j) bytes[j] = (scales[j] & 15) | ((scales[j + 8] & 15) << 4);
    for (int j = 0; j < 4; ++j) {
        bytes[8 + j] = (scales[j] >> 4) | (scales[j + 4] >> 4 << 2) | (scales[j + 8] >> 4 << 4)
            | (scales[j + 12] >> 4 << 6);
    }
    scatter_bytes(dst, 96, bytes, 12);
}

QK_INLINE void encode_q3(const struct batch *batch, int weighted) {
    vf x[SUPER], w[SUPER], scales[SUBS], weights[SUBS];
    struct symmetric_fit fits[SUBS];
    vi codes[SUPER], scale_codes[SUBS], scale_half;
    gather_tile(x, batch->x, SUPER);
    if (weighted) {
        gather_tile(w, batch->weights, SUPER);
        scale_importance(x, w, 2.f);
        for (int j = 0; j < SUBS; ++j) {
            const vf *xj = x + j * LENGTH, *wj = w + j * LENGTH;
            weights[j] = (vf){0};
            for (int i = 0; i < LENGTH; ++i) weights[j] += wj[i];
            fit_symmetric(xj, wj, LENGTH, 4, 0, &fits[j]);
            scales[j] = fits[j].scale;
        }
        struct symmetric_fit fit;
        fit_symmetric(scales, weights, SUBS, 32, 1, &fit);
        for (int j = 0; j < SUBS; ++j) {
            scale_codes[j] = (rule_code(fit.rule, scales[j], -32, 31) + 32) & ~fit.zero;
        }
        scale_half = vi_to_half(fit.scale);
    } else {
        for (int j = 0; j < SUBS; ++j) {
            scales[j] = fit_by_sweeps(x + j * LENGTH, 4, codes + j * LENGTH);
        }
        const vf peak = signed_peak(scales, SUBS);
        const vi some = peak != 0.f;
        const vf inverse = -32.f / vf_sel(some, peak, vf_set1(1));
        for (int j = 0; j < SUBS; ++j) {
            const vi code = vi_nearest(inverse * scales[j]) << 24 >> 24;
            scale_codes[j] = (vi_max(vi_set1(-32), vi_min(vi_set1(31), code)) + 32) & some;
        }
        scale_half = vi_to_half(vf_sel(some, 1.f / inverse, vf_set1(0)));
    }
    vi signed_codes[SUBS];
    for (int j = 0; j < SUBS; ++j) signed_codes[j] = scale_codes[j] - 32;
    round_symmetric(x, vf_from_half(scale_half), signed_codes, 4, weighted ? fits : NULL, codes);
    scatter_planes(batch->dst, 0, codes, 1, 2, 32);
    scatter_planes(batch->dst, 32, codes, 2, 0, 32);
    scatter_q3_scales(batch->dst, scale_codes);
    scatter_halves(batch->dst, 108, scale_half);
}

QK_INLINE void encode_q6(const struct batch *batch, int weighted) {
    vf x[SUPER], w[SUPER], scales[SUBS];
    struct symmetric_fit fits[SUBS];
    vi codes[SUPER], scale_codes[SUBS];
    gather_tile(x, batch->x, SUPER);
    if (weighted) {
        gather_tile(w, batch->weights, SUPER);
    } else {
        for (int i = 0; i < SUPER; ++i) w[i] = x[i] * x[i];
    }
    for (int j = 0; j < SUBS; ++j) {
        fit_symmetric(x + j * LENGTH, w + j * LENGTH, LENGTH, 32, 0, &fits[j]);
        scales[j] = fits[j].scale;
    }
    const vf peak = signed_peak(scales, SUBS);
    const vi zero = vf_abs(peak) < TINY;
    const vf inverse = -128.f / vf_sel(zero, vf_set1(1), peak);
    const vi scale_half = vi_to_half(1.f / inverse) & ~zero;
    for (int j = 0; j < SUBS; ++j) {
        const vi code = vi_min(vi_set1(127), vi_nearest(inverse * scales[j])) & ~zero;
        scale_codes[j] = code << 24 >> 24;
    }
    round_symmetric(x, vf_from_half(scale_half), scale_codes, 32, fits, codes);
    for (int i = 0; i < SUPER; ++i) codes[i] &= ~zero;

    scatter_planes(batch->dst, 0, codes, 4, 0, 64);
    scatter_planes(batch->dst, 128, codes, 2, 4, 32);
    for (int j = 0; j < SUBS; ++j) scale_codes[j] &= 0xff;
    scatter_bytes(batch->dst, 192, scale_codes, SUBS);
    scatter_halves(batch->dst, 208, scale_half);
}

#define SYMMETRIC_ENCODER(name, encode, nbytes)                                                   \
    static void batch_##name(const struct batch *batch, int weighted) {                           \
        if (weighted) encode(batch, 1);                                                           \
        else encode(batch, 0);                                                                    \
    }                                                                                             \
    int QK_FN(encode_##name)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,          \
                             const float *weights) {                                              \
        each_batch(x, dst, nrows, ncols, weights, nbytes, batch_##name);                          \
        return 0;                                                                                 \
    }

SYMMETRIC_ENCODER(q3_k, encode_q3, 110)
SYMMETRIC_ENCODER(q6_k, encode_q6, 210)
