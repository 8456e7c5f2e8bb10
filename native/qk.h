/* The C ABI between the binding and the kernels: type ids, the kernel table, its contract.
 *
 * Every kernel works on contiguous rows. Rows are float32 by the time an encoder sees them; the
 * binding's driver (rows.c) converts the stored dtype row by row, so no tensor is ever held whole.
 * Bytes are those of ggml's scalar code (ggml-quants.c built for the x86-64 baseline: strict
 * float32, sequential sums, no fused multiply-add), for every instruction set.
 */
#ifndef QUANTCLI_QK_H
#define QUANTCLI_QK_H

#include <stdint.h>

/* ggml's type ids (ggml.h, enum ggml_type) are used as they are. */
enum qk_type {
    QK_F32 = 0, QK_F16 = 1, QK_Q4_0 = 2, QK_Q4_1 = 3, QK_Q5_0 = 6, QK_Q5_1 = 7, QK_Q8_0 = 8,
    QK_Q2_K = 10, QK_Q3_K = 11, QK_Q4_K = 12, QK_Q5_K = 13, QK_Q6_K = 14,
    QK_IQ2_XXS = 16, QK_IQ2_XS = 17, QK_IQ3_XXS = 18, QK_IQ1_S = 19, QK_IQ4_NL = 20,
    QK_IQ3_S = 21, QK_IQ2_S = 22, QK_IQ4_XS = 23, QK_F64 = 28, QK_IQ1_M = 29, QK_BF16 = 30,
    QK_TQ1_0 = 34, QK_TQ2_0 = 35, QK_MXFP4 = 39, QK_NVFP4 = 40, QK_Q1_0 = 41, QK_Q2_0 = 42,
    QK_F8_E4M3 = 63, /* a stored dtype that ggml has no id for; never written to a file */
    QK_TYPE_COUNT = 64
};

/* Encode nrows rows of ncols floats; weights is one importance per column (ncols floats) or NULL.
 * ncols is a multiple of the type's block length. Returns 0, or -1 when out of memory. */
typedef int (*qk_encode_fn)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                            const float *weights);
/* Decode n elements (a multiple of the block length) to float32. */
typedef void (*qk_decode_fn)(const uint8_t *src, float *dst, int64_t n);

/* What the codes of a scalar format stand for: rising levels, sub weights under one step. */
struct qk_lattice {
    const float *levels;
    int count;
    int uniform; /* the levels are consecutive integers */
    int sub;
    int block;
    int half; /* d (and dmin) are float16 that may be chosen */
    int odd;  /* the integer scales are odd */
    int scale_range[2], min_range[2];
};
#define QK_COLUMNS_MAX 256 /* of a block */

/* Codes and errors (weights - values) of nrows x columns weights: target is rounded column by
 * column, and the error of column j times factor[j * columns + i] is added to each later column i.
 * steps and lows hold columns / sub values a row; a value is step * level - low. */
typedef void (*qk_feedback_fn)(const struct qk_lattice *lattice, const float *target,
                               const float *weights, const float *factor, const float *steps,
                               const float *lows, int64_t nrows, int columns, uint8_t *codes,
                               float *errors);
/* One sweep of coordinate descent over the columns of whole blocks: codes, and with scales_too the
 * integer scales and mins (columns / sub a row) and the factors d and dmin (columns / block a row).
 * gradient is errors times the whole Hessian for these columns; hessian their own columns x columns
 * part, and sums its rows added up over each run of sub columns. dmin and mins are NULL where the
 * format has no minimums. */
typedef void (*qk_sweep_fn)(const struct qk_lattice *lattice, const float *hessian,
                            const float *sums, const float *gradient, int64_t nrows, int columns,
                            int scales_too, uint8_t *codes, float *d, float *dmin, float *scales,
                            float *mins);

/* A codebook grid. The levels of a point are those of its two halves; equal halves are one pattern. */
enum { QK_SIGNS_NONE, QK_SIGNS_FREE, QK_SIGNS_EVEN };
struct qk_points {
    int count, group;
    int width;               /* weights chosen at once: a group, or eight with even signs */
    float apart;             /* or 0. The second half of the points is the first one, each level
                                moved by this, and a run under one scale is out of one half */
    int signs;
    const float *halves[2];  /* patterns of group / 2 levels, not negative where there are signs */
    int half_count[2];
    const uint8_t *patterns; /* of each point: its first and its second half */
};
#define QK_PATTERNS_MAX 176 /* of a half */

