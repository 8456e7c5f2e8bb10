/* The formats of 32 weights: what distinguishes them, and how their codes are packed.
 *
 * A block is a float16 scale, a float16 min if affine, the fifth bits if there are five, and 16
 * bytes of nibbles of which byte j holds weights j (low) and j+16 (high).
 */
#ifndef QUANTCLI_BLOCK32_H
#define QUANTCLI_BLOCK32_H

#include "kernels.h"

#define BLOCK 32

struct type32 {
    int bits;   /* of a code */
    int affine; /* has a min; otherwise codes are centred */
};

static const struct type32 Q4_0 = {4, 0}, Q4_1 = {4, 1}, Q5_0 = {5, 0}, Q5_1 = {5, 1};

QK_INLINE int fifth_offset(const struct type32 type) { return type.affine ? 4 : 2; }
QK_INLINE int nibble_offset(const struct type32 type) {
    return fifth_offset(type) + (type.bits == 5 ? 4 : 0);
}
QK_INLINE int block_bytes(const struct type32 type) { return nibble_offset(type) + BLOCK / 2; }

#endif
