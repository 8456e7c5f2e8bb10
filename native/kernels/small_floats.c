/* Codes of small floats under scales: E4M3 (without infinities) and E2M1, rounded to nearest.
 *
 * The float's own exponent and leading mantissa bits, rounded, are the code but for the bias;
 * magnitudes below the least normal one are rounded as whole steps. What is beyond the largest code
 * gets that one. Mirrors quantcli/formats/float_grid.py; E4M3 gives the bytes of ml_dtypes'
 * float8_e4m3fn for all magnitudes that it holds.
 */
#include "kernels.h"

/* The largest magnitude among n floats, as its bits: those of an infinity or a NaN are larger than
 * any number's. */
static uint32_t largest_bits(const float *x, int64_t n) {
    vi most[4] = {{0}, {0}, {0}, {0}};
    uint32_t found = 0;
    int64_t i = 0;
    for (; i + 4 * QK_LANES <= n; i += 4 * QK_LANES) {
        for (int k = 0; k < 4; ++k) {
            most[k] = vi_max(most[k], (vi)vf_abs(vf_load(x + i + k * QK_LANES)));
        }
    }
    for (; i + QK_LANES <= n; i += QK_LANES) most[0] = vi_max(most[0], (vi)vf_abs(vf_load(x + i)));
    int32_t lanes[QK_LANES];
    vi_store(lanes, vi_max(vi_max(most[0], most[1]), vi_max(most[2], most[3])));
    for (int k = 0; k < QK_LANES; ++k) {
        if ((uint32_t)lanes[k] > found) found = (uint32_t)lanes[k];
    }
    for (; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        if (bits > found) found = bits;
    }
    return found;
}

int QK_FN(largest)(const float *x, int64_t n, int64_t width, float *out) {
    uint32_t most = 0;
    for (int64_t start = 0; start < n; start += width, ++out) {
        uint32_t found = largest_bits(x + start, n - start < width ? n - start : width), held;
        memcpy(&held, out, sizeof held);
        if (found > held) memcpy(out, &found, sizeof found);
        if (found > most) most = found;
    }
    return most >= 0x7f800000;
}

struct kind {
    int mantissa, bias;
    float largest;
    int even; /* ties go to the even code, else to the smaller magnitude, and minus zero to zero */
};

QK_INLINE vi small_code(vf v, struct kind kind) {
    const int drop = 23 - kind.mantissa;
    const vf magnitude = vf_min(vf_abs(v), vf_set1(kind.largest));
    const vi bits = (vi)magnitude;
    const vi odd = (bits >> drop) & kind.even;
    const vi normal = ((bits + odd + ((1 << (drop - 1)) - 1)) >> drop)
                      - ((127 - kind.bias) << kind.mantissa);
    /* The least step is a whole number here. */
    const vf parts = magnitude * (float)(1 << (kind.mantissa + kind.bias - 1));
    vi steps = vi_nearest(parts);
    if (!kind.even) {
        const vi whole = vi_from(vf_min(parts, vf_set1(16)));
        steps = whole - (vf_from(whole) + 0.5f < parts);
    }
    const int width = kind.mantissa == 3 ? 8 : 4;
    const int least = (128 - kind.bias) << 23; /* the bits of 2^(1 - bias) */
    const vi code = vi_sel(bits < least, steps, normal);
    vi sign = (vi)((vu)(vi)v >> (32 - width)) & (1 << (width - 1));
    if (!kind.even) sign = vi_sel(code == 0, vi_set1(0), sign);
    return code | sign;
}

QK_INLINE void small_codes(const float *x, const float *scales, int64_t n, int64_t width,
                           uint8_t *dst, struct kind kind) {
    for (int64_t start = 0; start < n; start += width, ++scales) {
        const int64_t stop = n - start < width ? n : start + width;
        const float scale = *scales == 0 ? 1.f : *scales;
        int64_t i = start;
        for (; i + QK_LANES <= stop; i += QK_LANES) {
            vi_store_u8(dst + i, small_code(vf_load(x + i) / vf_set1(scale), kind));
        }
        if (i < stop) {
            float tail[QK_LANES] = {0};
            uint8_t out[QK_LANES];
            memcpy(tail, x + i, (size_t)(stop - i) * sizeof *x);
            vi_store_u8(out, small_code(vf_load(tail) / vf_set1(scale), kind));
            memcpy(dst + i, out, (size_t)(stop - i));
        }
    }
}

void QK_FN(small_floats)(int kind, const float *x, const float *scales, int64_t n, int64_t width,
                         uint8_t *dst) {
    if (kind == QK_E4M3) {
        small_codes(x, scales, n, width, dst, (struct kind){3, 7, 448.f, 1});
    } else if (kind == QK_E2M1) {
        small_codes(x, scales, n, width, dst, (struct kind){1, 1, 6.f, 1});
    } else {
        small_codes(x, scales, n, width, dst, (struct kind){1, 1, 6.f, 0});
    }
}
