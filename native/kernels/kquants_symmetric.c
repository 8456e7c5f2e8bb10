/* Q3_K and Q6_K: sub-blocks of 16 with a signed scale, rounded against a super-block's float16
 * factor. Mirrors quantize_row_q{3,6}_K_ref and quantize_row_q{3,6}_K_impl in ggml-quants.c; with
 * importance weights Q3_K scales them by the row's size and Q6_K takes them as they are.
 */
#include "kernels.h"
#include "ksearch.h"
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

QK_INLINE void pack_q3(const vi *codes, const vi *scale_codes, vi scale_half,
                       uint8_t *const *dst) {
    vi words[24];
    /* Bit b of byte i says that code 32*b + i is above 3; the rest of the code is two bits. */
    for (int k = 0; k < 8; ++k) {
        vi word = {0};
        for (int plane = 0; plane < 8; ++plane) {
            const vi *c = codes + 32 * plane + 4 * k;
            word |= pack_bytes(c[0] >> 2, c[1] >> 2, c[2] >> 2, c[3] >> 2) << plane;
        }
        words[k] = word;
    }
    for (int k = 0; k < 16; ++k) {
        const vi *c = codes + k / 8 * 128 + k % 8 * 4;
        vi word = {0};
        for (int plane = 0; plane < 4; ++plane, c += 32) {
            word |= pack_bytes(c[0] & 3, c[1] & 3, c[2] & 3, c[3] & 3) << (2 * plane);
        }
        words[8 + k] = word;
    }
    scatter_words(dst, 0, words, 24);
    /* Sixteen 6-bit scales: nibbles of eight bytes, then two bits each in four more. */
    vi bytes[12];
    for (int j = 0; j < 8; ++j) bytes[j] = (scale_codes[j] & 15) | ((scale_codes[j + 8] & 15) << 4);
    for (int j = 0; j < 4; ++j) {
        bytes[8 + j] = (scale_codes[j] >> 4) | (scale_codes[j + 4] >> 4 << 2)
            | (scale_codes[j + 8] >> 4 << 4) | (scale_codes[j + 12] >> 4 << 6);
    }
    for (int k = 0; k < 3; ++k) {
        words[k] = pack_bytes(bytes[4 * k], bytes[4 * k + 1], bytes[4 * k + 2], bytes[4 * k + 3]);
    }
    scatter_words(dst, 96, words, 3);
    scatter_halves(dst, 108, scale_half);
}

QK_INLINE void encode_q3(const struct batch *batch, int weighted) {
    vf x[SUPER], w[SUPER], scales[SUBS], weights[SUBS];
    struct symmetric_fit fits[SUBS];
    vi codes[SUPER], scale_codes[SUBS], scale_half;
    gather_tile(x, batch->x, SUPER);
    if (weighted) {
        gather_tile(w, batch->weights, SUPER);
        vf sum = {0};
        for (int i = 0; i < SUPER; ++i) sum += x[i] * x[i];
        const vf variance = 2.f * sum / (float)SUPER;
        for (int i = 0; i < SUPER; ++i) w[i] *= vf_sqrt(variance + x[i] * x[i]);
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
    pack_q3(codes, scale_codes, scale_half, batch->dst);
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

    vi words[48], *high = words + 32;
    for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 8; ++k) {
            vi quad[4];
            high[8 * half + k] = (vi){0};
            for (int plane = 0; plane < 4; ++plane) {
                const vi *c = codes + 128 * half + 32 * plane + 4 * k;
                quad[plane] = pack_bytes(c[0], c[1], c[2], c[3]);
                high[8 * half + k] |= ((vi)((vu)quad[plane] >> 4) & 0x03030303) << (2 * plane);
                quad[plane] &= 0x0f0f0f0f;
            }
            words[16 * half + k] = quad[0] | (quad[2] << 4);
            words[16 * half + 8 + k] = quad[1] | (quad[3] << 4);
        }
    }
    scatter_words(batch->dst, 0, words, 48);
    for (int k = 0; k < 4; ++k) {
        const vi *s = scale_codes + 4 * k;
        words[k] = pack_bytes(s[0] & 255, s[1] & 255, s[2] & 255, s[3] & 255);
    }
    scatter_words(batch->dst, 192, words, 4);
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
