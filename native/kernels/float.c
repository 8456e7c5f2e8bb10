/* The float types: F32, F16 and BF16 as targets, these and F64 and FP8 (E4M3) as stored dtypes.
 *
 * F16 and BF16 are rounded to nearest even (ggml_fp32_to_fp16, ggml_fp32_to_bf16). Importance
 * weights do not apply.
 */
#include "kernels.h"
#include "lanes.h"

int QK_FN(encode_f32)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                      const float *weights) {
    (void)weights;
    memcpy(dst, x, (size_t)(nrows * ncols) * sizeof(float));
    return 0;
}

QK_INLINE vi vi_to_bfloat(vf v) {
    const vi bits = (vi)v;
    const vi rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const vi nan = (bits & 0x7fffffff) > 0x7f800000;
    return (vi)((vu)vi_sel(nan, bits | (64 << 16), rounded) >> 16);
}

/* A 16-bit conversion over n floats; the last, incomplete group of lanes goes through a copy. */
#define ENCODE_16(convert)                                                                        \
    const int64_t n = nrows * ncols;                                                              \
    int64_t i = 0;                                                                                \
    (void)weights;                                                                                \
    for (; i + QK_LANES <= n; i += QK_LANES) vi_store_u16(dst + 2 * i, convert(vf_load(x + i)));  \
    if (i < n) {                                                                                  \
        float tail[QK_LANES] = {0};                                                               \
        uint8_t out[2 * QK_LANES];                                                                \
        memcpy(tail, x + i, (size_t)(n - i) * sizeof *x);                                         \
        vi_store_u16(out, convert(vf_load(tail)));                                                \
        memcpy(dst + 2 * i, out, (size_t)(n - i) * 2);                                            \
    }                                                                                             \
    return 0

int QK_FN(encode_f16)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                      const float *weights) {
    ENCODE_16(vi_to_half);
}

int QK_FN(encode_bf16)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                       const float *weights) {
    ENCODE_16(vi_to_bfloat);
}

void QK_FN(decode_f32)(const uint8_t *src, float *dst, int64_t n) {
    memcpy(dst, src, (size_t)n * sizeof(float));
}

void QK_FN(decode_f64)(const uint8_t *src, float *dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        double value;
        memcpy(&value, src + 8 * i, sizeof value);
        dst[i] = (float)value;
    }
}

QK_INLINE vf vf_from_bfloat(vi bits) { return (vf)(bits << 16); }

/* E4M3 without infinities: bias 7, and all ones below the sign is NaN. */
QK_INLINE vf vf_from_e4m3(vi bits) {
    const vi magnitude = bits & 0x7f;
    const vi finite = (vi)((vf)(magnitude << 20) * 0x1p120f);
    return (vf)(vi_sel(magnitude == 0x7f, vi_set1(0x7fc00000), finite) | ((bits & 0x80) << 24));
}

#define DECODE_SMALL(size, load, convert)                                                         \
    int64_t i = 0;                                                                                \
    for (; i + QK_LANES <= n; i += QK_LANES) vf_store(dst + i, convert(load(src + (size) * i)));  \
    if (i < n) {                                                                                  \
        uint8_t tail[(size) * QK_LANES] = {0};                                                    \
        float out[QK_LANES];                                                                      \
        memcpy(tail, src + (size) * i, (size_t)(n - i) * (size));                                 \
        vf_store(out, convert(load(tail)));                                                       \
        memcpy(dst + i, out, (size_t)(n - i) * sizeof *dst);                                      \
    }

void QK_FN(decode_f16)(const uint8_t *src, float *dst, int64_t n) {
    DECODE_SMALL(2, vi_load_u16, vf_from_half)
}

void QK_FN(decode_bf16)(const uint8_t *src, float *dst, int64_t n) {
    DECODE_SMALL(2, vi_load_u16, vf_from_bfloat)
}

void QK_FN(decode_f8_e4m3)(const uint8_t *src, float *dst, int64_t n) {
    DECODE_SMALL(1, vi_load_u8, vf_from_e4m3)
}

int64_t QK_FN(first_nonfinite)(const float *x, int64_t n) {
    int64_t i = 0;
    for (; i + 4 * QK_LANES <= n; i += 4 * QK_LANES) {
        vi bad = {0};
        for (int k = 0; k < 4; ++k) {
            bad |= ((vi)vf_load(x + i + k * QK_LANES) & 0x7f800000) == 0x7f800000;
        }
        if (vi_any(bad)) break;
    }
    for (; i < n; ++i) {
        if (!isfinite(x[i])) return i;
    }
    return -1;
}
