/* The search for a scale and a min: make_qkx2_quants and make_qkx3_quants in ggml-quants.c. */
#ifndef QUANTCLI_SEARCH_AFFINE_H
#define QUANTCLI_SEARCH_AFFINE_H

#include "search_rule.h"

/* Sub-blocks searched at once: independent chains of additions hide one another's latency. */
#define GROUPS 4
#define EACH(g) _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; ++g)

/* The trial scales of an affine search: (first + step*k + nmax) / (max - min), k = 0 ... last. */
struct trials {
    float first, step;
    int last;
};

struct affine_sums {
    vf l, l2, xl;
};

/* The best fit so far of one sub-block in each lane: x ~ scale * code + min. */
struct affine_fit {
    vf scale, min; /* min is never positive */
    struct code_rule rule;
    vf error;
    vf high, weight, sum_x;
    vf tame_low, tame_high; /* a min between them keeps every quotient far below 2^22 */
};

/* Code of the quotient v as a float, for |v| < 2^22. Floats that are not negative are ordered as
 * integers, and clamping them as integers leaves the float adders to the sums. */
QK_INLINE vf affine_code(vf v, int nmax) {
#ifdef QK_HAS_INT_MINMAX
    const vi floor = vi_max((vi)vf_round(v), vi_set1(0));
    return (vf)vi_min(floor, (vi)vf_set1((float)nmax));
#else
    return vf_min(vf_max(vf_round(v), vf_set1(0)), vf_set1((float)nmax));
#endif
}

QK_INLINE vf wrapping_code(vf v, int nmax) {
    return vf_from(vi_max(vi_set1(0), vi_min(vi_set1(nmax), vi_nearest(v))));
}

/* Codes first and sums after them: two short loops keep the adders busier than one whose chains
 * from element to sum are long. */
QK_INLINE void affine_pass(const int wraps, const vf *x, const vf *w, const int n, const int nmax,
                           const vf *inverse, const struct affine_fit *fit, vf *restrict codes,
                           struct affine_sums *restrict sums) {
    vf min[GROUPS];
    struct affine_sums s[GROUPS];
    EACH(g) {
        min[g] = fit[g].min;
        s[g] = (struct affine_sums){{0}, {0}, {0}};
    }
    for (int i = 0; i < n; ++i) {
        EACH(g) {
            const vf v = inverse[g] * (x[g * n + i] - min[g]);
            codes[g * n + i] = wraps ? wrapping_code(v, nmax) : affine_code(v, nmax);
        }
    }
    for (int i = 0; i < n; ++i) {
        EACH(g) {
            const vf l = codes[g * n + i], wl = w[g * n + i] * l;
            s[g].l += wl;
            s[g].l2 += wl * l;
            s[g].xl += wl * x[g * n + i];
        }
    }
    EACH(g) sums[g] = s[g];
}

QK_INLINE void error_pass(const vf *x, const vf *w, const int n, const int absolute,
                          const vf *scale, const vf *min, const vf *codes, vf *restrict error) {
    vf sum[GROUPS];
    EACH(g) sum[g] = (vf){0};
    for (int i = 0; i < n; ++i) {
        EACH(g) {
            const vf diff = scale[g] * codes[g * n + i] + min[g] - x[g * n + i];
            if (absolute) sum[g] += w[g * n + i] * vf_abs(diff);
            else sum[g] += w[g * n + i] * (diff * diff);
        }
    }
    EACH(g) error[g] = sum[g];
}

