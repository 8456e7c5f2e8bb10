/* Building and holding the codebook grids; see grids.h. */
#include "grids.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* What each type expects: points, weights per point, bits and number of levels, and how many
 * shells of neighbours its search looks at (ggml's nwant). */
static const struct shape { int type, count, dims, bits, nlevels, shells; } shapes[] = {
    {QK_IQ2_XXS, 256, 8, 2, 3, 2},
    {QK_IQ2_XS, 512, 8, 2, 3, 2},
    {QK_IQ2_S, 1024, 8, 2, 3, 1},
    {QK_IQ1_S, 2048, 8, 2, 3, 3},
    {QK_IQ1_M, 2048, 8, 2, 3, 3},
    {QK_IQ3_XXS, 256, 4, 3, 8, 2},
    {QK_IQ3_S, 512, 4, 3, 8, 3},
};

/* Distances are squares of steps between levels: at most 4 * 7^2. */
enum { MAX_DISTANCE = 196, MAX_COUNT = 2048, MAX_DIMS = 8 };

static _Atomic(const struct qk_grid *) installed[QK_TYPE_COUNT];

static const struct shape *shape_of(int type) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; ++i) {
        if (shapes[i].type == type) return &shapes[i];
    }
    return NULL;
}

const struct qk_grid *qk_grid_get(int type) {
    return atomic_load_explicit(&installed[type], memory_order_acquire);
}

int qk_grid_ready(int type) { return shape_of(type) == NULL || qk_grid_get(type) != NULL; }

/* The grid points in the nearest shells around a point, nearest first, by index among equals. */
static int find_near(const struct shape *shape, const uint8_t *levels, const uint8_t *point,
                     uint16_t *found) {
    uint8_t distances[MAX_COUNT];
    int held[MAX_DISTANCE + 1] = {0}, n = 0;
    for (int i = 0; i < shape->count; ++i) {
        int distance = 0;
        for (int k = 0; k < shape->dims; ++k) {
            const int step = levels[i * shape->dims + k] - point[k];
            distance += step * step;
        }
        distances[i] = (uint8_t)distance;
        ++held[distance];
    }
    for (int distance = 0, shells = 0; shells < shape->shells; ++distance) {
        if (held[distance] == 0) continue;
        for (int i = 0; i < shape->count; ++i) {
            if (distances[i] == distance) found[n++] = (uint16_t)i;
        }
        ++shells;
    }
    return n;
}

/* Whether a is, weight by weight, at the point's level, at b's, or between them. */
static int covers(const uint8_t *a, const uint8_t *b, const uint8_t *point, int dims) {
    for (int k = 0; k < dims; ++k) {
        const int low = b[k] < point[k] ? b[k] : point[k];
        const int high = b[k] < point[k] ? point[k] : b[k];
        if (a[k] < low || a[k] > high) return 0;
    }
    return 1;
}

/* Drops what an earlier point covers; returns how many are left. */
static int keep_uncovered(const struct shape *shape, const uint8_t *levels, const uint8_t *point,
                          const uint16_t *found, int n, uint16_t *kept) {
    const int dims = shape->dims;
    int left = 0;
    for (int i = 0; i < n; ++i) {
        int covered = 0;
        for (int j = 0; j < left && !covered; ++j) {
            covered = covers(levels + kept[j] * dims, levels + found[i] * dims, point, dims);
        }
        if (!covered) kept[left++] = found[i];
    }
    return left;
}

/* A grid while it is built; `near` grows. */
struct builder {
    const struct shape *shape;
    const uint8_t *levels;
    uint16_t *codes;
    int8_t *points;
    int32_t *slots;
    struct qk_near *lists;
    uint8_t *near;
    int32_t used, room;
};

static int near_width(const struct shape *shape) {
    return shape->dims == 8 ? (int)sizeof(uint16_t) : shape->dims;
}

