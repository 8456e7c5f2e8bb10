/* Which instruction sets were compiled in, and which of them this CPU can run. */
#include "qk.h"

#include <stddef.h>

#if defined(QK_HAVE_BASELINE)
extern const struct qk_table qk_kernels_baseline;
#endif
#if defined(QK_HAVE_NEON)
extern const struct qk_table qk_kernels_neon;
#endif
#if defined(QK_HAVE_AVX2)
#include <cpuid.h>
extern const struct qk_table qk_kernels_avx2;

static int has_avx2(void) {
    unsigned a, b, c = 0, d;
    /* F16C by hand: not every compiler's __builtin_cpu_supports knows the name. */
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi")
        && __builtin_cpu_supports("bmi2");
}
#endif
#if defined(QK_HAVE_AVX512)
extern const struct qk_table qk_kernels_avx512;

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const struct qk_table *qk_available(int index) {
    const struct qk_table *found[QK_ISA_COUNT_MAX + 1] = {NULL};
    int count = 0;
#if defined(QK_HAVE_AVX2)
    __builtin_cpu_init();
#if defined(QK_HAVE_AVX512)
    if (has_avx2() && has_avx512()) found[count++] = &qk_kernels_avx512;
#endif
    if (has_avx2()) found[count++] = &qk_kernels_avx2;
#endif
#if defined(QK_HAVE_NEON)
    found[count++] = &qk_kernels_neon;
#endif
#if defined(QK_HAVE_BASELINE)
    found[count++] = &qk_kernels_baseline;
#endif
    return index < count ? found[index] : NULL;
}
