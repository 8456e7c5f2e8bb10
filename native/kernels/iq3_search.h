/* The search of IQ3_XXS and IQ3_S: a sub-block's scale, and a grid point for every four weights.
 *
 * 31 (IQ3_XXS) or 19 (IQ3_S) scales are tried and the one is kept that maximises
 * (sum w x q)^2 / sum w q^2, with w = x^2, or importance * sqrt(sigma2 + x^2); then the points are
 * looked up once more under the scale that fits best. Trials are in lanes throughout: rounding to
 * levels, the walk along a list of neighbours where the levels are not on the grid, and the sums,
 * each in the reference's order. Neighbouring trials mostly round alike, so that one walk serves a
 * whole run of them, and only the neighbours that can win are visited (struct qk_near).
 *
 * Where distances overflow float32, ggml aborts the process; here the scale becomes NaN, which
 * makes the super-block's scale NaN, and that is refused before anything is written.
 */
#ifndef QUANTCLI_IQ3_SEARCH_H
#define QUANTCLI_IQ3_SEARCH_H

#include "../grids.h"
#include "codebook.h"
#include "lookup.h"

#include <float.h>

enum { SUPER = 256, BLOCK = 32, NBLOCKS = SUPER / BLOCK, GROUPS = BLOCK / 4, LEVELS = 8 };

/* Trials, and the rest of a vector that begins at the last of them. Rows of 256 bytes, so that a
 * neighbour's level times 32 is the offset of its row in units of 8 bytes. */
enum { ROW = 64 };

struct variant {
    int type, nbytes;
    int half;           /* trials -half to half, each 0.2 levels further */
    float empty_below;  /* a sub-block whose maximum is smaller stays empty */
    float fudge;        /* on the super-block's scale, for what the later rounding loses */
    int even_signs;     /* room for an even number of minus signs per eight weights only */
    int search_all;     /* the last pass takes every group, not only those off the grid */
};

/* A sub-block: magnitudes, weights, their roots; minus signs, one point for each group of four as
 * a word (levels times 32, a byte each), and the scale. */
struct block {
    float x[BLOCK], w[BLOCK], root[BLOCK], max, scale;
    uint8_t signs[4];
    int32_t words[GROUPS];
    int empty; /* nothing to code */
};

/* Per trial: inverse scales and scale * level; for each group the rounded levels as a code of the
 * grid, which trials lie clear of all cells' edges, which were off the grid, and the points. */
struct trials {
    float inverses[ROW], steps[LEVELS][ROW];
    int32_t codes[GROUPS][ROW], words[GROUPS][ROW];
    uint32_t clear[GROUPS], off[GROUPS];
    int lost; /* a group has no neighbour at a finite distance */
} __attribute__((aligned(64)));

static const float odd[LEVELS] = {1, 3, 5, 7, 9, 11, 13, 15};

QK_INLINE int32_t word_of(int32_t code) {
    return (int32_t)((uint32_t)(code & 7) << 5 | (uint32_t)(code & 070) << 10
                   | (uint32_t)(code & 0700) << 15 | (uint32_t)(code & 07000) << 20);
}
QK_INLINE int32_t code_of(int32_t word) {
    const uint32_t bits = (uint32_t)word;
    return (int32_t)((bits >> 5 & 7) | (bits >> 10 & 070) | (bits >> 15 & 0700)
                   | (bits >> 20 & 07000));
}

/* The levels of four weights under each trial's inverse scale, as codes. */
QK_INLINE void round_group(const float *x, int k, int count, struct trials *trials) {
    trials->clear[k] = 0;
    for (int t = 0; t < count; t += QK_LANES) {
        const vf inverse = vf_load(trials->inverses + t);
        vi code = {0}, clear = vi_set1(-1);
        for (int i = 0; i < 4; ++i) {
            const vf value = 0.5f * (inverse * x[i] - 1.0f);
            const vi level = vi_max(vi_set1(0), vi_min(vi_set1(LEVELS - 1), vi_nearest(value)));
            /* NaN stays NaN, and where rounding wraps around, the level is another one. */
            const vf inside = vf_min(vf_set1(LEVELS - 1), vf_max(vf_set1(0), value));
            clear &= vf_abs(inside - vf_from(level)) < 0.5f - EDGE;
            code |= level << (3 * i);
        }
        vi_store(trials->codes[k] + t, code);
        trials->clear[k] |= vi_bits(clear) << t;
    }
}

