/* Codes of up to 256 columns, each choice made in the light of the others.
 *
 * Rows are in lanes. `feedback` takes the columns in order and passes the error of each on to the
 * later ones (GPTQ in the form of an LDL decomposition); `sweep` lowers a quadratic loss by setting
 * each code, then each scale, to the best one given all others (coordinate descent). Every lane
 * performs its own sums in the order of the columns, so the codes are the same for every
 * instruction set.
 */
#include "kernels.h"
#include "tile.h"

/* Codes of values divided by their step, and the levels they stand for. */
QK_INLINE vi nearest_level(const struct qk_lattice *lattice, vf ratio, vf *restrict level) {
    if (lattice->uniform) {
        const vf shifted = ratio - lattice->levels[0];
        const vf top = vf_set1((float)(lattice->count - 1));
        const vf code = vf_round(vf_max(vf_min(shifted, top), vf_set1(0)));
        *level = code + lattice->levels[0];
        return vi_from(code);
    }
    vi code = {0};
    vf found = vf_set1(lattice->levels[0]);
    for (int k = 1; k < lattice->count; ++k) {
        const float gap = lattice->levels[k] - lattice->levels[k - 1];
        const vi above = ratio > lattice->levels[k - 1] + 0.5f * gap;
        code -= above;
        found += vf_sel(above, vf_set1(gap), vf_set1(0));
    }
    *level = found;
    return code;
}

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