/* The plain fit: the range divided evenly. */
QK_INLINE void start_affine(const vf *x, const vf *w, const int n, const int nmax,
                            const int absolute, vf *restrict codes, struct affine_fit *fit) {
    vf scale[GROUPS], min[GROUPS], error[GROUPS];
    vi flat[GROUPS];
    EACH(g) {
        vf low = x[g * n], high = low, weight = w[g * n], sum_x = weight * low;
        for (int i = 1; i < n; ++i) {
            const vf xi = x[g * n + i], wi = w[g * n + i];
            low = vf_min(xi, low);
            high = vf_max(xi, high);
            weight += wi;
            sum_x += wi * xi;
        }
        min[g] = vf_sel(low > 0.f, vf_set1(0), low);
        flat[g] = high <= min[g];
        const vf range = high - min[g], inverse = (float)nmax / range;
        scale[g] = 1.f / inverse;
        for (int i = 0; i < n; ++i) {
            codes[g * n + i] = wrapping_code(inverse * (x[g * n + i] - min[g]), nmax);
        }
        fit[g].scale = scale[g];
        fit[g].min = min[g];
        fit[g].rule.inverse = vf_sel(flat[g], vf_set1(0), inverse);
        fit[g].rule.offset = min[g];
        fit[g].high = high;
        fit[g].weight = weight;
        fit[g].sum_x = sum_x;
        /* Between these a trial's range is at least a hundredth of this one, and quotients stay
         * small. Never tame: ranges that are tiny, huge or near the precision of their ends. Flat
         * lanes may compute anything. */
        const vi sane = (range > 1e-33f) & (range < 1e34f) & (vf_abs(min[g]) < 1e4f * range);
        const vf floor = vf_sel(sane, min[g] - 1e3f * range, vf_set1(INFINITY));
        fit[g].tame_low = vf_sel(flat[g], vf_set1(-INFINITY), floor);
        fit[g].tame_high = vf_sel(flat[g], vf_set1(INFINITY), min[g] + 0.99f * range);
    }
    error_pass(x, w, n, absolute, scale, min, codes, error);
    /* Flat lanes have the scale 0, 1 / (nmax / 0), and no trial improves on it. */
    EACH(g) fit[g].error = vf_sel(flat[g], vf_set1(-INFINITY), error[g]);
}

/* Codes of a trial, and the least-squares scale and min for them. */
QK_INLINE void try_affine(const vf *x, const vf *w, const int n, const int nmax, float target,
                          const struct affine_fit *fit, vf *restrict codes,
                          vf *restrict inverse, vf *restrict scale, vf *restrict min,
                          vi *restrict solvable) {
    vi wild = {0};
    EACH(g) {
        const vf now = fit[g].min;
        inverse[g] = target / (fit[g].high - now);
        wild |= ~((now >= fit[g].tame_low) & (now <= fit[g].tame_high));
    }
    struct affine_sums sums[GROUPS];
    if (__builtin_expect(vi_any(wild), 0)) {
        affine_pass(1, x, w, n, nmax, inverse, fit, codes, sums);
    } else {
        affine_pass(0, x, w, n, nmax, inverse, fit, codes, sums);
    }
    EACH(g) {
        const struct affine_sums s = sums[g];
        const vf weight = fit[g].weight, sum_x = fit[g].sum_x;
        const vf det = weight * s.l2 - s.l * s.l;
        solvable[g] = det > 0.f;
        scale[g] = (weight * s.xl - sum_x * s.l) / det;
        min[g] = (s.l2 * sum_x - s.l * s.xl) / det;
        const vi positive = min[g] > 0.f;
        if (vi_any(positive)) {
            scale[g] = vf_sel(positive, s.xl / s.l2, scale[g]);
            min[g] = vf_sel(positive, vf_set1(0), min[g]);
        }
    }
}

/* GROUPS sub-blocks of n elements, consecutive in x and w: codes 0 ... nmax, least weighted
 * squares (or absolute error). */
QK_INLINE void fit_affine(const vf *x, const vf *w, const int n, const int nmax,
                          const struct trials trials, const int absolute,
                          struct affine_fit *fit) {
    vf codes[GROUPS * 32];
    start_affine(x, w, n, nmax, absolute, codes, fit);
    for (int k = 0; k <= trials.last; ++k) {
        const float target = trials.first + trials.step * (float)k + (float)nmax;
        vf inverse[GROUPS], scale[GROUPS], min[GROUPS], error[GROUPS];
        vi solvable[GROUPS];
        try_affine(x, w, n, nmax, target, fit, codes, inverse, scale, min, solvable);
        error_pass(x, w, n, absolute, scale, min, codes, error);
        EACH(g) {
            const vi better = solvable[g] & (error[g] < fit[g].error);
            fit[g].rule.inverse = vf_sel(better, inverse[g], fit[g].rule.inverse);
            fit[g].rule.offset = vf_sel(better, fit[g].min, fit[g].rule.offset);
            fit[g].error = vf_sel(better, error[g], fit[g].error);
            fit[g].scale = vf_sel(better, scale[g], fit[g].scale);
            fit[g].min = vf_sel(better, min[g], fit[g].min);
        }
    }
    EACH(g) fit[g].min = -fit[g].min;
}

#endif
