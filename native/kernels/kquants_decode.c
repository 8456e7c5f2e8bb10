/* Decoders of Q2_K ... Q6_K: weight = scale * code (- min), as dequantize_row_q{2,3,4,5,6}_K in
 * ggml-quants.c. Weights are independent of one another, so the compiler vectorises the loops.
 */
#include "kernels.h"

#define SUPER 256

QK_INLINE float half_at(const uint8_t *src) {
    uint16_t half;
    memcpy(&half, src, sizeof half);
    return qk_from_half(half);
}

/* The j-th of eight 6-bit scales and mins; see pack_scales_6bit in kquants_affine.c. */
QK_INLINE void scale_and_min(const uint8_t *bytes, int j, int *scale, int *min) {
    if (j < 4) {
        *scale = bytes[j] & 63;
        *min = bytes[j + 4] & 63;
    } else {
        *scale = (bytes[j + 4] & 15) | (bytes[j - 4] >> 6 << 4);
        *min = (bytes[j + 4] >> 4) | (bytes[j] >> 6 << 4);
    }
}

void QK_FN(decode_q2_k)(const uint8_t *src, float *dst, int64_t n) {
    for (int64_t block = 0; block < n / SUPER; ++block, src += 84) {
        const uint8_t *scales = src, *codes = src + 16;
        const float d = half_at(src + 80), dmin = half_at(src + 82);
        for (int j = 0; j < 16; ++j, dst += 16) {
            const float scale = d * (float)(scales[j] & 15), min = dmin * (float)(scales[j] >> 4);
            const uint8_t *from = codes + j / 8 * 32 + j % 2 * 16;
            const int shift = j % 8 / 2 * 2;
            for (int i = 0; i < 16; ++i) dst[i] = scale * (float)((from[i] >> shift) & 3) - min;
        }
    }
}

void QK_FN(decode_q3_k)(const uint8_t *src, float *dst, int64_t n) {
    for (int64_t block = 0; block < n / SUPER; ++block, src += 110) {
        const uint8_t *high = src, *codes = src + 32, *scales = src + 96;
        const float d = half_at(src + 108);
        for (int j = 0; j < 16; ++j, dst += 16) {
            const int low = j < 8 ? scales[j] & 15 : scales[j - 8] >> 4;
            const int scale_code = low | (((scales[8 + j % 4] >> (j / 4 * 2)) & 3) << 4);
            const float scale = d * (float)(scale_code - 32);
            const uint8_t *from = codes + j / 8 * 32 + j % 2 * 16, *above = high + j % 2 * 16;
            const int shift = j % 8 / 2 * 2, bit = j / 2;
            for (int i = 0; i < 16; ++i) {
                const int code = ((from[i] >> shift) & 3) | (((above[i] >> bit) & 1) << 2);
                dst[i] = scale * (float)(code - 4);
            }
        }
    }
}

void QK_FN(decode_q4_k)(const uint8_t *src, float *dst, int64_t n) {
    for (int64_t block = 0; block < n / SUPER; ++block, src += 144) {
        const float d = half_at(src), dmin = half_at(src + 2);
        for (int j = 0; j < 8; ++j, dst += 32) {
            int scale_code, min_code;
            scale_and_min(src + 4, j, &scale_code, &min_code);
            const float scale = d * (float)scale_code, min = dmin * (float)min_code;
            const uint8_t *from = src + 16 + j / 2 * 32;
            const int shift = j % 2 * 4;
            for (int i = 0; i < 32; ++i) dst[i] = scale * (float)((from[i] >> shift) & 15) - min;
        }
    }
}

void QK_FN(decode_q5_k)(const uint8_t *src, float *dst, int64_t n) {
    for (int64_t block = 0; block < n / SUPER; ++block, src += 176) {
        const float d = half_at(src), dmin = half_at(src + 2);
        for (int j = 0; j < 8; ++j, dst += 32) {
            int scale_code, min_code;
            scale_and_min(src + 4, j, &scale_code, &min_code);
            const float scale = d * (float)scale_code, min = dmin * (float)min_code;
            const uint8_t *high = src + 16, *from = src + 48 + j / 2 * 32;
            const int shift = j % 2 * 4;
            for (int i = 0; i < 32; ++i) {
                const int code = ((from[i] >> shift) & 15) | (((high[i] >> j) & 1) << 4);
                dst[i] = scale * (float)code - min;
            }
        }
    }
}

void QK_FN(decode_q6_k)(const uint8_t *src, float *dst, int64_t n) {
    for (int64_t block = 0; block < n / SUPER; ++block, src += 210) {
        const float d = half_at(src + 208);
        for (int j = 0; j < 16; ++j, dst += 16) {
            const float scale = d * (float)(int8_t)src[192 + j];
            /* Each half's 128 codes: nibbles of 64 bytes, then two bits each in 32. */
            const int plane = j % 8 / 2, at = j % 2 * 16;
            const uint8_t *low = src + j / 8 * 64 + plane % 2 * 32 + at;
            const uint8_t *high = src + 128 + j / 8 * 32 + at;
            for (int i = 0; i < 16; ++i) {
                const int nibble = (low[i] >> (plane / 2 * 4)) & 15;
                const int code = nibble | (((high[i] >> (2 * plane)) & 3) << 4);
                dst[i] = scale * (float)(code - 32);
            }
        }
    }
}
