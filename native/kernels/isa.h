/* Lane operations for which the machine has an instruction that a compiler does not find by itself.
 *
 * Included by lanes.h, after the vector types. Every form gives the bits of the plain one at the
 * end of this file: min and max return their second operand when the comparison is false, as the
 * reference's macros do, and vf_round is the magic-number addition where |v| < 2^22, but for the
 * sign of a zero.
 */
#ifndef QUANTCLI_ISA_H
#define QUANTCLI_ISA_H

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && QK_LANES == 16
#define QK_HAS_FLOAT_MINMAX
#define QK_HAS_INT_MINMAX
#define QK_HAS_ROUND
QK_INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
QK_INLINE vf vf_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
QK_INLINE vi vi_max(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
QK_INLINE vi vi_min(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
QK_INLINE vi vi_min_unsigned(vi a, vi b) {
    return (vi)_mm512_min_epu32((__m512i)a, (__m512i)b);
}
QK_INLINE vf vf_sqrt(vf v) { return (vf)_mm512_sqrt_ps((__m512)v); }
QK_INLINE vf vf_round(vf v) { return (vf)_mm512_roundscale_ps((__m512)v, 8); }
QK_INLINE int vi_any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
#define QK_HAS_SELECT
#define QK_HAS_NARROW
QK_INLINE vf vf_sel(vi mask, vf a, vf b) {
    return (vf)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), (__m512)b, (__m512)a);
}
QK_INLINE vi vi_sel(vi mask, vi a, vi b) {
    return (vi)_mm512_mask_blend_epi32(_mm512_movepi32_mask((__m512i)mask), (__m512i)b, (__m512i)a);
}
QK_INLINE vi vi_load_u8(const uint8_t *p) {
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
QK_INLINE vi vi_load_i8(const uint8_t *p) {
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
QK_INLINE vi vi_load_u16(const uint8_t *p) {
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
QK_INLINE void vi_store_u8(uint8_t *p, vi v) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
}
QK_INLINE void vi_store_u16(uint8_t *p, vi v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)v));
}

