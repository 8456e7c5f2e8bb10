/* Codes of up to 256 columns, each choice made in the light of the others.
 *
 * Rows are in lanes. `feedback` takes the columns in order and passes the error of each on to the
 * later ones (GPTQ in the form of an LDL decomposition); `sweep` lowers a quadratic loss by setting
 * each code, then each scale, to the best one given all others (coordinate descent). Every lane
 * performs its own sums in the order of the columns, so the codes are the same for every
 * instruction set.
 */
#include "descent.h"
#include "kernels.h"

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

QK_INLINE void scatter_codes(uint8_t *codes, const vi *tile, int64_t first, int64_t nrows,
                             int columns) {
    for (int i = 0; i < columns; ++i) {
        for (int lane = 0; lane < QK_LANES && first + lane < nrows; ++lane) {
            codes[(first + lane) * columns + i] = (uint8_t)tile[i][lane];
        }
    }
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

QK_INLINE void sweep_codes(struct tile_state *tile, const struct qk_lattice *lattice,
                           const vf *steps, const vf *lows) {
    for (int first = 0; first < tile->columns; first += QK_RUN) {
        const int last = first + QK_RUN;
        vf changes[QK_RUN];
        for (int j = first; j < last; ++j) {
            const vf step = steps[j / lattice->sub], low = lows[j / lattice->sub];
            const float *row = tile->hessian + (int64_t)j * tile->columns;
            const vf best = tile->values[j] + tile->gradient[j] / row[j];
            vf level;
            const vi code = nearest_level(lattice, (best + low) / step, &level);
            const vi lost = step == 0.f;
            tile->codes[j] = vi_sel(lost, tile->codes[j], code);
            tile->levels[j] = vf_sel(lost, tile->levels[j], level);
            const vf value = step * tile->levels[j] - low;
            changes[j - first] = value - tile->values[j];
            for (int i = first; i < last; ++i) tile->gradient[i] -= changes[j - first] * row[i];
            tile->values[j] = value;
        }
        follow_run(tile, changes, first, 0, first);
        follow_run(tile, changes, first, last, tile->columns);
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
