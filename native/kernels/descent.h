/* What descent on a quadratic loss shares between scalar codes and codebook points: rows in lanes,
 * the state of a tile of columns, and the steps on scales once the codes are chosen.
 *
 * A value is step * level - low, its step d * scale. The gradient is errors times the Hessian: half
 * the slope of the loss, downwards.
 */
#ifndef QUANTCLI_DESCENT_H
#define QUANTCLI_DESCENT_H

#include "../qk.h"
#include "tile.h"

QK_INLINE void each_lane(const float **lanes, const float *rows, int64_t first, int64_t nrows,
                         int64_t stride) {
    for (int lane = 0; lane < QK_LANES; ++lane) {
        const int64_t row = first + lane < nrows ? first + lane : nrows - 1;
        lanes[lane] = rows + row * stride;
    }
}

/* tile[i] to column i of each lane's row, for the rows that are there. */
QK_INLINE void scatter_tile(float *rows, const vf *tile, int64_t first, int64_t nrows,
                            int columns) {
    for (int start = 0; start < columns; start += QK_LANES) {
        vf block[QK_LANES];
        for (int k = 0; k < QK_LANES; ++k) block[k] = tile[start + k];
        transpose(block);
        for (int lane = 0; lane < QK_LANES && first + lane < nrows; ++lane) {
            vf_store(rows + (first + lane) * columns + start, block[lane]);
        }
    }
}

QK_INLINE vf lane_values(const float *values, int64_t first, int64_t nrows, int subs, int sub) {
    vf found;
    for (int lane = 0; lane < QK_LANES; ++lane) {
        const int64_t row = first + lane < nrows ? first + lane : nrows - 1;
        found[lane] = values[row * subs + sub];
    }
    return found;
}

/* What a sweep works on: values and gradient of a tile of rows, and the Hessian of its columns. */
struct tile_state {
    vf values[QK_COLUMNS_MAX];
    vf gradient[QK_COLUMNS_MAX];
    vf levels[QK_COLUMNS_MAX];
    vi codes[QK_COLUMNS_MAX];
    const float *hessian;
    const float *sums; /* of the Hessian's rows over each run of sub columns */
    int columns;
};

QK_INLINE vf add_products(vf sum, const vf *a, const float *row, int first, int last) {
    for (int i = first; i < last; ++i) sum += a[i] * row[i];
    return sum;
}

/* The whole gradient after the values of column j have changed. */
QK_INLINE void follow(struct tile_state *tile, vf change, const float *row) {
    for (int i = 0; i < tile->columns; ++i) tile->gradient[i] -= change * row[i];
}

QK_INLINE vf divide_where(vf a, vf b) {
    return vf_sel(b > 0.f, a / b, vf_set1(0));
}

#define QK_RUN 16 /* divides every number of columns, and of weights under one scale */

/* sums[i] += a[0 .. QK_RUN) times the Hessian's rows from first on, in this order. A column's sum
 * stays in a register. */
QK_INLINE void add_run(const struct tile_state *tile, vf *restrict sums, const vf *a, int first) {
    const float *row = tile->hessian + (int64_t)first * tile->columns;
    for (int i = 0; i < tile->columns; ++i) {
        vf sum = sums[i];
#pragma GCC unroll 16
        for (int k = 0; k < QK_RUN; ++k) sum += a[k] * row[k * tile->columns + i];
        sums[i] = sum;
    }
}

/* The gradient of the columns from..to after the values of a run have changed. */
QK_INLINE void follow_run(struct tile_state *tile, const vf *changes, int first, int from, int to) {
    const float *row = tile->hessian + (int64_t)first * tile->columns;
    for (int i = from; i < to; ++i) {
        vf left = tile->gradient[i];
#pragma GCC unroll 16
        for (int k = 0; k < QK_RUN; ++k) left -= changes[k] * row[k * tile->columns + i];
        tile->gradient[i] = left;
    }
}

/* The integer nearest to number + slope / curvature, within the range; with odd the odd one. Adding
 * zero makes a negative zero a positive one, as it is already where rounding is an addition. */
QK_INLINE vf move_integer(vf number, vf slope, vf curvature, const int *range, int odd) {
    const vf wanted = number + divide_where(slope, curvature);
    const vf low = vf_set1((float)range[0]), high = vf_set1((float)range[1]);
    const vf held = vf_max(vf_min(wanted, high), low);
    if (odd) return 2.f * vf_round(0.5f * (held - 1.f)) + 1.f;
    return vf_round(held) + 0.f;
}

