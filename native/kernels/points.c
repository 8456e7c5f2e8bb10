/* Groups of weights as points of a codebook grid, each choice made in the light of the others.
 *
 * The counterpart of lattice.c where four or eight weights are one point with signs. A unit is what
 * is chosen at once: a group, or the eight weights that have to have an even number of minus signs.
 * Under a diagonal metric the best point and signs of a unit are found exactly, by looking at every
 * point: what it gains is the sum of two halves, each out of a table of the few patterns that halves
 * of points have, and turning one sign round costs least where a half's least term is. The unit's
 * full metric comes in by steps: from what is chosen along the gradient, to the nearest point
 * there, taken where the true loss falls.
 *
 * Rows are in lanes, and every lane performs its own sums in one order, so the codes are the same
 * for every instruction set.
 */
#include "descent.h"
#include "kernels.h"

#include <float.h>

enum { HALF_MAX = QK_PATTERNS_MAX, WIDTH_MAX = 8, SIGNS_SHIFT = 16 };

/* How much longer than the diagonal alone would have it a step's metric is taken to be. */
static const float caution[] = {1.f, 1.5f};

/* What the two halves of a group gain in each of their patterns, and what turning the least
 * important sign of the half round takes away, in the lanes where one has to be. */
struct gains {
    vf sums[2][HALF_MAX];
    vf turns[2][HALF_MAX];
};

QK_INLINE void tabulate(struct gains *gains, const struct qk_points *points, const vf *slope,
                        vi odd, int turning) {
    const int half = points->group / 2;
    for (int h = 0; h < 2; ++h) {
        for (int a = 0; a < points->half_count[h]; ++a) {
            const float *levels = points->halves[h] + a * half;
            vf sum = slope[h * half] * levels[0], least = sum;
            for (int i = 1; i < half; ++i) {
                const vf term = slope[h * half + i] * levels[i];
                sum += term;
                least = vf_min(term, least);
            }
            gains->sums[h][a] = sum;
            if (turning) gains->turns[h][a] = vf_sel(odd, 2.f * least, vf_set1(0));
        }
    }
}

/* The points that are searched: those of one half where there are two that lie apart. */
QK_INLINE int searched(const struct qk_points *points) {
    return points->apart != 0.f ? points->count / 2 : points->count;
}

/* The point of lowest norm - slope * point, the first of equals; in odd lanes with a sign turned. */
QK_INLINE vi search_points(const struct qk_points *points, const float *norms, const vf *slope,
                           vi odd, vf *score) {
    struct gains gains;
    const int turning = vi_any(odd), count = searched(points);
    tabulate(&gains, points, slope, odd, turning);
    vf best = vf_set1(FLT_MAX);
    vi found = {0};
    if (turning) {
        for (int p = 0; p < count; ++p) {
            const int a = points->patterns[2 * p], b = points->patterns[2 * p + 1];
            const vf turn = vf_min(gains.turns[0][a], gains.turns[1][b]);
            const vf value = norms[p] - (gains.sums[0][a] + gains.sums[1][b] - turn);
            const vi better = value < best;
            best = vf_min(value, best);
            found = vi_sel(better, vi_set1(p), found);
        }
    } else {
        for (int p = 0; p < count; ++p) {
            const int a = points->patterns[2 * p], b = points->patterns[2 * p + 1];
            const vf value = norms[p] - (gains.sums[0][a] + gains.sums[1][b]);
            const vi better = value < best;
            best = vf_min(value, best);
            found = vi_sel(better, vi_set1(p), found);
        }
    }
    *score = best;
    return found;
}

/* The levels of each lane's point, without signs. */
QK_INLINE void load_points(const struct qk_points *points, vi index, vf *levels) {
    const int half = points->group / 2;
    for (int lane = 0; lane < QK_LANES; ++lane) {
        const uint8_t *patterns = points->patterns + 2 * index[lane];
        for (int i = 0; i < points->group; ++i) {
            levels[i][lane] = points->halves[i / half][patterns[i / half] * half + i % half];
        }
    }
}

/* The unit nearest to target under the diagonal of metric: its levels with signs, and its codes.
 * Where points lie apart, second says which lanes take the second half's: what is nearest there to a
 * target is nearest in the first half to the target moved back. */