QK_INLINE void scatter_codes(uint8_t *codes, const vi *tile, int64_t first, int64_t nrows,
                             int columns) {
    for (int i = 0; i < columns; ++i) {
        for (int lane = 0; lane < QK_LANES && first + lane < nrows; ++lane) {
            codes[(first + lane) * columns + i] = (uint8_t)tile[i][lane];
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

void QK_FN(feedback)(const struct qk_lattice *lattice, const float *target, const float *weights,
                     const float *factor, const float *steps, const float *lows, int64_t nrows,
                     int columns, uint8_t *codes, float *errors) {
    const int subs = columns / lattice->sub;
    vf x[QK_COLUMNS_MAX], w[QK_COLUMNS_MAX];
    vi c[QK_COLUMNS_MAX];
    for (int64_t first = 0; first < nrows; first += QK_LANES) {
        const float *lanes[QK_LANES];
        each_lane(lanes, target, first, nrows, columns);
        gather_tile(x, lanes, columns);
        each_lane(lanes, weights, first, nrows, columns);
        gather_tile(w, lanes, columns);
        vf step = {0}, low = {0};
        for (int j = 0; j < columns; ++j) {
            if (j % lattice->sub == 0) {
                step = lane_values(steps, first, nrows, subs, j / lattice->sub);
                low = lane_values(lows, first, nrows, subs, j / lattice->sub);
            }
            vf level;
            c[j] = nearest_level(lattice, (x[j] + low) / step, &level);
            const vf error = w[j] - (step * level - low);
            w[j] = error;
            const float *row = factor + (int64_t)j * columns;
            for (int i = j + 1; i < columns; ++i) x[i] += error * row[i];
        }
        scatter_codes(codes, c, first, nrows, columns);
        scatter_tile(errors, w, first, nrows, columns);
    }
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

/* The integer nearest to number + slope / curvature, within the range. */
QK_INLINE vf move_integer(vf number, vf slope, vf curvature, const int *range) {
    const vf wanted = number + divide_where(slope, curvature);
    const vf low = vf_set1((float)range[0]), high = vf_set1((float)range[1]);
    return vf_round(vf_max(vf_min(wanted, high), low));
}

QK_INLINE void sweep_codes(struct tile_state *tile, const struct qk_lattice *lattice,
                           const vf *steps, const vf *lows) {
    for (int j = 0; j < tile->columns; ++j) {
        const vf step = steps[j / lattice->sub], low = lows[j / lattice->sub];
        const float *row = tile->hessian + (int64_t)j * tile->columns;
        const vf best = tile->values[j] + tile->gradient[j] / row[j];
        vf level;
        const vi code = nearest_level(lattice, (best + low) / step, &level);
        const vi lost = step == 0.f;
        tile->codes[j] = vi_sel(lost, tile->codes[j], code);
        tile->levels[j] = vf_sel(lost, tile->levels[j], level);
        const vf value = step * tile->levels[j] - low;
        follow(tile, value - tile->values[j], row);
        tile->values[j] = value;
    }
}

/* Each run's integer scale, and minimum where there is one, to its optimum. */
QK_INLINE void sweep_scales(struct tile_state *tile, const struct qk_lattice *lattice,
                            const vf *d, const vf *dmin, vf *scales, vf *mins) {
    const int sub = lattice->sub, runs = lattice->block / sub;
    for (int s = 0; s < tile->columns / sub; ++s) {
        const int first = s * sub, last = first + sub, block = s / runs;
        const float *rows = tile->hessian + (int64_t)first * tile->columns;
        if (lattice->scale_range[0] < lattice->scale_range[1]) {
            vf slope = {0}, curvature = {0};
            for (int i = first; i < last; ++i) {
                const vf a = d[block] * tile->levels[i];
                const float *row = tile->hessian + (int64_t)i * tile->columns;
                slope += a * tile->gradient[i];
                curvature += a * d[block] * add_products(vf_set1(0), tile->levels, row, first, last);
            }
            const vf scale = move_integer(scales[s], slope, curvature, lattice->scale_range);
            const vf moved = (scale - scales[s]) * d[block];
            scales[s] = scale;
            if (vi_any(moved != 0.f)) {
                for (int i = first; i < last; ++i) {
                    const vf change = moved * tile->levels[i];
                    follow(tile, change, rows + (int64_t)(i - first) * tile->columns);
                    tile->values[i] += change;
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
                                        lattice->min_range);
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
        const float *row = tile->hessian + (int64_t)i * tile->columns;
        for (int k = 0; k < tile->columns; ++k) along[k] += a[i] * row[k];
        ga += a[i] * tile->gradient[i];
    }
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

QK_INLINE vf level_of(const struct qk_lattice *lattice, vi code) {
    vf level;
    for (int lane = 0; lane < QK_LANES; ++lane) level[lane] = lattice->levels[code[lane]];
    return level;
}

void QK_FN(sweep)(const struct qk_lattice *lattice, const float *hessian, const float *sums,
                  const float *gradient, int64_t nrows, int columns, int scales_too,
                  uint8_t *codes, float *d, float *dmin, float *scales, float *mins) {
    const int subs = columns / lattice->sub, blocks = columns / lattice->block;
    const int runs = lattice->block / lattice->sub;
    struct tile_state tile;
    tile.hessian = hessian;
    tile.sums = sums;
    tile.columns = columns;
    vf td[QK_COLUMNS_MAX / 32], tmin[QK_COLUMNS_MAX / 32];
    vf ts[QK_COLUMNS_MAX / 16], tm[QK_COLUMNS_MAX / 16];
    vf steps[QK_COLUMNS_MAX / 16], lows[QK_COLUMNS_MAX / 16];
    for (int64_t first = 0; first < nrows; first += QK_LANES) {
        const float *lanes[QK_LANES];
        each_lane(lanes, gradient, first, nrows, columns);
        gather_tile(tile.gradient, lanes, columns);
        load_lanes(td, d, first, nrows, blocks);
        load_lanes(ts, scales, first, nrows, subs);
        if (mins != NULL) {
            load_lanes(tmin, dmin, first, nrows, blocks);
            load_lanes(tm, mins, first, nrows, subs);
        }
        for (int s = 0; s < subs; ++s) {
            steps[s] = td[s / runs] * ts[s];
            lows[s] = vf_set1(0);
            if (mins != NULL) lows[s] = tmin[s / runs] * tm[s];
        }
        for (int i = 0; i < columns; ++i) {
            for (int lane = 0; lane < QK_LANES; ++lane) {
                const int64_t row = first + lane < nrows ? first + lane : nrows - 1;
                tile.codes[i][lane] = codes[row * columns + i];
            }
            tile.levels[i] = level_of(lattice, tile.codes[i]);
            tile.values[i] = steps[i / lattice->sub] * tile.levels[i] - lows[i / lattice->sub];
        }
        sweep_codes(&tile, lattice, steps, lows);
        if (scales_too) {
            sweep_scales(&tile, lattice, td, tmin, ts, mins != NULL ? tm : NULL);
            for (int block = 0; block < blocks && lattice->half; ++block) {
                fit_block(&tile, lattice, block, td + block, tmin + block, ts,
                          mins != NULL ? tm : NULL);
            }
            store_lanes(d, td, first, nrows, blocks);
            store_lanes(scales, ts, first, nrows, subs);
            if (mins != NULL) {
                store_lanes(dmin, tmin, first, nrows, blocks);
                store_lanes(mins, tm, first, nrows, subs);
            }
        }
        scatter_codes(codes, tile.codes, first, nrows, columns);
    }
}
