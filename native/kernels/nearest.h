/* The grid point nearest to eight weights, neighbours in lanes.
 *
 * A weight has three levels, so what it adds to a distance is one of three numbers; a neighbour's
 * code picks them, two bits per weight, and each lane sums its own eight in the reference's order.
 */
#ifndef QUANTCLI_NEAREST_H
#define QUANTCLI_NEAREST_H

#include "../grids.h"
#include "codebook.h"
#include "lookup.h"

#include <float.h>

/* Below it, a scale times its levels may be coarser than EDGE. */
#define TINIEST 1e-30f

enum { NOWHERE = -1 };

/* Eight weights, four times each (once for a level, and once more), and what they weigh. */
struct eight {
    float x[32], weights[32];
} __attribute__((aligned(64)));

static inline void spread_eight(const float *x, const float *weights, struct eight *eight) {
    for (int i = 0; i < 32; ++i) {
        eight->x[i] = x[i / 4];
        eight->weights[i] = weights[i / 4];
    }
}

/* levels (of 0, 1, 2 and any fourth number) in turn through the lanes. */
QK_INLINE vf repeat_levels(const float levels[4]) {
    vf v;
    for (int i = 0; i < QK_LANES; i += 4) memcpy((float *)&v + i, levels, 4 * sizeof *levels);
    return v;
}

/* v with lanes i and i ^ by exchanged, the smaller of both. */
#if defined(__clang__)
#define SHUFFLED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLED(v, ...) __builtin_shuffle(v, (vi){__VA_ARGS__})
#endif
QK_INLINE float least_lane(vf v) {
#if QK_LANES == 16
    v = vf_min(v, SHUFFLED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = vf_min(v, SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = vf_min(v, SHUFFLED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = vf_min(v, SHUFFLED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif QK_LANES == 8
    v = vf_min(v, SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = vf_min(v, SHUFFLED(v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = vf_min(v, SHUFFLED(v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    v = vf_min(v, SHUFFLED(v, 2, 3, 0, 1));
    v = vf_min(v, SHUFFLED(v, 1, 0, 3, 2));
#endif
    return v[0];
}

/* Code of the nearest of count neighbours when a level is worth scale * levels, the first of
 * equals; NOWHERE when none is at a finite distance. levels is repeated through the lanes. */
QK_INLINE int nearest_code(const struct eight *eight, const vf levels, float scale,
                           const uint8_t *near, int count) {
    float terms[32] __attribute__((aligned(64)));
    const vf steps = scale * levels;
    for (int i = 0; i < 32; i += QK_LANES) {
        const vf off = steps - vf_load(eight->x + i);
        vf_store(terms + i, vf_load(eight->weights + i) * off * off);
    }
    vf best = vf_set1(FLT_MAX);
    vi winner = {0}, place;
    for (int lane = 0; lane < QK_LANES; ++lane) place[lane] = lane;
    for (int j = 0; j < count; j += QK_LANES) {
        vi code = vi_load_u16(near + 2 * j);
        vf distance = vf_table4(terms, code);
        for (int i = 1; i < 8; ++i) {
            code >>= 2;
            distance += vf_table4(terms + 4 * i, code);
        }
        const vi closer = (distance < best) & (place < count);
        best = vf_sel(closer, distance, best);
        winner = vi_sel(closer, place, winner);
        place += QK_LANES;
    }
    const float least = least_lane(best);
    if (least == FLT_MAX) return NOWHERE;
    uint32_t equal = vi_bits(best == least);
    int32_t places[QK_LANES];
    vi_store(places, winner);
    int first = places[__builtin_ctz(equal)];
    while ((equal &= equal - 1) != 0) {
        const int other = places[__builtin_ctz(equal)];
        first = other < first ? other : first;
    }
    uint16_t code;
    memcpy(&code, near + 2 * first, sizeof code);
    return code;
}

/* The code's own, if it is on the grid, or the nearest neighbour's. clear: every weight is surely
 * inside the cell of its level. */
QK_INLINE int place_code(const struct qk_grid *grid, int code, const struct eight *eight,
                         const vf levels, float scale, int clear) {
    const int32_t slot = grid->slots[code];
    if (slot >= 0) return code;
    const struct qk_near list = grid->lists[~slot];
    const int few = clear && scale > TINIEST;
    return nearest_code(eight, levels, scale,
                        qk_near_point(grid, list.first + (few ? 0 : list.kept)),
                        few ? list.kept : list.all);
}

#endif