QK_INLINE void nearest_unit(const struct qk_points *points, const float *norms, const float *metric,
                            int stride, vi second, const vf *target, vf *levels, vi *codes) {
    const int group = points->group, groups = points->width / group;
    const vf moved = vf_sel(second, vf_set1(points->apart), vf_set1(0));
    const int signs = points->signs != QK_SIGNS_NONE;
    vf slope[WIDTH_MAX], score[2];
    vi minus[WIDTH_MAX], odd = {0}, turned[2];
    for (int i = 0; i < points->width; ++i) {
        const vf t = target[i] - moved;
        minus[i] = signs ? (vi)(t < 0.f) : vi_set1(0);
        slope[i] = 2.f * metric[i * stride + i] * (signs ? vf_abs(t) : t);
        odd ^= minus[i];
    }
    if (points->signs != QK_SIGNS_EVEN) odd = vi_set1(0);
    if (groups == 1) {
        codes[0] = search_points(points, norms, slope, odd, score);
        turned[0] = odd;
    } else {
        vf cost[2];
        vi other[2];
        for (int k = 0; k < 2; ++k) {
            const float *own = norms + k * points->count;
            codes[k] = search_points(points, own, slope + k * group, vi_set1(0), score);
            turned[k] = vi_set1(0);
            if (!vi_any(odd)) continue;
            other[k] = search_points(points, own, slope + k * group, odd, score + 1);
            cost[k] = score[1] - score[0];
        }
        if (vi_any(odd)) {
            const vi latter = cost[1] < cost[0];
            turned[0] = odd & ~latter;
            turned[1] = odd & latter;
            for (int k = 0; k < 2; ++k) codes[k] = vi_sel(turned[k], other[k], codes[k]);
        }
    }
    for (int k = 0; k < groups; ++k) {
        const int first = k * group;
        codes[k] += second & searched(points);
        load_points(points, codes[k], levels + first);
        if (vi_any(turned[k])) {
            vf least = slope[first] * levels[first];
            vi place = vi_set1(0);
            for (int i = 1; i < group; ++i) {
                const vf term = slope[first + i] * levels[first + i];
                place = vi_sel(term < least, vi_set1(i), place);
                least = vf_min(term, least);
            }
            for (int i = 0; i < group; ++i) {
                minus[first + i] ^= turned[k] & (place == vi_set1(i));
            }
        }
        for (int i = first; i < first + group; ++i) {
            levels[i] = vf_sel(minus[i], -levels[i], levels[i]);
            codes[k] |= minus[i] & (1 << (SIGNS_SHIFT + i - first));
        }
    }
}

/* Steps from a unit's levels along the gradient, both divided by the step; kept where they gain. */
QK_INLINE void improve_unit(const struct qk_points *points, const float *norms,
                            const float *metric, int stride, vi second, vf *gradient, vf *levels,
                            vi *codes) {
    const int width = points->width, groups = width / points->group;
    for (size_t round = 0; round < sizeof caution / sizeof *caution; ++round) {
        vf target[WIDTH_MAX], other[WIDTH_MAX], along[WIDTH_MAX];
        vi other_codes[2];
        for (int i = 0; i < width; ++i) {
            target[i] = levels[i] + gradient[i] / (caution[round] * metric[i * stride + i]);
        }
        nearest_unit(points, norms, metric, stride, second, target, other, other_codes);
        for (int i = 0; i < width; ++i) other[i] -= levels[i];
        vf gain = {0};
        for (int i = 0; i < width; ++i) {
            along[i] = vf_set1(0);
            for (int k = 0; k < width; ++k) along[i] += other[k] * metric[i * stride + k];
            gain += other[i] * (2.f * gradient[i] - along[i]);
        }
        const vi better = gain > 0.f;
        for (int i = 0; i < width; ++i) {
            levels[i] += vf_sel(better, other[i], vf_set1(0));
            gradient[i] -= vf_sel(better, along[i], vf_set1(0));
        }
        for (int k = 0; k < groups; ++k) codes[k] = vi_sel(better, other_codes[k], codes[k]);
    }
}

QK_INLINE void scatter_points(int32_t *codes, const vi *tile, int64_t first, int64_t nrows,
                              int count) {
    for (int i = 0; i < count; ++i) {
        for (int lane = 0; lane < QK_LANES && first + lane < nrows; ++lane) {
            codes[(first + lane) * count + i] = tile[i][lane];
        }
    }
}

/* What feedback works on: a tile of rows, and what belongs to their columns. */
struct feedback {
    const struct qk_points *points;
    const float *factor, *metric, *norms;
    int columns;
    vf x[QK_COLUMNS_MAX], w[QK_COLUMNS_MAX];
};

/* One run of columns under one step: codes and errors, with feedback among them alone. Returns what
 * its columns add to the loss. */
