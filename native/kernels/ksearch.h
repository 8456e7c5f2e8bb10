/* The scale searches of the K-quants and of the formats of 32 weights: each lane one (sub-)block, or
 * one super-block's scales.
 *
 * A search tries a fixed list of scales, rounds the sub-block with each, fits scale (and min) to
 * the codes by least squares and keeps the best fit. Sources: make_qkx2_quants/make_qkx3_quants
 * (fit_affine), make_qx_quants (fit_symmetric), make_q3_quants (fit_by_sweeps) and make_qp_quants
 * (fit_positive) in ggml-quants.c. Sums run over the elements in order within each lane, and a
 * branch of the reference is a lane mask.
 *
 * The codes of the winning fit are not kept but given as a rule, code = clamp(round(inverse *
 * (x - offset))), because they are needed only where the rounded sub-block scale is zero.
 */
#ifndef QUANTCLI_KSEARCH_H
#define QUANTCLI_KSEARCH_H

#include "lanes.h"

#define TINY 1e-15f /* GROUP_MAX_EPS: below it a group counts as all zero */

struct code_rule {
    vf inverse, offset;
};

/* The rule's codes, for values of any size: nearest_int wraps beyond 2^22. */
QK_INLINE vi rule_code(struct code_rule rule, vf x, int lowest, int highest) {
    const vi code = vi_nearest(rule.inverse * (x - rule.offset));
    return vi_max(vi_set1(lowest), vi_min(vi_set1(highest), code));
}

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
    vi flat;
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
        const vi flat = high <= min[g];
        const vf range = high - min[g], inverse = (float)nmax / range;
        scale[g] = 1.f / inverse;
        for (int i = 0; i < n; ++i) {
            codes[g * n + i] = wrapping_code(inverse * (x[g * n + i] - min[g]), nmax);
        }
        fit[g].scale = scale[g];
        fit[g].min = min[g];
        fit[g].rule.inverse = vf_sel(flat, vf_set1(0), inverse);
        fit[g].rule.offset = min[g];
        fit[g].high = high;
        fit[g].weight = weight;
        fit[g].sum_x = sum_x;
        fit[g].flat = flat;
        /* Between these a trial's range is about half to twice this one. Never tame: ranges that
         * are tiny, huge or near the precision of their ends. Flat lanes may compute anything. */
        const vi sane = (range > 1e-35f) & (range < 1e37f) & (vf_abs(min[g]) < 1e5f * range);
        const vf floor = vf_sel(sane, min[g] - range, vf_set1(INFINITY));
        fit[g].tame_low = vf_sel(flat, vf_set1(-INFINITY), floor);
        fit[g].tame_high = vf_sel(flat, vf_set1(INFINITY), min[g] + 0.5f * range);
    }
    error_pass(x, w, n, absolute, scale, min, codes, error);
    EACH(g) fit[g].error = vf_sel(fit[g].flat, vf_set1(-INFINITY), error[g]); /* beyond improving */
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
    EACH(g) {
        fit[g].scale = vf_sel(fit[g].flat, vf_set1(0), fit[g].scale);
        fit[g].min = -fit[g].min;
    }
}

/* Code of the quotient v as a float, -nmax ... nmax - 1. |v| is at most nmax + 1, and less than
 * nmax + 0.5 when below is 0. Integer clamps as in affine_code; as unsigned integers, negative
 * floats are ordered by size and follow all others. */
QK_INLINE vf symmetric_code(vf v, int nmax, int below) {
    const vf l = vf_round(v);
#ifdef QK_HAS_INT_MINMAX
    const vi code = vi_min((vi)l, (vi)vf_set1((float)nmax - 1));
    return below ? (vf)vi_min_unsigned(code, (vi)vf_set1(-(float)nmax)) : (vf)code;
#else
    const vf code = vf_min(l, vf_set1((float)nmax - 1));
    return below ? vf_max(code, vf_set1(-(float)nmax)) : code;
#endif
}

/* The value of largest magnitude, the first of equals. */
QK_INLINE vf signed_peak(const vf *x, const int n) {
    vf peak = {0}, size = {0};
    for (int i = 0; i < n; ++i) {
        const vf a = vf_abs(x[i]);
        const vi larger = a > size;
        size = vf_sel(larger, a, size);
        peak = vf_sel(larger, x[i], peak);
    }
    return peak;
}

