/* Weights and bytes of a block of each type (ggml.c, type_traits); {0, 0} where an id is unused.
 * The binding checks every buffer's length against it. */
#include "qk.h"

const struct qk_type_size qk_type_sizes[QK_TYPE_COUNT] = {
    [QK_F64] = {1, 8}, [QK_F32] = {1, 4}, [QK_F16] = {1, 2}, [QK_BF16] = {1, 2},
    [QK_F8_E4M3] = {1, 1},
    [QK_Q4_0] = {32, 18}, [QK_Q4_1] = {32, 20}, [QK_Q5_0] = {32, 22}, [QK_Q5_1] = {32, 24},
    [QK_Q8_0] = {32, 34},
    [QK_Q2_K] = {256, 84}, [QK_Q3_K] = {256, 110}, [QK_Q4_K] = {256, 144}, [QK_Q5_K] = {256, 176},
    [QK_Q6_K] = {256, 210},
    [QK_IQ1_S] = {256, 50}, [QK_IQ1_M] = {256, 56}, [QK_IQ2_XXS] = {256, 66},
    [QK_IQ2_XS] = {256, 74}, [QK_IQ2_S] = {256, 82}, [QK_IQ3_XXS] = {256, 98},
    [QK_IQ3_S] = {256, 110}, [QK_IQ4_XS] = {256, 136}, [QK_IQ4_NL] = {32, 18},
    [QK_TQ1_0] = {256, 54}, [QK_TQ2_0] = {256, 66}, [QK_MXFP4] = {32, 17}, [QK_NVFP4] = {64, 36},
    [QK_Q1_0] = {128, 18}, [QK_Q2_0] = {64, 18},
};