/* The nearest of count points, the first of equals, for trials t and up; lanes without any at a
 * finite distance are set in *lost. */
QK_INLINE vi nearest_point(const float *x, const float *root, const struct trials *trials, int t,
                           const uint8_t *point, int count, uint32_t *lost) {
    const float *steps = trials->steps[0] + t;
    vf best = vf_set1(FLT_MAX);
    vi winner = {0};
    for (int j = 0; j < count; ++j, point += 4) {
        int32_t word;
        memcpy(&word, point, sizeof word);
        const vf off0 = vf_load(steps + point[0] * (ROW / 32)) - x[0];
        const vf off1 = vf_load(steps + point[1] * (ROW / 32)) - x[1];
        const vf off2 = vf_load(steps + point[2] * (ROW / 32)) - x[2];
        const vf off3 = vf_load(steps + point[3] * (ROW / 32)) - x[3];
        const vf distance = root[0] * off0 * off0 + root[1] * off1 * off1
                          + root[2] * off2 * off2 + root[3] * off3 * off3;
        const vi closer = distance < best;
        best = vf_sel(closer, distance, best);
        winner = vi_sel(closer, vi_set1(word), winner);
    }
    *lost = vi_bits(best == FLT_MAX);
    return winner;
}

/* The points of group k: consecutive trials that round alike are placed at once. What a vector
 * writes beyond its run is overwritten by the next run. */
QK_INLINE void place_group(const struct qk_grid *grid, const struct block *block, int k, int count,
                           struct trials *trials) {
    const float *x = block->x + 4 * k, *root = block->root + 4 * k;
    const int32_t *codes = trials->codes[k];
    int32_t *words = trials->words[k];
    uint32_t last = 0; /* trials that end a run */
    trials->off[k] = 0;
    for (int t = 0; t < count; t += QK_LANES) {
        last |= vi_bits(vi_load(codes + t) != vi_load(codes + t + 1)) << t;
    }
    last |= 1u << (count - 1);
    for (int start = 0, stop; start < count; start = stop) {
        stop = start + __builtin_ctz(last >> start) + 1;
        const int32_t code = codes[start], slot = grid->slots[code];
        if (slot >= 0) {
            for (int t = start; t < stop; t += QK_LANES) vi_store(words + t, vi_set1(word_of(code)));
            continue;
        }
        const uint32_t run = (uint32_t)((UINT64_C(1) << stop) - (UINT64_C(1) << start));
        const struct qk_near list = grid->lists[~slot];
        const int any = (run & ~trials->clear[k]) != 0;
        const uint8_t *near = qk_near_point(grid, list.first + (any ? list.kept : 0));
        for (int t = start; t < stop; t += QK_LANES) {
            uint32_t lost;
            const vi found = nearest_point(x, root, trials, t, near, any ? list.all : list.kept,
                                           &lost);
            vi_store(words + t, found);
            trials->lost |= ((uint64_t)lost << t & run) != 0;
        }
        trials->off[k] |= run;
    }
}

/* sum w x q and sum w q^2 over the sub-block, for trials t and up. */
QK_INLINE void sum_groups(const struct block *block, const struct trials *trials, int t, vf *sumqx,
                          vf *sumq2) {
    const vt8 table = vt8_load(odd);
    vf qx = {0}, q2 = {0};
    for (int k = 0; k < GROUPS; ++k) {
        const vi word = vi_load(trials->words[k] + t);
        for (int i = 0; i < 4; ++i) {
            const float w = block->w[4 * k + i];
            const vf q = vt8_at(table, word >> (8 * i + 5));
            qx += w * block->x[4 * k + i] * q;
            q2 += w * q * q;
        }
    }
    *sumqx = qx;
    *sumq2 = q2;
}

