/* Super-blocks in lanes: each lane works on a super-block of 256 weights of its own.
 *
 * A batch of QK_LANES super-blocks is transposed into a lane-major tile (element i of every
 * super-block is one vector), so that the per-sub-block searches, the search over a super-block's
 * scales and the packing are all plain vector code, each lane in the reference's order. A batch
 * runs on across rows; lanes beyond the last super-block encode zeros into a spare block.
 */
#ifndef QUANTCLI_SUPERBLOCK_H
#define QUANTCLI_SUPERBLOCK_H

#include "tile.h"

#define SUPER 256
#define SPARE_BYTES 256 /* more than any block type's bytes */

struct batch {
    const float *x[QK_LANES];
    const float *weights[QK_LANES];
    uint8_t *dst[QK_LANES];
};

/* The importance q becomes q * sqrt(sigma^2 + x^2), sigma^2 = factor * mean of x^2. */
QK_INLINE void scale_importance(const vf *x, vf *restrict w, float factor) {
    vf sum = {0};
    for (int i = 0; i < SUPER; ++i) sum += x[i] * x[i];
    const vf variance = factor * sum / (float)SUPER;
    for (int i = 0; i < SUPER; ++i) w[i] *= vf_sqrt(variance + x[i] * x[i]);
}

/* Each lane's bytes (0 ... 255, a multiple of 4 of them) to dst[lane] + offset. */
QK_INLINE void scatter_bytes(uint8_t *const *dst, int offset, const vi *bytes, const int count) {
    vi words[SUPER / 4];
    for (int k = 0; k < count / 4; ++k) {
        words[k] = pack_bytes(bytes[4 * k], bytes[4 * k + 1], bytes[4 * k + 2], bytes[4 * k + 3]);
    }
    scatter_words(dst, offset, words, count / 4);
}

/* A few bits of each of the 256 codes, from bit shift on, in planes: the parts of a byte belong to
 * codes span apart, so byte i of the first span bytes holds codes i, i + span, i + 2*span ... */
QK_INLINE void scatter_planes(uint8_t *const *dst, int offset, const vi *codes, const int bits,
                              const int shift, const int span) {
    const int planes = 8 / bits, group = span * planes;
    const vi mask = vi_set1(0x01010101 * ((1 << bits) - 1));
    vi words[SUPER / 8];
    for (int k = 0; k < SUPER / planes / 4; ++k) {
        const vi *c = codes + k / (span / 4) * group + k % (span / 4) * 4;
        words[k] = (vi){0};
        for (int plane = 0; plane < planes; ++plane, c += span) {
            const vi four = pack_bytes(c[0], c[1], c[2], c[3]);
            words[k] |= ((four >> shift) & mask) << (bits * plane);
        }
    }
    scatter_words(dst, offset, words, SUPER / planes / 4);
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