struct symmetric_fit {
    vf scale, best;
    struct code_rule rule;
    vi zero; /* the codes of an all-zero group are 0, not nmax */
};

/* count trials of scales -peak / (nmax + 0.1*step), from step on, in order; plain says that the
 * first of them is the plain fit, -peak / nmax. wraps is for values that need not be finite. */
QK_INLINE void try_symmetric(const vf *x, const vf *w, const int n, const int nmax,
                             const int wraps, const int plain, const int step, const int count,
                             vf peak, struct symmetric_fit *fit) {
    vf inverse[4], sum_xl[4], sum_l2[4];
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
        const float at = plain ? (k == 0 ? 0.f : (float)(step + k - 1)) : (float)(step + k);
        inverse[k] = -((float)nmax + 0.1f * at) / peak;
        sum_xl[k] = sum_l2[k] = (vf){0};
    }
    for (int i = 0; i < n; ++i) {
        const vf xi = x[i], wi = w[i], wx = wi * xi;
#pragma GCC unroll 4
        for (int k = 0; k < count; ++k) {
            const vf v = inverse[k] * xi;
            vf l;
            if (wraps) {
                l = vf_from(vi_max(vi_set1(-nmax), vi_min(vi_set1(nmax - 1), vi_nearest(v))));
            } else {
                l = symmetric_code(v, nmax, step + count > 5);
            }
            sum_xl[k] += wx * l;
            sum_l2[k] += wi * l * l;
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
        const vf quotient = sum_xl[k] / sum_l2[k];
        if (plain && k == 0) {
            fit->scale = vf_sel(sum_l2[k] == 0.f, vf_set1(0), quotient);
            fit->best = fit->scale * sum_xl[k];
            fit->rule.inverse = inverse[k];
        } else {
            const vf squared = sum_xl[k] * sum_xl[k];
            const vi better = (sum_l2[k] > 0.f) & (squared > fit->best * sum_l2[k]);
            fit->scale = vf_sel(better, quotient, fit->scale);
            fit->best = vf_sel(better, quotient * sum_xl[k], fit->best);
            fit->rule.inverse = vf_sel(better, inverse[k], fit->rule.inverse);
        }
    }
}

/* x ~ scale * (code - nmax), codes 0 ... 2*nmax-1, over n elements with weights w. */
QK_INLINE void fit_symmetric(const vf *x, const vf *w, const int n, const int nmax,
                             const int wraps, struct symmetric_fit *fit) {
    vf peak = signed_peak(x, n);
    fit->zero = vf_abs(peak) < TINY;
    fit->rule.offset = vf_set1(0);
    peak = vf_sel(fit->zero, vf_set1(1), peak);
    try_symmetric(x, w, n, nmax, wraps, 1, -9, 4, peak, fit);
    try_symmetric(x, w, n, nmax, wraps, 0, -6, 3, peak, fit);
    try_symmetric(x, w, n, nmax, wraps, 0, -3, 3, peak, fit);
    try_symmetric(x, w, n, nmax, wraps, 0, 1, 3, peak, fit);
    try_symmetric(x, w, n, nmax, wraps, 0, 4, 3, peak, fit);
    try_symmetric(x, w, n, nmax, wraps, 0, 7, 3, peak, fit);
    fit->scale = vf_sel(fit->zero, vf_set1(0), fit->scale);
}

/* x ~ scale * (code - nmax) over 16 elements with weights x^2: plain rounding, then up to five
 * sweeps that give one element after the other the code that is best with all others as they are.
 *
 * Changes are rare, so a step first asks whether any lane has one. The sums then stay what they
 * were, and steps that the processor rightly guesses to change nothing run side by side. */
