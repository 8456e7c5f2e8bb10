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

#define QK_INLINE static inline __attribute__((always_inline, unused))

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
/* Truncation towards zero, as a C cast. */
QK_INLINE vi vi_from(vf v) { return __builtin_convertvector(v, vi); }

/* mask lanes are all ones or all zeros, as comparisons give them: mask ? a : b. */
QK_INLINE vf vf_sel(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
QK_INLINE vi vi_sel(vi mask, vi a, vi b) { return (a & mask) | (b & ~mask); }

QK_INLINE vf vf_abs(vf v) { return (vf)((vi)v & 0x7fffffff); }
/* (a > b) ? a : b and (a < b) ? a : b, as the reference's MAX and MIN macros. */
QK_INLINE vf vf_max(vf a, vf b) { return vf_sel(a > b, a, b); }
QK_INLINE vf vf_min(vf a, vf b) { return vf_sel(a < b, a, b); }
QK_INLINE vi vi_max(vi a, vi b) { return vi_sel(a > b, a, b); }
QK_INLINE vi vi_min(vi a, vi b) { return vi_sel(a < b, a, b); }
QK_INLINE int vi_any(vi mask) {
    int32_t any = 0;
    for (int i = 0; i < QK_LANES; ++i) any |= mask[i];
    return any != 0;
}

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

#endif
