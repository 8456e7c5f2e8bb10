/* Lanes: one source for every instruction set, with the bytes of the scalar reference.
 *
 * A lane holds one independent unit of work (a sub-block, a block, a row or a trial scale) and
 * performs that unit's own operations in the reference's order, so widening the vector never
 * reassociates a sum. GCC and clang lower the vectors to SSE2, AVX2, AVX-512 or NEON; the file is
 * compiled once per instruction set with QK_LANES = 4, 8 or 16, always without FMA contraction.
 */
#ifndef QUANTCLI_LANES_H
#define QUANTCLI_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef QK_LANES
#define QK_LANES 4
#endif
#ifndef QK_ISA
#define QK_ISA baseline
#endif
#define QK_CAT_(a, b) a##_##b
#define QK_CAT(a, b) QK_CAT_(a, b)
/* A kernel's symbol for the instruction set being compiled: QK_FN(encode_q4_k). */
#define QK_FN(name) QK_CAT(name, QK_ISA)

/* Inlining everything makes constants of the formats' parameters. A build that checks rather than
 * runs fast may define it as plain functions, which compile in a thirtieth of the time. */
#ifndef QK_INLINE
#define QK_INLINE static inline __attribute__((always_inline, unused))
#endif

typedef float vf __attribute__((vector_size(4 * QK_LANES), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * QK_LANES), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * QK_LANES), may_alias));

QK_INLINE vf vf_set1(float a) { return (vf){0} + a; }
QK_INLINE vi vi_set1(int32_t a) { return (vi){0} + a; }
QK_INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
QK_INLINE vi vi_load(const int32_t *p) { vi v; memcpy(&v, p, sizeof v); return v; }
QK_INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
QK_INLINE void vi_store(int32_t *p, vi v) { memcpy(p, &v, sizeof v); }
QK_INLINE vf vf_from(vi v) { return __builtin_convertvector(v, vf); }
/* 0, 1, 2 ... in the lanes. */
QK_INLINE vi lane_numbers(void) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return vi_load(numbers);
}
/* Truncation towards zero, as a C cast. */
QK_INLINE vi vi_from(vf v) { return __builtin_convertvector(v, vi); }

QK_INLINE vf vf_abs(vf v) { return (vf)((vi)v & 0x7fffffff); }
#include "isa.h"

/* Nearest integer, ties to even, for |x| < 2^22: the reference's magic-number addition. */
QK_INLINE vi vi_nearest(vf v) {
    return ((vi)(v + 12582912.f) & 0x007fffff) - 0x00400000;
}
QK_INLINE int qk_nearest(float x) {
    float shifted = x + 12582912.f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (bits & 0x007fffff) - 0x00400000;
}

/* Truncation of any float, as x86 has it: 0x80000000 for NaN and whatever int32 cannot hold. A C
 * cast leaves those undefined, and other machines saturate. */
QK_INLINE vi vi_trunc(vf v) {
#if defined(__x86_64__)
    return vi_from(v);
#else
    const vi held = vf_abs(v) < 2147483648.f;
    return vi_sel(held, vi_from(vf_sel(held, v, vf_set1(0))), vi_set1(INT32_MIN));
#endif
}

/* Float16 bits of each lane, rounded to nearest even; overflow gives infinity, NaN a quiet NaN. */
QK_INLINE vi vi_to_half(vf v) {
    const vi magnitude = (vi)v & 0x7fffffff;
    const vi sign = (vi)((vu)v >> 16) & 0x8000;
    /* Rebias the exponent by 127 - 15 and round at bit 13. */
    vi half = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    /* Below 2^-14: adding 0.5 puts a float16 subnormal's last bit at a float's last bit. */
    const vi tiny = (vi)((vf)magnitude + 0.5f) - 0x3f000000;
    half = vi_sel(magnitude < 0x38800000, tiny, vi_min(half, vi_set1(0x7c00)));
    half = vi_sel(magnitude > 0x7f800000, vi_set1(0x7e00), half);
    return half | sign;
}
/* The value of float16 bits in each lane. */
QK_INLINE vf vf_from_half(vi half) {
    const vi shifted = (half & 0x7fff) << 13;
    const vi finite = (vi)((vf)shifted * 0x1p112f);
    const vi special = shifted + (224 << 23); /* an exponent of all ones stays one */
    const vi sign = (half & 0x8000) << 16;
    return (vf)(vi_sel(shifted < (31 << 23), finite, special) | sign);
}
QK_INLINE uint16_t qk_to_half(float x) { return (uint16_t)vi_to_half(vf_set1(x))[0]; }
QK_INLINE float qk_from_half(uint16_t half) { return vf_from_half(vi_set1(half))[0]; }

#endif