/* The points once more under the chosen scale, and the scale that fits them best. */
QK_INLINE void refine(const struct variant *v, const struct qk_grid *grid, uint32_t groups,
                      struct block *block, struct trials *trials) {
    vf sumqx, sumq2;
    vf_store(trials->inverses, vf_set1(1 / block->scale));
    for (int i = 0; i < LEVELS; ++i) vf_store(trials->steps[i], vf_set1(block->scale * odd[i]));
    for (int k = 0; k < GROUPS; ++k) {
        if (v->search_all || groups >> k & 1) {
            round_group(block->x + 4 * k, k, 1, trials);
            place_group(grid, block, k, 1, trials);
            block->words[k] = trials->words[k][0];
        }
        vi_store(trials->words[k], vi_set1(block->words[k]));
    }
    sum_groups(block, trials, 0, &sumqx, &sumq2);
    if (sumq2[0] > 0) block->scale = sumqx[0] / sumq2[0];
}

QK_INLINE void search_block(const struct variant *v, const struct qk_grid *grid,
                            struct block *block, struct trials *trials) {
    const int count = 2 * v->half + 1;
    float sumqx[ROW], sumq2[ROW], best = 0;
    trials->lost = 0;
    for (int t = 0; t < count; ++t) {
        trials->inverses[t] = (15 + (float)(t - v->half) * 0.2f) / block->max;
    }
    for (int t = 0; t < count; t += QK_LANES) {
        const vf scale = 1.0f / vf_load(trials->inverses + t);
        for (int i = 0; i < LEVELS; ++i) vf_store(trials->steps[i] + t, scale * odd[i]);
    }
    /* One loop after the other, so that codes are read long after they were written. */
    for (int k = 0; k < GROUPS; ++k) round_group(block->x + 4 * k, k, count, trials);
    for (int k = 0; k < GROUPS; ++k) place_group(grid, block, k, count, trials);
    for (int t = 0; t < count; t += QK_LANES) {
        vf qx, q2;
        sum_groups(block, trials, t, &qx, &q2);
        vf_store(sumqx + t, qx);
        vf_store(sumq2 + t, q2);
    }
    int chosen = -1;
    block->scale = block->max / 15;
    for (int t = 0; t < count; ++t) {
        if (sumq2[t] > 0 && sumqx[t] * sumqx[t] > best * sumq2[t]) {
            block->scale = sumqx[t] / sumq2[t];
            best = block->scale * sumqx[t];
            chosen = t;
        }
    }
    uint32_t again = chosen < 0 && v->search_all;
    for (int k = 0; k < GROUPS; ++k) {
        block->words[k] = chosen < 0 ? 0 : trials->words[k][chosen];
        if (chosen >= 0) again |= (trials->off[k] >> chosen & 1) << k;
    }
    if (again && block->scale > 0) refine(v, grid, again, block, trials);
    if (block->scale < 0) {
        block->scale = -block->scale;
        for (int k = 0; k < 4; ++k) block->signs[k] = (uint8_t)~block->signs[k];
    }
    if (trials->lost) block->scale = NAN;
}

/* The sub-blocks of a super-block; returns the largest scale, NaN if there is one among them. */
QK_INLINE float search_super(const struct variant *v, const struct qk_grid *grid, const float *x,
                             const float *importance, struct block *blocks,
                             struct trials *trials) {
    float sumx2 = 0, largest = 0;
    for (int i = 0; i < SUPER && importance != NULL; ++i) sumx2 += x[i] * x[i];
    for (int b = 0; b < NBLOCKS; ++b, x += BLOCK) {
        struct block *block = &blocks[b];
        for (int i = 0; i < BLOCK; i += QK_LANES) {
            vf w = vf_load(x + i) * vf_load(x + i);
            if (importance != NULL) {
                w = vf_load(importance + BLOCK * b + i) * vf_sqrt(2 * sumx2 / SUPER + w);
            }
            vf_store(block->w + i, w);
            vf_store(block->root + i, vf_sqrt(w));
        }
        block->max = take_signs(x, block->w, BLOCK, v->even_signs, block->x, block->signs);
        block->empty = block->max < v->empty_below;
        block->scale = 0;
        if (!block->empty) search_block(v, grid, block, trials);
        if (isnan(block->scale) || block->scale > largest) largest = block->scale;
    }
    return largest;
}

#endif
