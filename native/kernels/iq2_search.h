/* The search of IQ2_XXS, IQ2_XS and IQ2_S: a block's scale, and a grid point for every eight weights.
 *
 * 13 (IQ2_XXS) or 19 scales are tried and the one is kept that maximises
 * (sum w x q)^2 / sum w q^2, with w = importance * sqrt(sigma2 + x^2), or sigma2 / 4 + x^2; then
 * points that were off the grid (IQ2_XXS: all) are looked up once more under the scale that fits
 * best. Rounding to levels and the sums have trials in lanes, the walk along a list of neighbours
 * has neighbours in lanes (nearest.h), each in the reference's order.
 *
 * Where distances overflow float32, ggml aborts the process; here the scale becomes NaN, which
 * makes the super-block's scale NaN, and that is refused before anything is written.
 */
#ifndef QUANTCLI_IQ2_SEARCH_H
#define QUANTCLI_IQ2_SEARCH_H

#include "nearest.h"
#include "search_sweeps.h"
#include "superblock.h"

enum { MOST = 32, MOST_BLOCKS = 16, ROW = 32 }; /* weights, blocks, trials and the last vector */

struct variant {
    int type, nbytes;
    int block;          /* weights with a scale of their own */
    int half;           /* trials -half to half, each 0.1 levels further */
    int spread;         /* sigma2 is the mean square times this */
    float empty_below;  /* a block whose maximum is smaller stays empty */
    float fudge;        /* on the super-block's scale, for what the later rounding loses */
    int even_signs;     /* room for an even number of minus signs per eight weights only */
    int fit_first;      /* trials start from a fitted maximum; the last pass takes every group */
};

/* Magnitudes, weights, their roots; minus signs and a code for each group of eight. */
struct block {
    float x[MOST], w[MOST], root[MOST], max, scale;
    uint8_t signs[MOST / 8];
    uint16_t codes[MOST / 8];
    int empty; /* nothing to code */
};

/* Per trial: inverse and scale; for each group the code, then that of its point on the grid. */
struct search {
    float inverses[ROW], scales[ROW];
    int32_t codes[MOST / 8][ROW];
    uint32_t clear[MOST / 8], off[MOST / 8]; /* a bit for each trial */
    int lost;                                /* a group has no neighbour at a finite distance */
} __attribute__((aligned(64)));

static const float odd[4] = {1, 3, 5, 5};

/* The levels of eight weights under each trial's inverse scale, as codes. */
QK_INLINE void round_group(const float *x, int k, int count, struct search *search) {
    search->clear[k] = 0;
    for (int t = 0; t < count; t += QK_LANES) {
        const vf inverse = vf_load(search->inverses + t);
        vi code = {0}, clear = vi_set1(-1);
        for (int i = 0; i < 8; ++i) {
            const vf value = 0.5f * (inverse * x[i] - 1.0f);
            const vi level = vi_max(vi_set1(0), vi_min(vi_set1(2), vi_nearest(value)));
            /* NaN stays NaN, and where rounding wraps around, the level is another one. */
            const vf inside = vf_min(vf_set1(2), vf_max(vf_set1(0), value));
            clear &= vf_abs(inside - vf_from(level)) < 0.5f - EDGE;
            code |= level << (2 * i);
        }
        vi_store(search->codes[k] + t, code);
        search->clear[k] |= vi_bits(clear) << t;
    }
}

QK_INLINE void place_group(const struct qk_grid *grid, const struct block *block, int k, int count,
                           struct search *search) {
    const vf levels = repeat_levels(odd);
    struct eight eight;
    spread_eight(block->x + 8 * k, block->root + 8 * k, &eight);
    search->off[k] = 0;
    for (int t = 0; t < count; ++t) {
        const int code = search->codes[k][t];
        const int placed = place_code(grid, code, &eight, levels, search->scales[t],
                                      search->clear[k] >> t & 1);
        search->off[k] |= (uint32_t)(grid->slots[code] < 0) << t;
        search->lost |= placed == NOWHERE;
        search->codes[k][t] = placed == NOWHERE ? 0 : placed;
    }
}

/* sum w x q and sum w q^2 over the block, for trials t and up. */
QK_INLINE void sum_block(const struct variant *v, const struct block *block,
                         const struct search *search, int t, vf *sumqx, vf *sumq2) {
    vf qx = {0}, q2 = {0};
    for (int k = 0; k < v->block / 8; ++k) {
        vi code = vi_load(search->codes[k] + t);
        for (int i = 8 * k; i < 8 * k + 8; ++i) {
            const vf q = vf_table4(odd, code);
            qx += block->w[i] * block->x[i] * q;
            q2 += block->w[i] * q * q;
            code >>= 2;
        }
    }
    *sumqx = qx;
    *sumq2 = q2;
}

/* The points of some groups once more under the chosen scale, and the scale that fits them best. */
QK_INLINE void refine(const struct variant *v, const struct qk_grid *grid, uint32_t groups,
                      struct block *block, struct search *search) {
    vf sumqx, sumq2;
    vf_store(search->inverses, vf_set1(1 / block->scale));
    search->scales[0] = block->scale;
    for (int k = 0; k < v->block / 8; ++k) {
        if (groups >> k & 1) {
            round_group(block->x + 8 * k, k, 1, search);
            place_group(grid, block, k, 1, search);
            block->codes[k] = (uint16_t)search->codes[k][0];
        }
        vi_store(search->codes[k], vi_set1(block->codes[k]));
    }
    sum_block(v, block, search, 0, &sumqx, &sumq2);
    if (sumq2[0] > 0) block->scale = sumqx[0] / sumq2[0];
}

