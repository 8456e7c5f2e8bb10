/* Table lookups in lanes: a register of floats indexed by each lane; and comparisons as bits.
 *
 * AVX2, AVX-512 and NEON have a permutation that does it in an instruction or two; elsewhere the
 * lanes are read one by one. No arithmetic happens here.
 */
#ifndef QUANTCLI_LOOKUP_H
#define QUANTCLI_LOOKUP_H

#include "lanes.h"

#if QK_LANES == 16 && defined(__AVX512F__) && defined(__AVX512DQ__)
#define QK_LOOKUP_AVX512
#elif QK_LANES == 8 && defined(__AVX2__)
#define QK_LOOKUP_AVX2
#elif QK_LANES == 4 && defined(__aarch64__)
#define QK_LOOKUP_NEON
#endif

/* Eight floats of which every lane can pick any. */
typedef struct {
    vf part[QK_LANES >= 8 ? 1 : 2];
} vt8;

/* A register wider than the table holds it twice, so that higher bits of an index do no harm. */
QK_INLINE vt8 vt8_load(const float table[8]) {
    vt8 t;
#if defined(QK_LOOKUP_AVX512)
    t.part[0] = (vf)_mm512_broadcast_f32x8(_mm256_loadu_ps(table)); /* half-filled stores stall */
#else
    for (int i = 0; i < (QK_LANES >= 8 ? QK_LANES : 8); i += 8) {
        memcpy((float *)t.part + i, table, 8 * sizeof *table);
    }
#endif
    return t;
}

/* table[index & 7] of each lane. */
QK_INLINE vf vt8_at(vt8 t, vi index) {
#if defined(QK_LOOKUP_AVX512)
    return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)t.part[0]);
#elif defined(QK_LOOKUP_AVX2)
    return (vf)_mm256_permutevar8x32_ps((__m256)t.part[0], (__m256i)index);
#elif defined(QK_LOOKUP_NEON)
    const uint8x16x2_t bytes = {{(uint8x16_t)t.part[0], (uint8x16_t)t.part[1]}};
    return (vf)vqtbl2q_u8(bytes, (uint8x16_t)((index & 7) * 0x04040404 + 0x03020100));
#else
    float table[QK_LANES >= 8 ? QK_LANES : 8];
    vf v;
    memcpy(table, &t, sizeof table);
    for (int i = 0; i < QK_LANES; ++i) v[i] = table[index[i] & 7];
    return v;
#endif
}

/* table[index & 3] of each lane. */
QK_INLINE vf vf_table4(const float table[4], vi index) {
#if defined(QK_LOOKUP_AVX512)
    return (vf)_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(table)), (__m512i)index);
#elif defined(QK_LOOKUP_AVX2)
    return (vf)_mm256_permutevar_ps(_mm256_broadcast_ps((const __m128 *)table), (__m256i)index);
#elif defined(QK_LOOKUP_NEON)
    const uint8x16_t bytes = vld1q_u8((const uint8_t *)table);
    return (vf)vqtbl1q_u8(bytes, (uint8x16_t)((index & 3) * 0x04040404 + 0x03020100));
#else
    const vi odd = (index << 31) >> 31, high = (index << 30) >> 31;
    const vf low = vf_sel(odd, vf_set1(table[1]), vf_set1(table[0]));
    return vf_sel(high, vf_sel(odd, vf_set1(table[3]), vf_set1(table[2])), low);
#endif
}

/* table[index] of each lane, for 0 <= index < 16. */
QK_INLINE vf vf_table16(const float table[16], vi index) {
#if defined(QK_LOOKUP_AVX512)
    return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)vf_load(table));
#elif defined(QK_LOOKUP_AVX2) || defined(QK_LOOKUP_NEON)
    return vf_sel(index > 7, vt8_at(vt8_load(table + 8), index), vt8_at(vt8_load(table), index));
#else
    vf v;
    for (int i = 0; i < QK_LANES; ++i) v[i] = table[index[i]];
    return v;
#endif
}

/* A comparison's result as one bit per lane, the first lane lowest. */
QK_INLINE uint32_t vi_bits(vi mask) {
#if defined(QK_LOOKUP_AVX512)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(QK_LOOKUP_AVX2)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__) && QK_LANES == 4
    return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < QK_LANES; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}

#endif
