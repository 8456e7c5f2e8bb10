/* IQ4_NL and IQ4_XS: four bits for sixteen uneven levels (ggml: quantize_row_iq4_nl_impl).
 *
 * A lane is a block of 32 (IQ4_NL) or a super-block of 256 (IQ4_XS). A block's first scale and
 * fifteen more are tried, each with its sums in the reference's order, and the one that maximises
 * (sum w x q)^2 / sum w q^2 is kept, with w = x^2, or importance * sqrt(sigma2 + x^2).
 */
#include "kernels.h"
#include "lookup.h"
#include "superblock.h"

enum { BLOCK = 32, HALF = BLOCK / 2, NBLOCKS = SUPER / BLOCK, TRIALS = 7 };
enum { NL_BYTES = 18, XS_BYTES = 136 };

#define TINY 1e-15f /* GROUP_MAX_EPS: below it a block counts as all zero */

static const float levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};

/* The middles between levels as a search tree: node n has the children 2n and 2n + 1. Near a
 * middle both distances are exact in float32, so "nearer to the upper level, or equally near" is
 * "not below the middle"; NaN is below none and gets the last level, as in the reference. */
static const float middles[16] = {0,       -4.5f,  -57.0f, 45.5f,  -93.5f, -28.5f, 19.0f, 79.0f,
                                  -115.5f, -74.0f, -42.0f, -16.0f, 7.0f,   31.5f,  61.0f, 101.0f};

QK_INLINE vi nearest_level(vf v) {
#if QK_LANES >= 8
    const vt8 upper = vt8_load(middles), lower = vt8_load(middles + 8);
    vi node = 3 + (v < middles[1]);
    node = 2 * node + 1 + (v < vt8_at(upper, node));
    node = 2 * node + 1 + (v < vt8_at(upper, node));
    node = 2 * node + 1 + (v < vt8_at(lower, node));
    return node - 16;
#else
    vi level = vi_set1(15);
    for (int i = 1; i < 16; ++i) level += v < middles[i];
    return level;
#endif
}

/* sum w q x and sum w q^2 of a block under one trial's inverse scale. */
QK_INLINE void try_scale(const vf *x, const vf *w, vf inverse, vf *sumqx, vf *sumq2) {
    vf qx = {0}, q2 = {0};
    for (int i = 0; i < BLOCK; ++i) {
        const vf q = vf_table16(levels, nearest_level(inverse * x[i]));
        const vf wq = w[i] * q;
        qx += wq * x[i];
        q2 += wq * q;
    }
    *sumqx = qx;
    *sumq2 = q2;
}

/* Each lane's best float32 scale, zero for a block that counts as zero. */
QK_INLINE vf search_scale(const vf *x, const vf *w) {
    vf amax = {0}, max = {0}, sumqx, sumq2;
    for (int i = 0; i < BLOCK; ++i) {
        const vi larger = vf_abs(x[i]) > amax;
        amax = vf_sel(larger, vf_abs(x[i]), amax);
        max = vf_sel(larger, x[i], max);
    }
    try_scale(x, w, 1.0f / (-max / levels[0]), &sumqx, &sumq2);
    vf scale = vf_sel(sumq2 > 0, sumqx / sumq2, vf_set1(0));
    vf best = scale * sumqx;
    for (int trial = -TRIALS; trial <= TRIALS; ++trial) {
        try_scale(x, w, ((float)trial + levels[0]) / max, &sumqx, &sumq2);
        const vi better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2);
        scale = vf_sel(better, sumqx / sumq2, scale);
        best = vf_sel(better, scale * sumqx, best);
    }
    return vf_sel(amax < TINY, vf_set1(0), scale);
}

/* w: importance times sqrt(sigma2 + x^2), in place, or x^2. */
QK_INLINE void weigh(const vf *x, vf *w, int count, int weighted) {
    vf sigma2 = {0};
    for (int i = 0; i < count && weighted; ++i) sigma2 += x[i] * x[i];
    sigma2 *= 2.0f / (float)count;
    for (int i = 0; i < count; ++i) {
        w[i] = weighted ? w[i] * vf_sqrt(sigma2 + x[i] * x[i]) : x[i] * x[i];
    }
}

QK_INLINE vf inverse_of(vf scale) { return vf_sel(scale == 0, vf_set1(0), 1.0f / scale); }

