/* MXFP4 and NVFP4: four-bit floats (E2M1) in groups under an 8-bit float scale of their own.
 *
 * Mirrors quantize_row_mxfp4_ref and quantize_row_nvfp4_ref in ggml-quants.c; importance weights
 * do not apply. MXFP4 is a group of 32 under a power of two (E8M0); NVFP4 is four groups of 16 under
 * scales of three mantissa bits (UE4M3). A group is in each lane. The reference takes the first of
 * the values with the least error; with exact products that is the number of midpoints below.
 */
#include "kernels.h"
#include "tile.h"

#define GROUP_MAX 32
#define MX_GROUP 32
#define MX_BYTES 17
#define NV_GROUP 16
#define NV_GROUPS 4 /* in a block */
#define NV_BYTES 36
#define NV_LARGEST 0x7e /* scale 448; the reference gives it to all from 256 upwards */

/* The magnitudes, doubled so that they are whole; scales are halved in exchange. */
static const float MAGNITUDES[8] = {0, 1, 2, 3, 4, 6, 8, 12};

/* floor(log2(peak)) as log2f rounds it (to nearest), so just below 2^n it can be n. */
QK_INLINE vi floor_log2(vf peak) {
    const vi subnormal = peak < 0x1p-126f;
    const vi bits = (vi)vf_sel(subnormal, peak * 0x1p32f, peak);
    const vi exponent = (bits >> 23) - 127 - (subnormal & 32);
    const vf next = vf_from(exponent + 1);
    /* The logarithm's distance from the next integer, where that is near: ulps / (2^24 ln 2). */
    const vf short_by = vf_from(0x800000 - (bits & 0x7fffff)) * 0x1.715476p-24f;
    return exponent - (next - short_by == next);
}

/* E8M0 exponents two below the peak's; below 2^-125 they wrap around as the reference's do. */
QK_INLINE vi mx_scale(vf peak) {
    return vi_sel(peak > 0.f, (floor_log2(peak) + (127 - 2)) & 0xff, vi_set1(0));
}
QK_INLINE vf mx_value(vi scale) {
    return (vf)vi_sel(scale < 2, (scale + 1) * 0x00200000, (scale - 1) << 23);
}

/* UE4M3: rounds half up. */
QK_INLINE vi nv_scale(vf peak) {
    const vf target = peak / 6.f;
    const vi bits = (vi)target;
    const vi normal = (bits >> 20) - (120 << 3) + (bits >> 19 & 1);
    const vi fixed = vi_trunc(vf_min(target * 512.f, vf_set1(7)) + 0.5f);
    const vi code = vi_sel(normal >= 15 << 3, vi_set1(NV_LARGEST), normal);
    return vi_sel(bits < 121 << 23, fixed, code);
}
QK_INLINE vf nv_value(vi scale) {
    const vf magnitude = (vf)((scale & 0x7f) << 20) * 0x1p119f;
    return vf_sel(scale == 0x7f, vf_set1(0), magnitude);
}

/* The reference's own search. Far above the largest value the errors are equal in float32, and
 * the first of them wins: only saturated scales need it. */
QK_INLINE vi nearest_by_error(vf magnitude, vf scale) {
    vf least = magnitude;
    vi best = {0};
    for (int i = 1; i < 8; ++i) {
        const vf error = vf_abs(MAGNITUDES[i] * scale - magnitude);
        const vi better = error < least;
        least = vf_sel(better, error, least);
        best = vi_sel(better, vi_set1(i), best);
    }
    return best;
}

QK_INLINE vi nearest_by_midpoints(vf magnitude, const vf *midpoints) {
    vi below = {0};
    for (int i = 0; i < 7; ++i) below += magnitude > midpoints[i];
    return -below;
}

/* A value that overflows is out of reach, and so is every value of a scale of zero. */
QK_INLINE void midpoints_of(vf scale, vf *midpoints) {
    const vf step = vf_sel(scale == 0.f, vf_set1(HUGE_VALF), scale);
    vf low = {0};
    for (int i = 0; i < 7; ++i) {
        const vf high = step * MAGNITUDES[i + 1] * 0.5f;
        midpoints[i] = low + high;
        low = high;
    }
}

/* A negative weight whose code is zero keeps the positive zero. */
QK_INLINE vi signed_code(vf v, vi code) { return code | ((v < 0.f) & (code > 0) & 8); }