/* block->scale is what remains when no trial is any good; the trials divide the maximum, top. */
QK_INLINE void search_block(const struct variant *v, const struct qk_grid *grid, float top,
                            struct block *block, struct search *search) {
    const int count = 2 * v->half + 1;
    float sumqx[ROW], sumq2[ROW], best = 0;
    search->lost = 0;
    for (int t = 0; t < count; ++t) {
        search->inverses[t] = (5 + (float)(t - v->half) * 0.1f) / top;
    }
    for (int t = 0; t < count; t += QK_LANES) {
        vf_store(search->scales + t, 1.0f / vf_load(search->inverses + t));
    }
    /* One loop after the other, so that codes are read long after they were written. */
    for (int k = 0; k < v->block / 8; ++k) round_group(block->x + 8 * k, k, count, search);
    for (int k = 0; k < v->block / 8; ++k) place_group(grid, block, k, count, search);
    for (int t = 0; t < count; t += QK_LANES) {
        vf qx, q2;
        sum_block(v, block, search, t, &qx, &q2);
        vf_store(sumqx + t, qx);
        vf_store(sumq2 + t, q2);
    }
    int chosen = -1;
    for (int t = 0; t < count; ++t) {
        if (sumq2[t] > 0 && sumqx[t] * sumqx[t] > best * sumq2[t]) {
            block->scale = sumqx[t] / sumq2[t];
            best = block->scale * sumqx[t];
            chosen = t;
        }
    }
    uint32_t again = v->fit_first ? UINT32_MAX : 0;
    for (int k = 0; k < v->block / 8; ++k) {
        block->codes[k] = (uint16_t)(chosen < 0 ? 0 : search->codes[k][chosen]);
        if (chosen >= 0) again |= (search->off[k] >> chosen & 1) << k;
    }
    if (again && block->scale > 0) refine(v, grid, again, block, search);
    if (block->scale < 0) {
        block->scale = -block->scale;
        for (int k = 0; k < v->block / 8; ++k) block->signs[k] = (uint8_t)~block->signs[k];
    }
    if (search->lost) block->scale = NAN;
}

/* Scales fitted without regard to the grid, codes up to 4, blocks in lanes. */
QK_INLINE void fit_blocks(const struct variant *v, int nblocks, struct block *blocks) {
    static const float zeros[MOST];
    for (int b = 0; b < nblocks; b += QK_LANES) {
        const float *xs[QK_LANES], *ws[QK_LANES];
        vf x[MOST], w[MOST];
        vi codes[MOST];
        for (int lane = 0; lane < QK_LANES; ++lane) {
            xs[lane] = b + lane < nblocks ? blocks[b + lane].x : zeros;
            ws[lane] = b + lane < nblocks ? blocks[b + lane].w : zeros;
        }
        gather_tile(x, xs, v->block);
        gather_tile(w, ws, v->block);
        const vf scale = fit_positive(x, w, v->block, 4, codes);
        for (int lane = 0; lane < QK_LANES && b + lane < nblocks; ++lane) {
            blocks[b + lane].scale = scale[lane];
        }
    }
}

/* The blocks of a super-block; returns the largest scale, NaN if there is one among them. */
QK_INLINE float search_super(const struct variant *v, const struct qk_grid *grid, const float *x,
                             const float *importance, struct block *blocks,
                             struct search *search) {
    const int nblocks = SUPER / v->block;
    float sumx2 = 0, largest = 0;
    for (int i = 0; i < SUPER; ++i) sumx2 += x[i] * x[i];
    const float sigma2 = (float)v->spread * sumx2 / SUPER;
    for (int b = 0; b < nblocks; ++b, x += v->block) {
        struct block *block = &blocks[b];
        for (int i = 0; i < v->block; i += QK_LANES) {
            vf w = vf_load(x + i) * vf_load(x + i);
            if (importance != NULL) {
                w = vf_load(importance + v->block * b + i) * vf_sqrt(sigma2 + w);
            } else {
                w = 0.25f * sigma2 + w;
            }
            vf_store(block->w + i, w);
            vf_store(block->root + i, vf_sqrt(w));
        }
        block->max = take_signs(x, block->w, v->block, v->even_signs, block->x, block->signs);
        block->empty = block->max < v->empty_below;
        block->scale = block->max / 5;
    }
    if (v->fit_first) fit_blocks(v, nblocks, blocks);
    for (int b = 0; b < nblocks; ++b) {
        struct block *block = &blocks[b];
        const float top = v->fit_first ? 3 * block->scale : block->max;
        if (v->fit_first) block->empty |= top <= 0;
        if (block->empty) block->scale = 0;
        else search_block(v, grid, top, block, search);
        if (isnan(block->scale) || block->scale > largest) largest = block->scale;
    }
    return largest;
}

#endif
