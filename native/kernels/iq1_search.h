/* The searches of IQ1_S and IQ1_M: a block's scale and shift, and its weights split in three.
 *
 * A level is worth -1, 0 or 1, plus a shift of an eighth up or down. All ways to split the sorted
 * weights in three are compared by (sum w x q)^2 / sum w q^2, w = importance * sqrt(sigma2 + x^2),
 * from running sums. Each lane works on a super-block of its own; a branch of the reference is a
 * lane mask. The reference sorts with qsort, and glibc's is a merge sort: equal weights stay in
 * order, and so they do here. Points near codes off the grid are then found lane by lane, as the
 * neighbours fill the lanes (nearest.h).
 *
 * Where distances overflow float32, ggml reads beyond its arrays or aborts; here the scale becomes
 * NaN, which is refused before anything is written.
 */
#ifndef QUANTCLI_IQ1_SEARCH_H
#define QUANTCLI_IQ1_SEARCH_H

#include "nearest.h"
#include "superblock.h"

#define SHIFT 0.125f

enum { MOST = 32 };

/* Weights in ascending order with their importance and their places in the block. */
struct sorted {
    vf x[MOST], w[MOST];
    vi place[MOST];
};

QK_INLINE void order_pair(struct sorted *s, int a, int b) {
    const vf xa = s->x[a], xb = s->x[b], wa = s->w[a], wb = s->w[b];
    const vi pa = s->place[a], pb = s->place[b];
    const vi swap = (xa > xb) | ((xa == xb) & (pa > pb));
    s->x[a] = vf_sel(swap, xb, xa);
    s->x[b] = vf_sel(swap, xa, xb);
    s->w[a] = vf_sel(swap, wb, wa);
    s->w[b] = vf_sel(swap, wa, wb);
    s->place[a] = vi_sel(swap, pb, pa);
    s->place[b] = vi_sel(swap, pa, pb);
}

/* Batcher's network: odd-even merges of ever longer runs. */
QK_INLINE void sort_lanes(const vf *x, const vf *w, const int n, struct sorted *s) {
    for (int i = 0; i < n; ++i) {
        s->x[i] = x[i];
        s->w[i] = w[i];
        s->place[i] = vi_set1(i);
    }
    for (int run = 1; run < n; run *= 2) {
        for (int gap = run; gap >= 1; gap /= 2) {
            for (int from = gap % run; from + gap < n; from += 2 * gap) {
                for (int i = from; i < from + gap && i + gap < n; ++i) {
                    if (i / (2 * run) == (i + gap) / (2 * run)) order_pair(s, i, i + gap);
                }
            }
        }
    }
}

/* The best split so far: ends of the low and of the middle part, and which shift. */
struct split {
    vf scale, best;
    vi low, middle, shift;
};

QK_INLINE void try_split(vi better, vf sumqx, vf sumq2, int low, int middle, int shift,
                         struct split *split) {
    const vf scale = sumqx / sumq2;
    split->scale = vf_sel(better, scale, split->scale);
    split->best = vf_sel(better, scale * sumqx, split->best);
    split->low = vi_sel(better, vi_set1(low), split->low);
    split->middle = vi_sel(better, vi_set1(middle), split->middle);
    split->shift = vi_sel(better, vi_set1(shift), split->shift);
}

QK_INLINE vi is_better(const struct split *split, vf sumqx, vf sumq2) {
    return (sumq2 > 0.f) & (sumqx * sumqx > split->best * sumq2);
}

/* n weights with one shift: 0 up, 1 down. */
QK_INLINE void split_whole(const struct sorted *s, const int n, struct split *split) {
    const float up = 1 + SHIFT, down = 1 - SHIFT;
    vf sumx[MOST + 1], sumw[MOST + 1], high[2][MOST + 1], high2[2][MOST + 1];
    sumx[0] = sumw[0] = (vf){0};
    for (int i = 0; i < n; ++i) {
        sumx[i + 1] = sumx[i] + s->w[i] * s->x[i];
        sumw[i + 1] = sumw[i] + s->w[i];
    }
    for (int i = 0; i <= n; ++i) {
        const vf x = sumx[n] - sumx[i], w = sumw[n] - sumw[i];
        high[0][i] = x * up;
        high[1][i] = x * down;
        high2[0][i] = w * up * up;
        high2[1][i] = w * down * down;
    }
    for (int low = 0; low <= n; ++low) {
        const vf low_up = sumx[low] * -down, low_down = sumx[low] * -up;
        const vf low2_up = sumw[low] * down * down, low2_down = sumw[low] * up * up;
        for (int i = low; i <= n; ++i) {
            const vf mid = (sumx[i] - sumx[low]) * SHIFT;
            const vf mid2 = (sumw[i] - sumw[low]) * SHIFT * SHIFT;
            const vf qx_up = low_up + mid + high[0][i], q2_up = low2_up + mid2 + high2[0][i];
            const vf qx_down = low_down - mid + high[1][i];
            const vf q2_down = low2_down + mid2 + high2[1][i];
            const vi better = is_better(split, qx_up, q2_up);
            if (!vi_any(better | is_better(split, qx_down, q2_down))) continue;
            try_split(better, qx_up, q2_up, low, i, 0, split);
            try_split(is_better(split, qx_down, q2_down), qx_down, q2_down, low, i, 1, split);
        }
    }
}

