/* The table of the instruction set being compiled: one line per type. */
#include "kernels.h"

#define ENCODE(id, type) .encode[id] = QK_FN(encode_##type)
#define DECODE(id, type) .decode[id] = QK_FN(decode_##type)
#define BOTH(id, type) ENCODE(id, type), DECODE(id, type)
#define QK_STRING_(text) #text
#define QK_STRING(text) QK_STRING_(text)

extern const struct qk_table QK_FN(qk_kernels);

const struct qk_table QK_FN(qk_kernels) = {
    .name = QK_STRING(QK_ISA),
    BOTH(QK_F32, f32),
    BOTH(QK_F16, f16),
    BOTH(QK_BF16, bf16),
    BOTH(QK_Q4_0, q4_0),
    BOTH(QK_Q4_1, q4_1),
    BOTH(QK_Q5_0, q5_0),
    BOTH(QK_Q5_1, q5_1),
    BOTH(QK_Q8_0, q8_0),
    BOTH(QK_Q2_K, q2_k),
    BOTH(QK_Q3_K, q3_k),
    BOTH(QK_Q4_K, q4_k),
    BOTH(QK_Q5_K, q5_k),
    BOTH(QK_Q6_K, q6_k),
    BOTH(QK_TQ1_0, tq1_0),
    BOTH(QK_TQ2_0, tq2_0),
    BOTH(QK_Q1_0, q1_0),
    BOTH(QK_Q2_0, q2_0),
    BOTH(QK_MXFP4, mxfp4),
    BOTH(QK_NVFP4, nvfp4),
    BOTH(QK_IQ1_S, iq1_s),
    BOTH(QK_IQ1_M, iq1_m),
    BOTH(QK_IQ2_XXS, iq2_xxs),
    BOTH(QK_IQ2_XS, iq2_xs),
    BOTH(QK_IQ2_S, iq2_s),
    BOTH(QK_IQ3_XXS, iq3_xxs),
    BOTH(QK_IQ3_S, iq3_s),
    BOTH(QK_IQ4_NL, iq4_nl),
    BOTH(QK_IQ4_XS, iq4_xs),
    DECODE(QK_F64, f64),
    DECODE(QK_F8_E4M3, f8_e4m3),
    .first_nonfinite = QK_FN(first_nonfinite),
    .feedback = QK_FN(feedback),
    .sweep = QK_FN(sweep),
    .feedback_points = QK_FN(feedback_points),
    .sweep_points = QK_FN(sweep_points),
    .largest = QK_FN(largest),
    .small_floats = QK_FN(small_floats),
};