QK_INLINE void encode_groups(const float *const *x, uint8_t *const *scales,
                             uint8_t *const *codes, int size, int nv) {
    vf tile[GROUP_MAX], midpoints[7];
    gather_tile(tile, x, size);
    vf peak = vf_abs(tile[0]);
    for (int i = 1; i < size; ++i) peak = vf_max(peak, vf_abs(tile[i]));
    const vi scale = nv ? nv_scale(peak) : mx_scale(peak);
    const vf value = nv ? nv_value(scale) : mx_value(scale);
    int32_t bytes[QK_LANES];
    vi_store(bytes, scale);
    for (int lane = 0; lane < QK_LANES; ++lane) *scales[lane] = (uint8_t)bytes[lane];

    vi chosen[GROUP_MAX], words[GROUP_MAX / 8];
    if (nv && vi_any(scale == NV_LARGEST)) {
        for (int i = 0; i < size; ++i) chosen[i] = nearest_by_error(vf_abs(tile[i]), value);
    } else {
        midpoints_of(value, midpoints);
        for (int i = 0; i < size; ++i) {
            chosen[i] = nearest_by_midpoints(vf_abs(tile[i]), midpoints);
        }
    }
    for (int i = 0; i < size; ++i) chosen[i] = signed_code(tile[i], chosen[i]);
    for (int k = 0; k < size / 8; ++k) {
        const vi *low = chosen + 4 * k, *high = low + size / 2;
        words[k] = pack_bytes(low[0] | high[0] << 4, low[1] | high[1] << 4,
                              low[2] | high[2] << 4, low[3] | high[3] << 4);
    }
    scatter_words(codes, 0, words, size / 8);
}

QK_INLINE int encode_all(const float *x, uint8_t *dst, int64_t n, int size, int nv) {
    const int64_t count = n / size;
    for (int64_t start = 0; start < count; start += QK_LANES) {
        const float *groups[QK_LANES];
        uint8_t *scales[QK_LANES], *codes[QK_LANES];
        for (int lane = 0; lane < QK_LANES; ++lane) {
            /* Lanes beyond the last group repeat it. */
            const int64_t i = start + lane < count ? start + lane : count - 1;
            groups[lane] = x + i * size;
            uint8_t *block = dst + (nv ? i / NV_GROUPS * NV_BYTES : i * MX_BYTES);
            scales[lane] = block + (nv ? i % NV_GROUPS : 0);
            codes[lane] = block + (nv ? NV_GROUPS + i % NV_GROUPS * (NV_GROUP / 2) : 1);
        }
        encode_groups(groups, scales, codes, size, nv);
    }
    return 0;
}

int QK_FN(encode_mxfp4)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                        const float *weights) {
    (void)weights;
    return encode_all(x, dst, nrows * ncols, MX_GROUP, 0);
}

int QK_FN(encode_nvfp4)(const float *x, uint8_t *dst, int64_t nrows, int64_t ncols,
                        const float *weights) {
    (void)weights;
    return encode_all(x, dst, nrows * ncols, NV_GROUP, 1);
}

/* Code 8, minus zero, reads as zero. */
QK_INLINE vf vf_from_e2m1(vi code) {
    const vi magnitude = code & 7;
    const vf normal = (vf)((magnitude << 22) + (127 << 23));
    const vf v = vf_sel(magnitude < 2, vf_from(magnitude), normal);
    return vf_sel(code > 7, 0.f - v, v);
}

/* Low nibbles are the first half of the group. */
QK_INLINE void decode_group(const uint8_t *codes, float scale, float *dst, int size) {
    const uint64_t nibble = 0x0f0f0f0f0f0f0f0f;
    uint8_t each[GROUP_MAX];
    for (int i = 0; i < size / 2; i += 8) {
        uint64_t pairs;
        memcpy(&pairs, codes + i, sizeof pairs);
        const uint64_t low = pairs & nibble, high = pairs >> 4 & nibble;
        memcpy(each + i, &low, sizeof low);
        memcpy(each + size / 2 + i, &high, sizeof high);
    }
    for (int i = 0; i < size; i += QK_LANES) {
        vf_store(dst + i, vf_from_e2m1(vi_load_u8(each + i)) * scale);
    }
}

void QK_FN(decode_mxfp4)(const uint8_t *src, float *dst, int64_t n) {
    for (const float *end = dst + n; dst < end; dst += MX_GROUP, src += MX_BYTES) {
        decode_group(src + 1, mx_value(vi_set1(src[0]))[0], dst, MX_GROUP);
    }
}

void QK_FN(decode_nvfp4)(const uint8_t *src, float *dst, int64_t n) {
    for (const float *end = dst + n; dst < end; src += NV_BYTES) {
        const vf scales = nv_value(vi_load_u8(src)); /* the first four; codes follow */
        for (int k = 0; k < NV_GROUPS; ++k, dst += NV_GROUP) {
            const uint8_t *codes = src + NV_GROUPS + k * (NV_GROUP / 2);
            decode_group(codes, scales[k], dst, NV_GROUP);
        }
    }
}