/* The same for groups of weights that are points of a grid. A code is a point's number, and from
 * bit 16 on its minus signs. factor is I + U of the Hessian's (I + U) D (I + U)^T; metric is, for
 * each unit, that product's part without the columns outside the unit, width x width; norms is, for
 * each group and point, the sum of its squared levels times the metric's diagonal. A step is d, one a
 * row, times scale, columns / sub a row; each scale is replaced by the best of those up to spread odd
 * numbers away from it, between 1 and most. Where points come in two halves that lie apart, either
 * is tried under each scale. */
typedef void (*qk_feedback_points_fn)(const struct qk_points *points, int sub, int spread, int most,
                                      const float *target, const float *weights,
                                      const float *factor, const float *metric,
                                      const float *norms, const float *d, int64_t nrows,
                                      int columns, float *scales, int32_t *codes, float *errors);
/* norms are with the diagonal of hessian. Each point stays in its half of points that lie apart. */
typedef void (*qk_sweep_points_fn)(const struct qk_points *points,
                                   const struct qk_lattice *lattice, const float *hessian,
                                   const float *norms, const float *gradient, int64_t nrows,
                                   int columns, int scales_too, int32_t *codes, float *d,
                                   float *scales);

/* Grids of small floats; the second E2M1 rounds ties to the smaller magnitude and has no minus
 * zero, as mlx.core.quantize does. */
enum qk_small { QK_E4M3, QK_E2M1, QK_E2M1_DOWN, QK_SMALL_COUNT };
/* Raise each out[i] to the largest magnitude of run i, where n floats are runs of width but for the
 * last. Returns whether one is infinite or NaN. */
typedef int (*qk_largest_fn)(const float *x, int64_t n, int64_t width, float *out);
/* The nearest codes, a byte each, of n floats whose runs of width have a scale each. */
typedef void (*qk_small_fn)(int kind, const float *x, const float *scales, int64_t n,
                            int64_t width, uint8_t *dst);

struct qk_table {
    const char *name;                       /* "baseline", "avx2", "avx512", "neon" */
    qk_encode_fn encode[QK_TYPE_COUNT];     /* NULL where a type has no kernel */
    qk_decode_fn decode[QK_TYPE_COUNT];     /* float types too: this is how sources are read */
    /* Index of the first infinity or NaN among n floats, or -1. */
    int64_t (*first_nonfinite)(const float *x, int64_t n);
    qk_feedback_fn feedback;
    qk_sweep_fn sweep;
    qk_feedback_points_fn feedback_points;
    qk_sweep_points_fn sweep_points;
    qk_largest_fn largest;
    qk_small_fn small_floats;
};

/* dispatch.c: the tables that are compiled in and that this CPU can run, best first; NULL beyond
 * the last. */
#define QK_ISA_COUNT_MAX 4
const struct qk_table *qk_available(int index);

/* types.c */
struct qk_type_size {
    int block;  /* weights in a block, 0 for an unused id */
    int nbytes; /* bytes of a packed block */
};
extern const struct qk_type_size qk_type_sizes[QK_TYPE_COUNT];

/* rows.c: results other than "all encoded" (-1) or an element's index. */
#define QK_ALL_FINITE (-1)
#define QK_NO_MEMORY (-2)

/* Encode nrows rows of ncols elements of the stored dtype src_type; stops at the first value that
 * is not finite in float32 and returns its flat index, else QK_ALL_FINITE, or QK_NO_MEMORY. */
int64_t qk_encode_rows(const struct qk_table *table, int type, int src_type,
                       const uint8_t *src, int64_t nrows, int64_t ncols, uint8_t *dst,
                       const float *weights);
/* small_rows.c: the largest magnitude of each run of width columns (of the last, of what is left)
 * of nrows x ncols elements of the stored dtype, into nrows x runs floats. Stops at the first value
 * that is not finite in float32 and returns its flat index, else QK_ALL_FINITE. */
int64_t qk_largest_rows(const struct qk_table *table, int src_type, const uint8_t *src,
                        int64_t nrows, int64_t ncols, int64_t width, float *out);
/* Their codes, a byte each, under scales of nrows x runs. */
void qk_small_rows(const struct qk_table *table, int kind, int src_type, const uint8_t *src,
                   const float *scales, int64_t nrows, int64_t ncols, int64_t width, uint8_t *dst);
/* Decode n elements under the default floating-point environment. */
void qk_decode_all(const struct qk_table *table, int type, const uint8_t *src, float *dst,
                   int64_t n);
/* Index of the first of nblocks blocks (nbytes each) with an infinite or NaN 16-bit scale at one
 * of the given byte offsets, or -1. exponent is the scale's exponent mask: 0x7c00 for float16,
 * 0x7f80 for bfloat16. */
int64_t qk_first_infinite_scale(const uint8_t *blocks, int64_t nblocks, int nbytes,
                                const int *offsets, int count, int exponent);

#endif