/* A block's codes under an inverse scale: byte i holds weights i (low) and i + 16 (high). */
QK_INLINE void store_codes(const vf *x, vf inverse, uint8_t *const *dst, int offset) {
    vi words[4];
    for (int k = 0; k < 4; ++k) {
        vi bytes[4];
        for (int i = 0; i < 4; ++i) {
            const vf *at = x + 4 * k + i;
            bytes[i] = nearest_level(inverse * at[0]) | nearest_level(inverse * at[HALF]) << 4;
        }
        words[k] = pack_bytes(bytes[0], bytes[1], bytes[2], bytes[3]);
    }
    scatter_words(dst, offset, words, 4);
}

int QK_FN(encode_iq4_nl)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                         const float *weights) {
    const int64_t columns = ncols / BLOCK, count = nrows * columns;
    uint8_t spare[NL_BYTES];
    int64_t column = 0;
    for (int64_t start = 0; start < count; start += QK_LANES) {
        const float *blocks[QK_LANES], *importance[QK_LANES];
        uint8_t *out[QK_LANES];
        vf values[BLOCK], w[BLOCK];
        for (int lane = 0; lane < QK_LANES; ++lane) {
            const int64_t i = start + lane;
            blocks[lane] = x + (i < count ? i : start) * BLOCK;
            importance[lane] = weights != NULL ? weights + column * BLOCK : NULL;
            out[lane] = i < count ? dst + i * NL_BYTES : spare;
            if (++column == columns) column = 0;
        }
        gather_tile(values, blocks, BLOCK);
        if (weights != NULL) gather_tile(w, importance, BLOCK);
        weigh(values, w, BLOCK, weights != NULL);
        const vf scale = search_scale(values, w);
        scatter_halves(out, 0, vi_to_half(scale));
        store_codes(values, inverse_of(scale), out, 2);
    }
    return 0;
}

/* Float16 scale, the block scales' two high bits, their four low bits, then the codes. */
static void encode_xs(const struct batch *batch, int weighted) {
    vf x[SUPER], w[SUPER], scales[NBLOCKS], amax = {0}, max = {0};
    gather_tile(x, batch->x, SUPER);
    if (weighted) gather_tile(w, batch->weights, SUPER);
    weigh(x, w, SUPER, weighted);
    for (int b = 0; b < NBLOCKS; ++b) {
        scales[b] = search_scale(x + BLOCK * b, w + BLOCK * b);
        const vi larger = vf_abs(scales[b]) > amax;
        amax = vf_sel(larger, vf_abs(scales[b]), amax);
        max = vf_sel(larger, scales[b], max);
    }
    const vf d = -max / 32, inverse = inverse_of(d);
    vi high = {0}, low = {0};
    for (int b = 0; b < NBLOCKS; ++b) {
        const vi nearest = vi_nearest(inverse * scales[b]);
        const vi scale = vi_max(vi_set1(-32), vi_min(vi_set1(31), nearest));
        store_codes(x + BLOCK * b, inverse_of(d * vf_from(scale)), batch->dst, 8 + HALF * b);
        low |= (vi)((vu)((scale + 32) & 15) << (4 * b));
        high |= (scale + 32) >> 4 << (2 * b);
    }
    scatter_halves(batch->dst, 0, vi_to_half(d));
    scatter_halves(batch->dst, 2, high);
    scatter_words(batch->dst, 4, &low, 1);
}

int QK_FN(encode_iq4_xs)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                         const float *weights) {
    each_batch(x, dst, nrows, ncols, weights, XS_BYTES, encode_xs);
    return 0;
}

QK_INLINE void decode_codes(const uint8_t *codes, float scale, float *dst) {
    for (int i = 0; i < HALF; i += QK_LANES) {
        const vi packed = vi_load_u8(codes + i);
        vf_store(dst + i, scale * vf_table16(levels, packed & 15));
        vf_store(dst + i + HALF, scale * vf_table16(levels, packed >> 4));
    }
}

static float load_half(const uint8_t *src) {
    uint16_t half;
    memcpy(&half, src, sizeof half);
    return qk_from_half(half);
}

void QK_FN(decode_iq4_nl)(const uint8_t *src, float *dst, int64_t n) {
    for (; n > 0; n -= BLOCK, src += NL_BYTES, dst += BLOCK) {
        decode_codes(src + 2, load_half(src), dst);
    }
}

void QK_FN(decode_iq4_xs)(const uint8_t *src, float *dst, int64_t n) {
    for (; n > 0; n -= SUPER, src += XS_BYTES) {
        const float d = load_half(src);
        const int high = src[2] | src[3] << 8;
        for (int b = 0; b < NBLOCKS; ++b, dst += BLOCK) {
            const int low = src[4 + b / 2] >> (4 * (b % 2)) & 15;
            const int scale = (low | (high >> (2 * b) & 3) << 4) - 32;
            decode_codes(src + 8 + HALF * b, d * (float)scale, dst);
        }
    }
}