QK_INLINE vf round_run(const struct feedback *tile, int first, int sub, vf step, vi second,
                       vi *codes, vf *errors) {
    const struct qk_points *points = tile->points;
    const int width = points->width, groups = width / points->group, columns = tile->columns;
    vf x[QK_COLUMNS_MAX], loss = {0};
    for (int i = 0; i < sub; ++i) x[i] = tile->x[first + i];
    for (int start = 0; start < sub; start += width) {
        const int unit = (first + start) / width;
        const float *own = tile->metric + (int64_t)unit * width * width;
        const float *norms = tile->norms + (int64_t)unit * groups * points->count;
        const float *factor = tile->factor + (int64_t)(first + start) * columns + first + start;
        const vf *w = tile->w + first + start;
        vf fed[WIDTH_MAX], ratio[WIDTH_MAX], levels[WIDTH_MAX], gradient[WIDTH_MAX];
        vi *chosen = codes + start / width * groups;
        /* Where the unit's own errors are to be made good too, rather than only passed on. */
        for (int i = 0; i < width; ++i) {
            fed[i] = x[start + i] - w[i];
            for (int k = 0; k < i; ++k) fed[i] -= fed[k] * factor[(int64_t)k * columns + i];
            ratio[i] = (w[i] + fed[i]) / step;
        }
        nearest_unit(points, norms, own, width, second, ratio, levels, chosen);
        for (int i = 0; i < width; ++i) {
            gradient[i] = vf_set1(0);
            for (int k = 0; k < width; ++k) {
                gradient[i] += (ratio[k] - levels[k]) * own[i * width + k];
            }
        }
        improve_unit(points, norms, own, width, second, gradient, levels, chosen);
        for (int i = 0; i < width; ++i) {
            loss += step * step * (ratio[i] - levels[i]) * gradient[i];
            errors[start + i] = w[i] - step * levels[i];
        }
        for (int k = 0; k < width; ++k) {
            const float *row = factor + (int64_t)k * columns - start;
            for (int i = start + width; i < sub; ++i) x[i] += errors[start + k] * row[i];
        }
    }
    return loss;
}

void QK_FN(feedback_points)(const struct qk_points *points, int sub, int spread, int most,
                            const float *target, const float *weights, const float *factor,
                            const float *metric, const float *norms, const float *d,
                            int64_t nrows, int columns, float *scales, int32_t *codes,
                            float *errors) {
    const int group = points->group, tries = 2 * spread + 1;
    const int halves = points->apart != 0.f ? 2 : 1;
    struct feedback tile = {.points = points, .factor = factor, .metric = metric, .norms = norms,
                            .columns = columns};
    vi c[QK_COLUMNS_MAX / 4];
    vf runs[QK_COLUMNS_MAX / 4];
    for (int64_t first = 0; first < nrows; first += QK_LANES) {
        const float *lanes[QK_LANES];
        each_lane(lanes, target, first, nrows, columns);
        gather_tile(tile.x, lanes, columns);
        each_lane(lanes, weights, first, nrows, columns);
        gather_tile(tile.w, lanes, columns);
        load_lanes(runs, scales, first, nrows, columns / sub);
        const vf unit = lane_values(d, first, nrows, 1, 0);
        for (int start = 0; start < columns; start += sub) {
            vi *chosen = c + start / group;
            vf found[QK_COLUMNS_MAX];
            const vf middle = runs[start / sub];
            vf least = round_run(&tile, start, sub, unit * middle, vi_set1(0), chosen, found);
            for (int trial = 0; trial < halves * tries; ++trial) {
                const int half = trial / tries, move = trial % tries - spread;
                if (move == 0 && half == 0) continue;
                const vf scale = middle + (float)(2 * move);
                const vi held = ((scale >= 1.f) & (scale <= (float)most)) | vi_set1(-(move == 0));
                if (!vi_any(held)) continue;
                vi other[QK_COLUMNS_MAX / 4];
                vf others[QK_COLUMNS_MAX];
                const vf loss = round_run(&tile, start, sub, unit * scale, vi_set1(-half), other,
                                          others);
                const vi better = held & (loss < least);
                least = vf_sel(better, loss, least);
                runs[start / sub] = vf_sel(better, scale, runs[start / sub]);
                for (int i = 0; i < sub; ++i) found[i] = vf_sel(better, others[i], found[i]);
                for (int k = 0; k < sub / group; ++k) {
                    chosen[k] = vi_sel(better, other[k], chosen[k]);
                }
            }
            for (int k = 0; k < sub; ++k) {
                const float *row = factor + (int64_t)(start + k) * columns;
                tile.w[start + k] = found[k];
                for (int i = start + sub; i < columns; ++i) tile.x[i] += found[k] * row[i];
            }
        }
        store_lanes(scales, runs, first, nrows, columns / sub);
        scatter_points(codes, c, first, nrows, columns / group);
        scatter_tile(errors, tile.w, first, nrows, columns);
    }
}