/* n weights whose halves have shifts of their own: 0 up up, 1 up down, 2 down up, 3 down down. */
QK_INLINE void split_halves(const struct sorted *s, const int n, struct split *split) {
    const float up = 1 + SHIFT, down = 1 - SHIFT, middle = SHIFT;
    const float up_low = down * down - middle * middle, up_high = middle * middle - up * up;
    const float down_low = up * up - middle * middle, down_high = middle * middle - down * down;
    vf sumx[2][MOST + 1], high_up[2][MOST + 1], high_down[2][MOST + 1], sumw[2][MOST + 1];
    for (int h = 0; h < 2; ++h) {
        sumx[h][0] = sumw[h][0] = (vf){0};
        for (int i = 0; i < n; ++i) {
            const vi mine = h == 0 ? s->place[i] < n / 2 : s->place[i] >= n / 2;
            const vf x = sumx[h][i], w = sumw[h][i];
            sumx[h][i + 1] = vf_sel(mine, x + s->w[i] * s->x[i], x);
            sumw[h][i + 1] = vf_sel(mine, w + s->w[i], w);
        }
        for (int i = 0; i <= n; ++i) {
            high_up[h][i] = sumw[h][i] * up_high;
            high_down[h][i] = sumw[h][i] * down_high;
        }
    }
    vf all_up[2], all_down[2], all2_up[2], all2_down[2];
    for (int h = 0; h < 2; ++h) {
        all_up[h] = sumx[h][n] * up;
        all_down[h] = sumx[h][n] * down;
        all2_up[h] = sumw[h][n] * up * up;
        all2_down[h] = sumw[h][n] * down * down;
    }
    for (int low = 0; low <= n; ++low) {
        vf low_up[2], low_down[2];
        for (int h = 0; h < 2; ++h) {
            low_up[h] = all2_up[h] + sumw[h][low] * up_low;
            low_down[h] = all2_down[h] + sumw[h][low] * down_low;
        }
        for (int i = low; i <= n; ++i) {
            vf x_up[2], x_down[2], w_up[2], w_down[2], qx[4], q2[4];
            for (int h = 0; h < 2; ++h) {
                const vf x = sumx[h][low] + sumx[h][i];
                x_up[h] = all_up[h] - x;
                x_down[h] = all_down[h] - x;
                w_up[h] = low_up[h] + high_up[h][i];
                w_down[h] = low_down[h] + high_down[h][i];
            }
            vi any = {0};
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                qx[k] = (k < 2 ? x_up[0] : x_down[0]) + (k % 2 == 0 ? x_up[1] : x_down[1]);
                q2[k] = (k < 2 ? w_up[0] : w_down[0]) + (k % 2 == 0 ? w_up[1] : w_down[1]);
                any |= is_better(split, qx[k], q2[k]);
            }
            if (!vi_any(any)) continue;
            for (int k = 0; k < 4; ++k) {
                try_split(is_better(split, qx[k], q2[k]), qx[k], q2[k], low, i, k, split);
            }
        }
    }
}

/* A block of each lane: shift, scale, and per eight weights the code of a grid point. */
struct block {
    vi found; /* something to code */
    vi shift;
    vf scale;
    vi codes[MOST / 8];
};

/* Half h of the block has its levels shifted down. */
QK_INLINE int is_down(int halves, int shift, int h) {
    return halves ? shift >> (1 - h) & 1 : shift;
}
QK_INLINE vi are_down(int halves, vi shift, int h) {
    return halves ? (shift >> (1 - h) & 1) != 0 : shift != 0;
}

/* All levels of a lane's block, two bits each, from the places of its split. */
QK_INLINE uint64_t lane_levels(const struct sorted *s, const int n, int lane, int low,
                               int middle) {
    uint64_t levels = 0;
    for (int i = 0; i < n; ++i) {
        const int place = ((const int32_t *)&s->place[i])[lane];
        levels |= (uint64_t)((i >= low) + (i >= middle)) << (2 * place);
    }
    return levels;
}