/* Each run's integer scale, and minimum where there is one, to its optimum. */
QK_INLINE void sweep_scales(struct tile_state *tile, const struct qk_lattice *lattice,
                            const vf *d, const vf *dmin, vf *scales, vf *mins) {
    const int sub = lattice->sub, runs = lattice->block / sub;
    for (int s = 0; s < tile->columns / sub; ++s) {
        const int first = s * sub, last = first + sub, block = s / runs;
        if (lattice->scale_range[0] < lattice->scale_range[1]) {
            vf slope = {0}, curvature = {0};
            for (int i = first; i < last; ++i) {
                const vf a = d[block] * tile->levels[i];
                const float *row = tile->hessian + (int64_t)i * tile->columns;
                slope += a * tile->gradient[i];
                curvature += a * d[block] * add_products(vf_set1(0), tile->levels, row, first, last);
            }
            const vf scale = move_integer(scales[s], slope, curvature, lattice->scale_range,
                                          lattice->odd);
            const vf moved = (scale - scales[s]) * d[block];
            scales[s] = scale;
            if (vi_any(moved != 0.f)) {
                for (int start = first; start < last; start += QK_RUN) {
                    vf changes[QK_RUN];
                    for (int k = 0; k < QK_RUN; ++k) {
                        changes[k] = moved * tile->levels[start + k];
                        tile->values[start + k] += changes[k];
                    }
                    follow_run(tile, changes, start, 0, tile->columns);
                }
            }
        }
        if (mins != NULL && lattice->min_range[0] < lattice->min_range[1]) {
            const float *sums = tile->sums + (int64_t)s * tile->columns;
            vf slope = {0};
            float curvature = 0;
            for (int i = first; i < last; ++i) {
                slope -= dmin[block] * tile->gradient[i];
                curvature += sums[i];
            }
            const vf min = move_integer(mins[s], slope, dmin[block] * dmin[block] * curvature,
                                        lattice->min_range, 0);
            const vf change = (mins[s] - min) * dmin[block];
            mins[s] = min;
            follow(tile, change, sums);
            for (int i = first; i < last; ++i) tile->values[i] += change;
        }
    }
}

/* Least squares for d, or d and dmin, of one block; taken where the rounded ones are better. */
QK_INLINE void fit_block(struct tile_state *tile, const struct qk_lattice *lattice, int block,
                         vf *d, vf *dmin, const vf *scales, const vf *mins) {
    const int sub = lattice->sub, first = block * lattice->block, last = first + lattice->block;
    vf a[QK_COLUMNS_MAX], along[QK_COLUMNS_MAX], against[QK_COLUMNS_MAX];
    for (int i = 0; i < tile->columns; ++i) along[i] = against[i] = vf_set1(0);
    vf aa = {0}, ga = {0}, bb = {0}, gb = {0}, ab = {0};
    for (int i = first; i < last; ++i) {
        a[i] = scales[i / sub] * tile->levels[i];
        ga += a[i] * tile->gradient[i];
    }
    for (int i = first; i < last; i += QK_RUN) add_run(tile, along, a + i, i);
    for (int i = first; i < last; ++i) aa += a[i] * along[i];
    if (mins != NULL) {
        for (int s = first / sub; s < last / sub; ++s) {
            const float *sums = tile->sums + (int64_t)s * tile->columns;
            for (int k = 0; k < tile->columns; ++k) against[k] -= mins[s] * sums[k];
        }
        for (int i = first; i < last; ++i) {
            const vf b = -mins[i / sub];
            bb += b * against[i];
            gb += b * tile->gradient[i];
            ab += a[i] * against[i];
        }
    }
    const vf determinant = aa * bb - ab * ab;
    const vi apart = determinant > 1e-6f * aa * bb;
    const vf t = vf_sel(apart, (ga * bb - gb * ab) / determinant, divide_where(ga, aa));
    const vf u = vf_sel(apart, (gb * aa - ga * ab) / determinant, vf_set1(0));
    const vf new_d = vf_from_half(vi_to_half(*d + t));
    vf new_dmin = {0};
    if (mins != NULL) new_dmin = vf_from_half(vi_to_half(*dmin + u));
    vf moved = new_d - *d, lowered = {0};
    if (mins != NULL) lowered = new_dmin - *dmin;
    const vf gain = 2.f * (moved * ga + lowered * gb)
                  - (moved * moved * aa + 2.f * moved * lowered * ab + lowered * lowered * bb);
    /* An infinite scale has no finite gain, so the comparison refuses it. */
    const vi better = gain > 0.f;
    moved = vf_sel(better, moved, vf_set1(0));
    lowered = vf_sel(better, lowered, vf_set1(0));
    *d = vf_sel(better, new_d, *d);
    if (mins != NULL) *dmin = vf_sel(better, new_dmin, *dmin);
    for (int k = 0; k < tile->columns; ++k) {
        tile->gradient[k] -= moved * along[k] + lowered * against[k];
    }
    for (int i = first; i < last; ++i) {
        tile->values[i] += moved * a[i];
        if (mins != NULL) tile->values[i] -= lowered * mins[i / sub];
    }
}

QK_INLINE void load_lanes(vf *tile, const float *rows, int64_t first, int64_t nrows, int count) {
    for (int i = 0; i < count; ++i) tile[i] = lane_values(rows, first, nrows, count, i);
}

QK_INLINE void store_lanes(float *rows, const vf *tile, int64_t first, int64_t nrows, int count) {
    for (int i = 0; i < count; ++i) {
        for (int lane = 0; lane < QK_LANES && first + lane < nrows; ++lane) {
            rows[(first + lane) * count + i] = tile[i][lane];
        }
    }
}

#endif