QK_INLINE void sweep_units(struct tile_state *tile, const struct qk_points *points, int sub,
                           const float *norms, const vf *steps) {
    const int width = points->width, groups = width / points->group, columns = tile->columns;
    for (int unit = 0; unit < columns / width; ++unit) {
        const int start = unit * width, end = start + width;
        const float *own = tile->hessian + (int64_t)start * columns + start;
        const vf step = steps[start / sub];
        const vi lost = step == 0.f;
        vf levels[WIDTH_MAX], gradient[WIDTH_MAX], changes[WIDTH_MAX];
        vi codes[2], changed = {0};
        for (int i = 0; i < width; ++i) {
            levels[i] = tile->levels[start + i];
            gradient[i] = tile->gradient[start + i] / step;
        }
        for (int k = 0; k < groups; ++k) codes[k] = tile->codes[unit * groups + k];
        const vi second = (codes[0] >= searched(points)) & vi_set1(-(points->apart != 0.f));
        improve_unit(points, norms + (int64_t)unit * groups * points->count, own, columns, second,
                     gradient, levels, codes);
        for (int i = 0; i < width; ++i) {
            const vf level = vf_sel(lost, tile->levels[start + i], levels[i]);
            changes[i] = step * level - tile->values[start + i];
            changed |= changes[i] != 0.f;
            tile->levels[start + i] = level;
            tile->values[start + i] = step * level;
        }
        for (int k = 0; k < groups; ++k) {
            vi *code = &tile->codes[unit * groups + k];
            *code = vi_sel(lost, *code, codes[k]);
        }
        if (!vi_any(changed)) continue;
        for (int i = start; i < end; ++i) {
            follow(tile, changes[i - start], tile->hessian + (int64_t)i * columns);
        }
    }
}

void QK_FN(sweep_points)(const struct qk_points *points, const struct qk_lattice *lattice,
                         const float *hessian, const float *norms, const float *gradient,
                         int64_t nrows, int columns, int scales_too, int32_t *codes, float *d,
                         float *scales) {
    const int sub = lattice->sub, subs = columns / sub, group = points->group;
    const int blocks = columns / lattice->block, runs = lattice->block / sub;
    struct tile_state tile;
    tile.hessian = hessian;
    tile.sums = NULL;
    tile.columns = columns;
    vf td[QK_COLUMNS_MAX / 32], ts[QK_COLUMNS_MAX / 16], steps[QK_COLUMNS_MAX / 16];
    for (int64_t first = 0; first < nrows; first += QK_LANES) {
        const float *lanes[QK_LANES];
        each_lane(lanes, gradient, first, nrows, columns);
        gather_tile(tile.gradient, lanes, columns);
        load_lanes(td, d, first, nrows, blocks);
        load_lanes(ts, scales, first, nrows, subs);
        for (int s = 0; s < subs; ++s) steps[s] = td[s / runs] * ts[s];
        for (int k = 0; k < columns / group; ++k) {
            for (int lane = 0; lane < QK_LANES; ++lane) {
                const int64_t row = first + lane < nrows ? first + lane : nrows - 1;
                tile.codes[k][lane] = codes[row * (columns / group) + k];
            }
            load_points(points, tile.codes[k] & ((1 << SIGNS_SHIFT) - 1), tile.levels + k * group);
            for (int i = 0; i < group; ++i) {
                const vi minus = -(tile.codes[k] >> (SIGNS_SHIFT + i) & 1);
                vf *level = &tile.levels[k * group + i];
                *level = vf_sel(minus, -*level, *level);
                tile.values[k * group + i] = steps[k * group / sub] * *level;
            }
        }
        sweep_units(&tile, points, sub, norms, steps);
        if (scales_too) {
            sweep_scales(&tile, lattice, td, NULL, ts, NULL);
            for (int block = 0; block < blocks; ++block) {
                fit_block(&tile, lattice, block, td + block, NULL, ts, NULL);
            }
            store_lanes(d, td, first, nrows, blocks);
            store_lanes(scales, ts, first, nrows, subs);
        }
        scatter_points(codes, tile.codes, first, nrows, columns / group);
    }
}