#elif defined(__AVX2__) && QK_LANES == 8
#define QK_HAS_FLOAT_MINMAX
#define QK_HAS_INT_MINMAX
#define QK_HAS_ROUND
QK_INLINE vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
QK_INLINE vf vf_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
QK_INLINE vi vi_max(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
QK_INLINE vi vi_min(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
QK_INLINE vi vi_min_unsigned(vi a, vi b) {
    return (vi)_mm256_min_epu32((__m256i)a, (__m256i)b);
}
QK_INLINE vf vf_sqrt(vf v) { return (vf)_mm256_sqrt_ps((__m256)v); }
QK_INLINE vf vf_round(vf v) { return (vf)_mm256_round_ps((__m256)v, 8); }
QK_INLINE int vi_any(vi mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
#define QK_HAS_SELECT
#define QK_HAS_NARROW
QK_INLINE vf vf_sel(vi mask, vf a, vf b) {
    return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
}
QK_INLINE vi vi_sel(vi mask, vi a, vi b) { return (vi)vf_sel(mask, (vf)a, (vf)b); }
QK_INLINE vi vi_load_u8(const uint8_t *p) {
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
QK_INLINE vi vi_load_i8(const uint8_t *p) {
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
QK_INLINE vi vi_load_u16(const uint8_t *p) {
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
}
QK_INLINE __m128i vi_pack_u16(vi v) {
    const __m256i low = (__m256i)(v & 0xffff);
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
QK_INLINE void vi_store_u8(uint8_t *p, vi v) {
    const __m128i halves = vi_pack_u16(v & 0xff);
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(halves, halves));
}
QK_INLINE void vi_store_u16(uint8_t *p, vi v) { _mm_storeu_si128((__m128i *)p, vi_pack_u16(v)); }

#elif defined(__SSE2__) && QK_LANES == 4
#define QK_HAS_FLOAT_MINMAX
QK_INLINE vf vf_max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
QK_INLINE vf vf_min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
QK_INLINE vf vf_sqrt(vf v) { return (vf)_mm_sqrt_ps((__m128)v); }
QK_INLINE int vi_any(vi mask) { return _mm_movemask_ps((__m128)mask) != 0; }
#define QK_HAS_NARROW
QK_INLINE vi vi_load_u16(const uint8_t *p) {
    return (vi)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i *)p), _mm_setzero_si128());
}
QK_INLINE vi vi_load_u8(const uint8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    const __m128i zero = _mm_setzero_si128();
    return (vi)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero);
}
QK_INLINE vi vi_load_i8(const uint8_t *p) { return (vi_load_u8(p) << 24) >> 24; }
/* SSE2 packs with signed saturation only, so the half-words pass as signed ones. */
QK_INLINE __m128i vi_pack_u16(vi v) {
    const __m128i half = (__m128i)((v << 16) >> 16);
    return _mm_packs_epi32(half, half);
}
QK_INLINE void vi_store_u8(uint8_t *p, vi v) {
    const __m128i halves = vi_pack_u16(v & 0xff);
    const int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
    memcpy(p, &four, sizeof four);
}
QK_INLINE void vi_store_u16(uint8_t *p, vi v) { _mm_storel_epi64((__m128i *)p, vi_pack_u16(v)); }

#elif defined(__aarch64__) && QK_LANES == 4
#define QK_HAS_INT_MINMAX
#define QK_HAS_ROUND
/* NEON's float min and max propagate NaN, so those stay plain. */
QK_INLINE vi vi_max(vi a, vi b) { return (vi)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
QK_INLINE vi vi_min(vi a, vi b) { return (vi)vminq_s32((int32x4_t)a, (int32x4_t)b); }
QK_INLINE vi vi_min_unsigned(vi a, vi b) {
    return (vi)vminq_u32((uint32x4_t)a, (uint32x4_t)b);
}
QK_INLINE vf vf_sqrt(vf v) { return (vf)vsqrtq_f32((float32x4_t)v); }
QK_INLINE vf vf_round(vf v) { return (vf)vrndnq_f32((float32x4_t)v); }
QK_INLINE int vi_any(vi mask) { return vmaxvq_u32((uint32x4_t)mask) != 0; }

#else
QK_INLINE vf vf_sqrt(vf v) {
    for (int i = 0; i < QK_LANES; ++i) v[i] = sqrtf(v[i]);
    return v;
}
QK_INLINE int vi_any(vi mask) {
    int32_t any = 0;
    for (int i = 0; i < QK_LANES; ++i) any |= mask[i];
    return any != 0;
}
#endif

/* mask lanes are all ones or all zeros, as comparisons give them: mask ? a : b. */
#ifndef QK_HAS_SELECT
QK_INLINE vf vf_sel(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
QK_INLINE vi vi_sel(vi mask, vi a, vi b) { return (a & mask) | (b & ~mask); }
#endif
/* (a > b) ? a : b and (a < b) ? a : b, as the reference's MAX and MIN macros. */
#ifndef QK_HAS_FLOAT_MINMAX
QK_INLINE vf vf_max(vf a, vf b) { return vf_sel(a > b, a, b); }
QK_INLINE vf vf_min(vf a, vf b) { return vf_sel(a < b, a, b); }
#endif
#ifndef QK_HAS_INT_MINMAX
QK_INLINE vi vi_max(vi a, vi b) { return vi_sel(a > b, a, b); }
QK_INLINE vi vi_min(vi a, vi b) { return vi_sel(a < b, a, b); }
QK_INLINE vi vi_min_unsigned(vi a, vi b) { return vi_sel((vi)((vu)a < (vu)b), a, b); }
#endif
/* Nearest integer as a float, ties to even, for |v| < 2^22. */
#ifndef QK_HAS_ROUND
QK_INLINE vf vf_round(vf v) { return (v + 12582912.f) - 12582912.f; }
#endif

/* Narrow and widen: QK_LANES bytes or half-words in memory are the low bits of each lane. */
#ifndef QK_HAS_NARROW
typedef uint8_t vb8 __attribute__((vector_size(QK_LANES)));
typedef int8_t vc8 __attribute__((vector_size(QK_LANES)));
typedef uint16_t vh16 __attribute__((vector_size(2 * QK_LANES)));
QK_INLINE vi vi_load_u8(const uint8_t *p) {
    vb8 b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, vi);
}
QK_INLINE vi vi_load_i8(const uint8_t *p) {
    vc8 b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, vi);
}
QK_INLINE vi vi_load_u16(const uint8_t *p) {
    vh16 h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vi);
}
QK_INLINE void vi_store_u8(uint8_t *p, vi v) {
    const vb8 b = __builtin_convertvector(v, vb8);
    memcpy(p, &b, sizeof b);
}
QK_INLINE void vi_store_u16(uint8_t *p, vi v) {
    const vh16 h = __builtin_convertvector(v, vh16);
    memcpy(p, &h, sizeof h);
}
#endif

#endif
