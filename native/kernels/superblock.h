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