QK_INLINE vf fit_by_sweeps(const vf *x, const int nmax, vi *restrict codes) {
    const int n = 16;
    const vf peak = signed_peak(x, n);
    const vi zero = vf_abs(peak) < TINY;
    const vf inverse = -(float)nmax / vf_sel(zero, vf_set1(1), peak);
    vf sum_xl = {0}, sum_l2 = {0};
    vf levels[16], xl[16], l2[16]; /* what each element adds to the sums */
    for (int i = 0; i < n; ++i) {
        const vf xi = x[i], w = xi * xi, l = symmetric_code(inverse * xi, nmax, 0);
        levels[i] = l;
        xl[i] = w * xi * l;
        l2[i] = w * l * l;
        sum_xl += xl[i];
        sum_l2 += l2[i];
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        vi changed = {0};
        for (int i = 0; i < n; ++i) {
            const vf xi = x[i], other_xl = sum_xl - xl[i], other_l2 = sum_l2 - l2[i];
            const vi rounded = vi_min(vi_set1(nmax - 1), vi_nearest(xi * other_l2 / other_xl));
            const vf l = vf_from(vi_max(vi_set1(-nmax), rounded));
            vi better = (other_xl > 0.f) & (l != levels[i]);
            if (!vi_any(better)) continue;
            const vf w = xi * xi, new_xl = w * xi * l, new_l2 = w * l * l;
            const vf all_xl = other_xl + new_xl, all_l2 = other_l2 + new_l2;
            better &= (all_l2 > 0.f) & (all_xl * all_xl * sum_l2 > sum_xl * sum_xl * all_l2);
            levels[i] = vf_sel(better, l, levels[i]);
            xl[i] = vf_sel(better, new_xl, xl[i]);
            l2[i] = vf_sel(better, new_l2, l2[i]);
            sum_xl = vf_sel(better, all_xl, sum_xl);
            sum_l2 = vf_sel(better, all_l2, sum_l2);
            changed |= better;
        }
        if (!vi_any(changed)) break;
    }
    for (int i = 0; i < n; ++i) codes[i] = (vi_from(levels[i]) + nmax) & ~zero;
    return vf_sel(~zero & (sum_l2 > 0.f), sum_xl / sum_l2, vf_set1(0));
}

/* x ~ scale * code for n values that should not be negative, codes 0 ... nmax (kept as bytes),
 * weights w: nine scales, then sweeps as above. */
QK_INLINE vf fit_positive(const vf *x, const vf *w, const int n, const int nmax,
                          vi *restrict codes) {
    vf max = {0};
    for (int i = 0; i < n; ++i) max = vf_max(max, x[i]);
    const vi zero = max < TINY;
    max = vf_sel(zero, vf_set1(1), max);
    vf inverse = (float)nmax / max, best = {0};
    const vf first_scale = 1.f / inverse;
    for (int i = 0; i < n; ++i) {
        const vf diff = x[i] - first_scale * vf_from(vi_nearest(inverse * x[i]) & 0xff);
        best += w[i] * diff * diff;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const vf try_inverse = (0.1f * (float)step + (float)nmax) / max;
        const vf try_scale = 1.f / try_inverse;
        vf error = {0};
        for (int i = 0; i < n; ++i) {
            const vf l = vf_from(vi_min(vi_set1(nmax), vi_nearest(try_inverse * x[i])));
            const vf diff = x[i] - try_scale * l;
            error += w[i] * diff * diff;
        }
        const vi better = error < best;
        best = vf_sel(better, error, best);
        inverse = vf_sel(better, try_inverse, inverse);
    }
    vf sum_xl = {0}, sum_l2 = {0};
    for (int i = 0; i < n; ++i) {
        const vi code = vi_min(vi_set1(nmax), vi_nearest(inverse * x[i]));
        const vf l = vf_from(code);
        codes[i] = code & 0xff;
        sum_xl += w[i] * x[i] * l;
        sum_l2 += w[i] * l * l;
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        vi changed = {0};
        for (int i = 0; i < n; ++i) {
            const vf wx = w[i] * x[i], old = vf_from(codes[i]);
            const vf other_xl = sum_xl - wx * old, other_l2 = sum_l2 - w[i] * old * old;
            const vi code = vi_min(vi_set1(nmax), vi_nearest(x[i] * other_l2 / other_xl));
            vi better = (other_xl > 0.f) & (other_l2 > 0.f) & (code != codes[i]) & ~zero;
            if (!vi_any(better)) continue;
            const vf l = vf_from(code), all_xl = other_xl + wx * l;
            const vf all_l2 = other_l2 + w[i] * l * l;
            better &= all_xl * all_xl * sum_l2 > sum_xl * sum_xl * all_l2;
            codes[i] = vi_sel(better, code & 0xff, codes[i]);
            sum_xl = vf_sel(better, all_xl, sum_xl);
            sum_l2 = vf_sel(better, all_l2, sum_l2);
            changed |= better;
        }
        if (!vi_any(changed)) break;
    }
    for (int i = 0; i < n; ++i) codes[i] &= ~zero;
    return vf_sel(~zero & (sum_l2 > 0.f), sum_xl / sum_l2, vf_set1(0));
}

#endif
