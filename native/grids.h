/* Codebook grids of the IQ1, IQ2 and IQ3 types, and which grid points lie nearest to any point.
 *
 * A group of `dims` weights is coded as one point of the grid. A point's code packs its levels,
 * `bits` each, the first weight lowest. The tables themselves are handed over once by the caller
 * (qk_grid_set); what the encoders search in is derived from them: for every code that is not on
 * the grid, the grid points in its `shells` nearest distances, ordered by distance, then by index.
 * That order decides ties, as it does in ggml (iq2xs_init_impl, iq3xs_init_impl).
 */
#ifndef QUANTCLI_GRIDS_H
#define QUANTCLI_GRIDS_H

#include "qk.h"

/* A code's neighbours: `kept` points from `first` on, then the `all` points of the whole list.
 *
 * Kept are those that no earlier one of the list covers. A point covers another if in every weight
 * it is at the code's own level, or at the other's, or between the two. Where every weight lies
 * inside the cell of its level (the lowest and the highest are open outwards), clear of its edge,
 * the covering point is no further away in any weight; float32 rounding is monotonic, so its
 * distance comes out no larger, and being the earlier one it wins a tie: the winner is among the
 * kept. */
struct qk_near {
    int32_t first;
    uint16_t kept, all;
};

struct qk_grid {
    int width, count;
    const uint16_t *codes;       /* of each grid point */
    const int8_t *points;        /* its values when decoded, dims each */
    const int32_t *slots;        /* of each code: the index of its grid point, or ~(its list) */
    const struct qk_near *lists;
    const uint8_t *near;         /* neighbours, width bytes each: four levels times 32, a byte per
                                    weight, or the code of eight; QK_NEAR_SPARE readable ones more */
};
enum { QK_NEAR_SPARE = 16 };

static inline const uint8_t *qk_near_point(const struct qk_grid *grid, int32_t index) {
    return grid->near + index * grid->width;
}

/* Install the grid of a type: `count` points of `dims` levels (0 to nlevels - 1), and what each
 * level decodes to. Does nothing when the type has one already. Safe to call from several threads.
 * Returns 0, or why not. */
enum { QK_GRID_NO_MEMORY = -1, QK_GRID_UNFIT = -2 };
int qk_grid_set(int type, const uint8_t *levels, int count, int dims, const int8_t *values,
                int nlevels);

/* The installed grid of a type, or NULL. */
const struct qk_grid *qk_grid_get(int type);

/* Whether a type's kernels may run: it has its grid, or is coded without one. */
int qk_grid_ready(int type);

#endif
