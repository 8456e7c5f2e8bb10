/* Tiles: what lies in memory block by block, turned so that each lane holds a block of its own.
 *
 * Element i of every block is one vector, so searches and packing are plain vector code; the packed
 * words go back to each lane's block.
 */
#ifndef QUANTCLI_TILE_H
#define QUANTCLI_TILE_H

#include "lanes.h"

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

/* Element i of row r becomes element r of row i: log2(lanes) rounds of perfect shuffles. */
QK_INLINE void transpose(vf rows[QK_LANES]) {
#pragma GCC unroll 4
    for (int round = 1; round < QK_LANES; round *= 2) {
        vf zipped[QK_LANES];
#pragma GCC unroll 16
        for (int k = 0; k < QK_LANES / 2; ++k) {
            zipped[2 * k] = interleave_low(rows[k], rows[k + QK_LANES / 2]);
            zipped[2 * k + 1] = interleave_high(rows[k], rows[k + QK_LANES / 2]);
        }
#pragma GCC unroll 16
        for (int k = 0; k < QK_LANES; ++k) rows[k] = zipped[k];
    }
}

/* tile[i] = element i of each lane's source, for count elements (a multiple of QK_LANES). */
static inline void gather_tile(vf *restrict tile, const float *const *src, int64_t count) {
    for (int64_t start = 0; start < count; start += QK_LANES) {
        vf rows[QK_LANES];
#pragma GCC unroll 16
        for (int lane = 0; lane < QK_LANES; ++lane) rows[lane] = vf_load(src[lane] + start);
        transpose(rows);
#pragma GCC unroll 16
        for (int k = 0; k < QK_LANES; ++k) tile[start + k] = rows[k];
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

#endif
