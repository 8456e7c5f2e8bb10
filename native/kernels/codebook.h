/* What the kernels of several grid-coded types repeat: halves in bytes, blocks' scales, cell edges. */
#ifndef QUANTCLI_CODEBOOK_H
#define QUANTCLI_CODEBOOK_H

#include "lanes.h"

/* How far from the middle between two levels a weight has to lie to be surely inside its cell;
 * float32 knows the place to about 2^-19 of a level. */
#define EDGE 0x1p-14f

QK_INLINE void store_half(float value, uint8_t *dst) {
    const uint16_t half = qk_to_half(value);
    memcpy(dst, &half, sizeof half);
}

QK_INLINE float load_half(const uint8_t *src) {
    uint16_t half;
    memcpy(&half, src, sizeof half);
    return qk_from_half(half);
}

/* The four bits l of a block's scale (2l + 1) d. */
QK_INLINE uint32_t round_scale(float inverse, float scale) {
    const int l = qk_nearest(0.5f * (inverse * scale - 1.0f));
    return (uint32_t)(l < 0 ? 0 : l > 15 ? 15 : l);
}

/* A group of eight has room for seven signs; the eighth is their parity. */
QK_INLINE uint32_t all_signs(uint32_t seven) {
    return seven | (uint32_t)__builtin_parity(seven) << 7;
}

/* Magnitudes of n weights and, for every eight, a byte of minus signs. With even, their number has
 * to be even: where it is odd, the weight that matters least keeps the wrong sign. Returns the
 * largest. */
QK_INLINE float take_signs(const float *x, const float *w, const int n, const int even,
                           float *magnitudes, uint8_t *bytes) {
    for (int k = 0; k < n / 8; ++k) {
        unsigned signs = 0;
        for (int i = 8 * k; i < 8 * k + 8; ++i) {
            const int minus = !(x[i] >= 0);
            magnitudes[i] = minus ? -x[i] : x[i];
            signs |= (unsigned)minus << (i % 8);
        }
        if (even && __builtin_parity(signs)) {
            int least = 8 * k;
            float smallest = w[least] * x[least] * x[least];
            for (int i = least + 1; i < 8 * k + 8; ++i) {
                const float matters = w[i] * x[i] * x[i];
                if (matters < smallest) {
                    smallest = matters;
                    least = i;
                }
            }
            magnitudes[least] = -magnitudes[least];
            signs ^= 1u << (least % 8);
        }
        bytes[k] = (uint8_t)signs;
    }
    float max = magnitudes[0];
    for (int i = 1; i < n; ++i) max = max > magnitudes[i] ? max : magnitudes[i];
    return max;
}

#endif