static int append_points(struct builder *b, const uint16_t *indices, int n) {
    const int dims = b->shape->dims, width = near_width(b->shape);
    if (b->used + n + QK_NEAR_SPARE > b->room) {
        const int32_t room = 2 * b->room + n + QK_NEAR_SPARE;
        uint8_t *grown = realloc(b->near, (size_t)room * (size_t)width);
        if (grown == NULL) return -1;
        memset(grown + b->room * width, 0, (size_t)(room - b->room) * (size_t)width);
        b->near = grown;
        b->room = room;
    }
    for (int i = 0; i < n; ++i, ++b->used) {
        uint8_t *point = b->near + b->used * width;
        if (dims == 8) {
            memcpy(point, &b->codes[indices[i]], sizeof *b->codes);
            continue;
        }
        for (int k = 0; k < dims; ++k) point[k] = (uint8_t)(32 * b->levels[indices[i] * dims + k]);
    }
    return 0;
}

/* A slot for every code. Those with levels that the type lacks keep slot 0: nothing asks. */
static int link_codes(struct builder *b) {
    const struct shape *shape = b->shape;
    uint16_t found[MAX_COUNT], kept[MAX_COUNT];
    int32_t lists = 0;
    for (int i = 0; i < shape->count; ++i) b->slots[b->codes[i]] = i;
    for (int code = 0; code < 1 << (shape->dims * shape->bits); ++code) {
        uint8_t point[MAX_DIMS];
        int reachable = 1;
        for (int k = 0; k < shape->dims; ++k) {
            point[k] = (uint8_t)(code >> (shape->bits * k) & ((1 << shape->bits) - 1));
            reachable &= point[k] < shape->nlevels;
        }
        if (!reachable || b->codes[b->slots[code]] == code) continue;
        const int n = find_near(shape, b->levels, point, found);
        const int left = keep_uncovered(shape, b->levels, point, found, n, kept);
        b->lists[lists] = (struct qk_near){b->used, (uint16_t)left, (uint16_t)n};
        b->slots[code] = ~lists++;
        if (append_points(b, kept, left) != 0 || append_points(b, found, n) != 0) return -1;
    }
    return 0;
}

static struct qk_grid *grid_new(const struct shape *shape, const uint8_t *levels,
                                const int8_t *values) {
    const size_t count = (size_t)shape->count, ncodes = (size_t)1 << (shape->dims * shape->bits);
    struct builder b = {.shape = shape, .levels = levels};
    struct qk_grid *grid = malloc(sizeof *grid);
    b.codes = calloc(count, sizeof *b.codes);
    b.points = malloc(count * (size_t)shape->dims);
    b.slots = calloc(ncodes, sizeof *b.slots);
    b.lists = malloc(ncodes * sizeof *b.lists);
    if (grid != NULL && b.codes != NULL && b.points != NULL && b.slots != NULL && b.lists != NULL) {
        for (int i = 0; i < shape->count * shape->dims; ++i) {
            b.codes[i / shape->dims] |=
                (uint16_t)(levels[i] << (i % shape->dims * shape->bits));
            b.points[i] = values[levels[i]];
        }
        if (link_codes(&b) == 0) {
            *grid = (struct qk_grid){near_width(shape), shape->count, b.codes, b.points,
                                     b.slots, b.lists, b.near};
            return grid;
        }
    }
    free(b.codes);
    free(b.points);
    free(b.slots);
    free(b.lists);
    free(b.near);
    free(grid);
    return NULL;
}

static void grid_free(struct qk_grid *grid) {
    free((void *)grid->codes);
    free((void *)grid->points);
    free((void *)grid->slots);
    free((void *)grid->lists);
    free((void *)grid->near);
    free(grid);
}

int qk_grid_set(int type, const uint8_t *levels, int count, int dims, const int8_t *values,
                int nlevels) {
    const struct shape *shape = shape_of(type);
    if (shape == NULL || count != shape->count || dims != shape->dims
        || nlevels != shape->nlevels) {
        return QK_GRID_UNFIT;
    }
    for (int i = 0; i < count * dims; ++i) {
        if (levels[i] >= nlevels) return QK_GRID_UNFIT;
    }
    if (qk_grid_get(type) != NULL) return 0;
    struct qk_grid *grid = grid_new(shape, levels, values);
    if (grid == NULL) return QK_GRID_NO_MEMORY;
    const struct qk_grid *none = NULL;
    if (!atomic_compare_exchange_strong(&installed[type], &none, grid)) grid_free(grid);
    return 0;
}
