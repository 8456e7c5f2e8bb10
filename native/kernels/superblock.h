/* Super-blocks in lanes: each lane works on a super-block of 256 weights of its own.
 *
 * A batch of QK_LANES super-blocks is transposed into a lane-major tile (element i of every
 * super-block is one vector), so that the per-sub-block searches, the search over a super-block's
 * scales and the packing are all plain vector code, each lane in the reference's order. A batch
 * runs on across rows; lanes beyond the last super-block encode zeros into a spare block.
 */
#ifndef QUANTCLI_SUPERBLOCK_H
#define QUANTCLI_SUPERBLOCK_H

#include "lanes.h"

#define SUPER 256
#define SPARE_BYTES 256 /* more than any block type's bytes */

struct batch {
    const float *x[QK_LANES];
    const float *weights[QK_LANES];
    uint8_t *dst[QK_LANES];
};

/* interleave_low(a, b) is a0 b0 a1 b1 ... of the first halves, interleave_high of the second. */
#if QK_LANES == 16
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif QK_LANES == 8
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif
#if defined(__clang__)
QK_INLINE vf interleave_low(vf a, vf b) { return __builtin_shufflevector(a, b, LOW_HALVES); }
QK_INLINE vf interleave_high(vf a, vf b) { return __builtin_shufflevector(a, b, HIGH_HALVES); }
#else
QK_INLINE vf interleave_low(vf a, vf b) { return __builtin_shuffle(a, b, (vi){LOW_HALVES}); }
QK_INLINE vf interleave_high(vf a, vf b) { return __builtin_shuffle(a, b, (vi){HIGH_HALVES}); }
#endif

/* tile[i] = element i of each source, for 256 elements: square transposes by log2(lanes) rounds of
 * perfect shuffles. */
static void gather_tile(vf *restrict tile, const float *const *src) {
    for (int start = 0; start < SUPER; start += QK_LANES) {
        vf a[QK_LANES], b[QK_LANES];
#pragma GCC unroll 16
        for (int lane = 0; lane < QK_LANES; ++lane) a[lane] = vf_load(src[lane] + start);
#pragma GCC unroll 4
        for (int round = 1; round < QK_LANES; round *= 2) {
#pragma GCC unroll 16
            for (int k = 0; k < QK_LANES / 2; ++k) {
                b[2 * k] = interleave_low(a[k], a[k + QK_LANES / 2]);
                b[2 * k + 1] = interleave_high(a[k], a[k + QK_LANES / 2]);
            }
#pragma GCC unroll 16
            for (int k = 0; k < QK_LANES; ++k) a[k] = b[k];
        }
#pragma GCC unroll 16
        for (int k = 0; k < QK_LANES; ++k) tile[start + k] = a[k];
    }
}

/* Each lane's 32-bit words (little-endian bytes of its block) to dst[lane] + offset. */
QK_INLINE void scatter_words(uint8_t *const *dst, int offset, const vi *words, int count) {
    for (int k = 0; k < count; ++k) {
        int32_t lanes[QK_LANES];
        vi_store(lanes, words[k]);
        for (int lane = 0; lane < QK_LANES; ++lane) {
            memcpy(dst[lane] + offset + 4 * k, &lanes[lane], sizeof lanes[lane]);
        }
    }
}

/* Four lanes' bytes in one word, the first lowest. */
QK_INLINE vi pack_bytes(vi b0, vi b1, vi b2, vi b3) {
    return b0 | (b1 << 8) | (b2 << 16) | (b3 << 24);
}

QK_INLINE void scatter_halves(uint8_t *const *dst, int offset, vi halves) {
    for (int lane = 0; lane < QK_LANES; ++lane) {
        const uint16_t half = (uint16_t)halves[lane];
        memcpy(dst[lane] + offset, &half, sizeof half);
    }
}

/* Calls encode on batches until all super-blocks of the rows are done. */
QK_INLINE void each_batch(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                          const float *weights, int nbytes,
                          void (*encode)(const struct batch *, int)) {
    static const float zeros[SUPER];
    const int64_t columns = ncols / SUPER, count = nrows * columns;
    uint8_t spare[SPARE_BYTES];
    int64_t column = 0;
    for (int64_t start = 0; start < count; start += QK_LANES) {
        struct batch batch;
        for (int lane = 0; lane < QK_LANES; ++lane) {
            const int64_t i = start + lane;
            const int real = i < count;
            batch.x[lane] = real ? x + i * SUPER : zeros;
            batch.weights[lane] = real && weights != NULL ? weights + column * SUPER : zeros;
            batch.dst[lane] = real ? dst + i * nbytes : spare;
            if (++column == columns) column = 0;
        }
        encode(&batch, weights != NULL);
    }
}

#endif
