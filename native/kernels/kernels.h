/* Every kernel, for the table: a family's functions are declared here and defined in its file. */
#ifndef QUANTCLI_KERNELS_H
#define QUANTCLI_KERNELS_H

#include "../qk.h"
#include "lanes.h"

#define QK_ENCODER(type)                                                                          \
    int QK_FN(encode_##type)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,          \
                             const float *weights)
#define QK_DECODER(type) void QK_FN(decode_##type)(const uint8_t *src, float *dst, int64_t n)

/* float.c */
QK_ENCODER(f32);
QK_ENCODER(f16);
QK_ENCODER(bf16);
QK_DECODER(f64);
QK_DECODER(f32);
QK_DECODER(f16);
QK_DECODER(bf16);
QK_DECODER(f8_e4m3);
int64_t QK_FN(first_nonfinite)(const float *x, int64_t n);

/* legacy.c, legacy_search.c, legacy_decode.c */
QK_ENCODER(q4_0);
QK_ENCODER(q4_1);
QK_ENCODER(q5_0);
QK_ENCODER(q5_1);
QK_ENCODER(q8_0);
QK_DECODER(q4_0);
QK_DECODER(q4_1);
QK_DECODER(q5_0);
QK_DECODER(q5_1);
QK_DECODER(q8_0);

/* kquants_affine.c, kquants_symmetric.c, kquants_decode.c */
QK_ENCODER(q2_k);
QK_ENCODER(q3_k);
QK_ENCODER(q4_k);
QK_ENCODER(q5_k);
QK_ENCODER(q6_k);
QK_DECODER(q2_k);
QK_DECODER(q3_k);
QK_DECODER(q4_k);
QK_DECODER(q5_k);
QK_DECODER(q6_k);

/* ternary.c */
QK_ENCODER(tq1_0);
QK_ENCODER(tq2_0);
QK_ENCODER(q1_0);
QK_ENCODER(q2_0);
QK_DECODER(tq1_0);
QK_DECODER(tq2_0);
QK_DECODER(q1_0);
QK_DECODER(q2_0);

/* microscale.c */
QK_ENCODER(mxfp4);
QK_ENCODER(nvfp4);
QK_DECODER(mxfp4);
QK_DECODER(nvfp4);

/* small_floats.c */
int QK_FN(largest)(const float *x, int64_t n, int64_t width, float *out);
void QK_FN(small_floats)(int kind, const float *x, const float *scales, int64_t n, int64_t width,
                         uint8_t *dst);

/* iq1.c, iq2.c */
QK_ENCODER(iq1_s);
QK_ENCODER(iq1_m);
QK_ENCODER(iq2_xxs);
QK_ENCODER(iq2_xs);
QK_ENCODER(iq2_s);
QK_DECODER(iq1_s);
QK_DECODER(iq1_m);
QK_DECODER(iq2_xxs);
QK_DECODER(iq2_xs);
QK_DECODER(iq2_s);

/* iq3.c, iq4.c */
QK_ENCODER(iq3_xxs);
QK_ENCODER(iq3_s);
QK_ENCODER(iq4_nl);
QK_ENCODER(iq4_xs);
QK_DECODER(iq3_xxs);
QK_DECODER(iq3_s);
QK_DECODER(iq4_nl);
QK_DECODER(iq4_xs);

/* lattice.c */
void QK_FN(feedback)(const struct qk_lattice *lattice, const float *target, const float *weights,
                     const float *factor, const float *steps, const float *lows, int64_t nrows,
                     int columns, uint8_t *codes, float *errors);
void QK_FN(sweep)(const struct qk_lattice *lattice, const float *hessian, const float *sums,
                  const float *gradient, int64_t nrows, int columns, int scales_too,
                  uint8_t *codes, float *d, float *dmin, float *scales, float *mins);

/* points.c */
void QK_FN(feedback_points)(const struct qk_points *points, int sub, int spread, int most,
                            const float *target, const float *weights, const float *factor,
                            const float *metric, const float *norms, const float *d,
                            int64_t nrows, int columns, float *scales, int32_t *codes,
                            float *errors);
void QK_FN(sweep_points)(const struct qk_points *points, const struct qk_lattice *lattice,
                         const float *hessian, const float *norms, const float *gradient,
                         int64_t nrows, int columns, int scales_too, int32_t *codes, float *d,
                         float *scales);

#endif
