/* Lane operations for which the machine has an instruction that a compiler does not find by itself.
 *
 * Included by lanes.h, after the vector types. Every form gives the bits of the plain one at the
 * end of this file: min and max return their second operand when the comparison is false, as the
 * reference's macros do, and vf_round is the magic-number addition where |v| < 2^22.
 */
#ifndef QUANTCLI_ISA_H
#define QUANTCLI_ISA_H

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && QK_LANES == 16
#define QK_HAS_FLOAT_MINMAX
#define QK_HAS_INT_MINMAX
#define QK_HAS_ROUND
QK_INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
QK_INLINE vf vf_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
QK_INLINE vi vi_max(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
QK_INLINE vi vi_min(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
QK_INLINE vf vf_sqrt(vf v) { return (vf)_mm512_sqrt_ps((__m512)v); }
QK_INLINE vf vf_round(vf v) { return (vf)_mm512_roundscale_ps((__m512)v, 8); }
QK_INLINE int vi_any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }

#elif defined(__AVX2__) && QK_LANES == 8
#define QK_HAS_FLOAT_MINMAX
#define QK_HAS_INT_MINMAX
#define QK_HAS_ROUND
QK_INLINE vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
QK_INLINE vf vf_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
QK_INLINE vi vi_max(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
QK_INLINE vi vi_min(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
QK_INLINE vf vf_sqrt(vf v) { return (vf)_mm256_sqrt_ps((__m256)v); }
QK_INLINE vf vf_round(vf v) { return (vf)_mm256_round_ps((__m256)v, 8); }
QK_INLINE int vi_any(vi mask) { return _mm256_movemask_ps((__m256)mask) != 0; }

#elif defined(__SSE2__) && QK_LANES == 4
#define QK_HAS_FLOAT_MINMAX
QK_INLINE vf vf_max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
QK_INLINE vf vf_min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
QK_INLINE vf vf_sqrt(vf v) { return (vf)_mm_sqrt_ps((__m128)v); }
QK_INLINE int vi_any(vi mask) { return _mm_movemask_ps((__m128)mask) != 0; }

#elif defined(__aarch64__) && QK_LANES == 4
#define QK_HAS_INT_MINMAX
#define QK_HAS_ROUND
/* NEON's float min and max propagate NaN, so those stay plain. */
QK_INLINE vi vi_max(vi a, vi b) { return (vi)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
QK_INLINE vi vi_min(vi a, vi b) { return (vi)vminq_s32((int32x4_t)a, (int32x4_t)b); }
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

/* (a > b) ? a : b and (a < b) ? a : b, as the reference's MAX and MIN macros. */
#ifndef QK_HAS_FLOAT_MINMAX
QK_INLINE vf vf_max(vf a, vf b) { return vf_sel(a > b, a, b); }
QK_INLINE vf vf_min(vf a, vf b) { return vf_sel(a < b, a, b); }
#endif
#ifndef QK_HAS_INT_MINMAX
QK_INLINE vi vi_max(vi a, vi b) { return vi_sel(a > b, a, b); }
QK_INLINE vi vi_min(vi a, vi b) { return vi_sel(a < b, a, b); }
#endif
/* Nearest integer as a float, ties to even, for |v| < 2^22. */
#ifndef QK_HAS_ROUND
QK_INLINE vf vf_round(vf v) { return (v + 12582912.f) - 12582912.f; }
#endif

#endif
