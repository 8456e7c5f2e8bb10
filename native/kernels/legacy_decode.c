/* Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 back to float32: dequantize_row_q4_0 and siblings. */
#include "block32.h"

QK_INLINE void decode_blocks(const uint8_t *src, float *dst, int64_t n, const struct type32 type) {
    const int centre = type.affine ? 0 : 1 << (type.bits - 1);
    for (const float *end = dst + n; dst < end; dst += BLOCK, src += block_bytes(type)) {
        uint16_t halves[2];
        uint32_t fifths = 0;
        memcpy(halves, src, sizeof halves);
        if (type.bits == 5) memcpy(&fifths, src + fifth_offset(type), sizeof fifths);
        const float scale = qk_from_half(halves[0]);
        const float min = type.affine ? qk_from_half(halves[1]) : 0;
        for (int k = 0; k < BLOCK / 2; k += QK_LANES) {
            const vi pair = vi_load_u8(src + nibble_offset(type) + k);
            vi low = pair & 15, high = pair >> 4;
            if (type.bits == 5) {
                const vi bits = vi_set1((int32_t)fifths) >> (lane_numbers() + k);
                low |= (bits & 1) << 4;
                high |= (bits >> 16 & 1) << 4;
            }
            vf a = vf_from(low - centre) * scale, b = vf_from(high - centre) * scale;
            if (type.affine) {
                a += min;
                b += min;
            }
            vf_store(dst + k, a);
            vf_store(dst + BLOCK / 2 + k, b);
        }
    }
}

void QK_FN(decode_q4_0)(const uint8_t *src, float *dst, int64_t n) {
    decode_blocks(src, dst, n, Q4_0);
}
void QK_FN(decode_q4_1)(const uint8_t *src, float *dst, int64_t n) {
    decode_blocks(src, dst, n, Q4_1);
}
void QK_FN(decode_q5_0)(const uint8_t *src, float *dst, int64_t n) {
    decode_blocks(src, dst, n, Q5_0);
}
void QK_FN(decode_q5_1)(const uint8_t *src, float *dst, int64_t n) {
    decode_blocks(src, dst, n, Q5_1);
}

void QK_FN(decode_q8_0)(const uint8_t *src, float *dst, int64_t n) {
    for (const float *end = dst + n; dst < end; dst += BLOCK, src += 2 + BLOCK) {
        uint16_t half;
        memcpy(&half, src, sizeof half);
        const float scale = qk_from_half(half);
        for (int k = 0; k < BLOCK; k += QK_LANES) {
            vf_store(dst + k, vf_from(vi_load_i8(src + 2 + k)) * scale);
        }
    }
}