/* Levels of the k-th group of a lane's block, and the nearest point. *off: it was off the grid. */
QK_INLINE int place_lane(const struct qk_grid *grid, const vf *x, const vf *w, int lane, int code,
                         float scale, int down, int32_t *off) {
    if (grid->slots[code] >= 0) return code;
    *off = -1;
    const float shift = down ? -SHIFT : SHIFT;
    const float levels[4] = {-1 + shift, shift, 1 + shift, 1 + shift};
    float xs[8], ws[8];
    int clear = 1;
    for (int i = 0; i < 8; ++i) {
        xs[i] = ((const float *)&x[i])[lane];
        ws[i] = ((const float *)&w[i])[lane];
        const float value = xs[i] / scale - levels[1] + 1;
        const float inside = value < 0 ? 0 : value > 2 ? 2 : value;
        clear &= fabsf(inside - (float)(code >> (2 * i) & 3)) < 0.5f - EDGE;
    }
    struct eight eight;
    spread_eight(xs, ws, &eight);
    return place_code(grid, code, &eight, repeat_levels(levels), scale, clear);
}

/* What a level is worth. */
QK_INLINE vf level_worth(vi code, vi down) {
    return vf_from((code & 3) - 1) + vf_sel(down, vf_set1(-SHIFT), vf_set1(SHIFT));
}

/* The block of n weights of each lane; halves: with a shift for each half. */
QK_INLINE void search_block(const struct qk_grid *grid, const vf *x, const vf *w, const int n,
                            const int halves, float empty_below, struct block *block) {
    struct sorted sorted;
    vf max = vf_abs(x[0]);
    for (int i = 1; i < n; ++i) max = vf_max(max, vf_abs(x[i]));
    sort_lanes(x, w, n, &sorted);
    struct split split = {.scale = max, .best = vf_set1(-FLT_MAX), .low = vi_set1(-1)};
    if (halves) split_halves(&sorted, n, &split);
    else split_whole(&sorted, n, &split);

    block->found = (split.low >= 0) & ~(max < empty_below);
    const vi turned = split.scale < 0.f;
    block->scale = vf_sel(turned, -split.scale, split.scale);
    block->shift = vi_sel(turned, (halves ? 3 : 1) - split.shift, split.shift);
    vi off = {0}, lost = {0};
    for (int k = 0; k < n / 8; ++k) block->codes[k] = (vi){0};
    for (int lane = 0; lane < QK_LANES; ++lane) {
        if (!((const int32_t *)&block->found)[lane]) continue;
        uint64_t levels = lane_levels(&sorted, n, lane, split.low[lane], split.middle[lane]);
        if (turned[lane]) levels = UINT64_C(0xaaaaaaaaaaaaaaaa) - levels;
        const int shift = block->shift[lane];
        int32_t any = 0;
        for (int k = 0; k < n / 8; ++k) {
            const int code = place_lane(grid, x + 8 * k, w + 8 * k, lane,
                                        (int)(levels >> (16 * k) & 0xffff), block->scale[lane],
                                        is_down(halves, shift, k), &any);
            ((int32_t *)&block->codes[k])[lane] = code == NOWHERE ? 0 : code;
            if (code == NOWHERE) lost[lane] = -1;
        }
        off[lane] = any;
    }
    if (vi_any(off)) {
        vf sumqx = {0}, sumq2 = {0};
        for (int k = 0; k < n / 8; ++k) {
            const vi down = are_down(halves, block->shift, k);
            for (int i = 0; i < 8; ++i) {
                const vf q = level_worth(block->codes[k] >> (2 * i), down);
                sumqx += w[8 * k + i] * q * x[8 * k + i];
                sumq2 += w[8 * k + i] * q * q;
            }
        }
        const vi fits = off & (sumqx > 0.f) & (sumq2 > 0.f);
        block->scale = vf_sel(fits, sumqx / sumq2, block->scale);
    }
    block->scale = vf_sel(lost, vf_set1(NAN), block->scale);
    block->scale = vf_sel(block->found, block->scale, vf_set1(0));
    block->shift &= block->found;
}

/* The search's weights in place of each lane's importance. */
QK_INLINE void weigh(const vf *x, vf *w, int weighted) {
    vf sumx2 = {0};
    for (int i = 0; i < SUPER; ++i) sumx2 += x[i] * x[i];
    const vf sigma2 = 2 * sumx2 / SUPER;
    for (int i = 0; i < SUPER; ++i) {
        w[i] = weighted ? w[i] * vf_sqrt(sigma2 + x[i] * x[i]) : x[i] * x[i];
    }
}

/* The three bits l of a block's scale (2l + 1) d. */
QK_INLINE vi round_step(vf inverse, vf scale) {
    const vi l = vi_nearest(0.5f * (inverse * scale - 1.0f));
    return vi_max(vi_set1(0), vi_min(vi_set1(7), l));
}

QK_INLINE vf larger_or_nan(vf scale, vf largest) {
    return vf_sel((scale > largest) | (scale != scale), scale, largest);
}

#endif
