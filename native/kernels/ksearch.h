/* The scale searches of the K-quants, each lane one sub-block (or one super-block's scales).
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

/* Sub-blocks searched at once: independent chains of additions hide one another's latency. */
#define GROUPS 2
#define EACH_GROUP(g) _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; ++g)

struct code_rule {
    vf inverse, offset;
};

/* The rule's codes, for values of any size: nearest_int wraps beyond 2^22. */
QK_INLINE vi rule_code(struct code_rule rule, vf x, int lowest, int highest) {
    const vi code = vi_nearest(rule.inverse * (x - rule.offset));
    return vi_max(vi_set1(lowest), vi_min(vi_set1(highest), code));
}

/* How a candidate's codes have to be computed for the whole group, cheapest first. */
enum rounding { UNCLAMPED, CLAMPED, WRAPPING };

QK_INLINE vf affine_code(enum rounding rounding, vf v, int nmax) {
    if (rounding == UNCLAMPED) return vf_round(v);
    if (rounding == CLAMPED) return vf_min(vf_max(vf_round(v), vf_set1(0)), vf_set1((float)nmax));
    return vf_from(vi_max(vi_set1(0), vi_min(vi_set1(nmax), vi_nearest(v))));
}

struct affine_sums {
    vf l, l2, xl;
};

QK_INLINE void sum_affine(const enum rounding rounding, const vf *x, const vf *w, const int n,
                          const int nmax, const vf *inverse, const vf *min, vf *restrict codes,
                          struct affine_sums *restrict sums) {
    EACH_GROUP(g) sums[g] = (struct affine_sums){{0}, {0}, {0}};
    for (int i = 0; i < n; ++i) {
        EACH_GROUP(g) {
            const vf xi = x[g * n + i];
            const vf l = affine_code(rounding, inverse[g] * (xi - min[g]), nmax);
            const vf wl = w[g * n + i] * l;
            codes[g * n + i] = l;
            sums[g].l += wl;
            sums[g].l2 += wl * l;
            sums[g].xl += wl * xi;
        }
    }
}

QK_INLINE void sum_error(const vf *x, const vf *w, const int n, const int absolute,
                         const vf *scale, const vf *min, const vf *codes, vf *restrict error) {
    EACH_GROUP(g) error[g] = (vf){0};
    for (int i = 0; i < n; ++i) {
        EACH_GROUP(g) {
            const vf diff = scale[g] * codes[g * n + i] + min[g] - x[g * n + i];
            if (absolute) error[g] += w[g * n + i] * vf_abs(diff);
            else error[g] += w[g * n + i] * (diff * diff);
        }
    }
}

/* The trial scales of an affine search: (first + step*k + nmax) / (max - min), k = 0 ... last. */
struct trials {
    float first, step;
    int last;
};

struct affine_fit {
    vf scale;
    vf min; /* what is subtracted: never negative */
    vf weight;
    struct code_rule rule;
};

/* GROUPS sub-blocks of n elements, consecutive in x and w: x ~ scale * code - min, codes 0..nmax,
 * least weighted squares (or absolute error). */
QK_INLINE void fit_affine(const vf *x, const vf *w, const int n, const int nmax,
                          const struct trials trials, const int absolute,
                          struct affine_fit *fit) {
    vf low[GROUPS], high[GROUPS], min[GROUPS], sum_w[GROUPS], sum_x[GROUPS];
    vf inverse[GROUPS], scale[GROUPS], best[GROUPS];
    vi flat[GROUPS];
    vf codes[GROUPS * 32];
    EACH_GROUP(g) {
        low[g] = high[g] = x[g * n];
        sum_w[g] = w[g * n];
        sum_x[g] = sum_w[g] * x[g * n];
    }
    for (int i = 1; i < n; ++i) {
        EACH_GROUP(g) {
            const vf xi = x[g * n + i], wi = w[g * n + i];
            low[g] = vf_min(xi, low[g]);
            high[g] = vf_max(xi, high[g]);
            sum_w[g] += wi;
            sum_x[g] += wi * xi;
        }
    }
    EACH_GROUP(g) {
        min[g] = vf_sel(low[g] > 0.f, vf_set1(0), low[g]);
        flat[g] = high[g] <= min[g];
        /* Flat lanes get harmless numbers here and their result at the end. */
        inverse[g] = (float)nmax / vf_sel(flat[g], vf_set1((float)nmax), high[g] - min[g]);
        scale[g] = 1.f / inverse[g];
        fit[g].rule.inverse = vf_sel(flat[g], vf_set1(0), inverse[g]);
        fit[g].rule.offset = min[g];
        for (int i = 0; i < n; ++i) {
            codes[g * n + i] = vf_from(vi_max(vi_set1(0), vi_min(vi_set1(nmax),
                vi_nearest(inverse[g] * (x[g * n + i] - min[g])))));
        }
    }
    sum_error(x, w, n, absolute, scale, min, codes, best);
    for (int k = 0; k <= trials.last; ++k) {
        const float target = trials.first + trials.step * (float)k + (float)nmax;
        vi outside = {0}, wild = {0};
        EACH_GROUP(g) {
            inverse[g] = target / vf_sel(flat[g], vf_set1((float)nmax), high[g] - min[g]);
            /* Rounding is monotone, so the extremes bound every element's quotient. */
            const vf a = inverse[g] * (low[g] - min[g]), b = inverse[g] * (high[g] - min[g]);
            outside |= ~((a >= -0.5f) & (a < nmax + 0.5f) & (b >= -0.5f) & (b < nmax + 0.5f));
            wild |= ~((vf_abs(a) < 4e6f) & (vf_abs(b) < 4e6f));
        }
        struct affine_sums sums[GROUPS];
        if (!vi_any(outside)) {
            sum_affine(UNCLAMPED, x, w, n, nmax, inverse, min, codes, sums);
        } else if (!vi_any(wild)) {
            sum_affine(CLAMPED, x, w, n, nmax, inverse, min, codes, sums);
        } else {
            sum_affine(WRAPPING, x, w, n, nmax, inverse, min, codes, sums);
        }
        vf try_scale[GROUPS], try_min[GROUPS], error[GROUPS];
        vi solvable[GROUPS];
        EACH_GROUP(g) {
            const struct affine_sums s = sums[g];
            const vf det = sum_w[g] * s.l2 - s.l * s.l;
            solvable[g] = (det > 0.f) & ~flat[g];
            try_scale[g] = (sum_w[g] * s.xl - sum_x[g] * s.l) / det;
            try_min[g] = (s.l2 * sum_x[g] - s.l * s.xl) / det;
            const vi positive = try_min[g] > 0.f;
            if (vi_any(positive)) {
                try_scale[g] = vf_sel(positive, s.xl / s.l2, try_scale[g]);
                try_min[g] = vf_sel(positive, vf_set1(0), try_min[g]);
            }
        }
        sum_error(x, w, n, absolute, try_scale, try_min, codes, error);
        EACH_GROUP(g) {
            const vi better = solvable[g] & (error[g] < best[g]);
            fit[g].rule.inverse = vf_sel(better, inverse[g], fit[g].rule.inverse);
            fit[g].rule.offset = vf_sel(better, min[g], fit[g].rule.offset);
            best[g] = vf_sel(better, error[g], best[g]);
            scale[g] = vf_sel(better, try_scale[g], scale[g]);
            min[g] = vf_sel(better, try_min[g], min[g]);
        }
    }
    EACH_GROUP(g) {
        fit[g].scale = vf_sel(flat[g], vf_set1(0), scale[g]);
        fit[g].min = -min[g];
        fit[g].weight = sum_w[g];
    }
}

/* x ~ scale * (code - nmax), codes 0 ... 2*nmax-1, over n elements with weights w; returns the
 * scale. Elements are finite unless wrapping is set. */
QK_INLINE vf fit_symmetric(const vf *x, const vf *w, const int n, const int nmax,
                           const int wrapping, struct code_rule *rule, vi *restrict zero) {
    vf peak = {0}, size = {0};
    for (int i = 0; i < n; ++i) {
        const vf xi = x[i], ax = vf_abs(xi);
        const vi larger = ax > size;
        size = vf_sel(larger, ax, size);
        peak = vf_sel(larger, xi, peak);
    }
    *zero = size < TINY;
    peak = vf_sel(*zero, vf_set1(1), peak);
    vf best = {0}, scale = {0};
    rule->inverse = rule->offset = vf_set1(0);
    for (int trial = 0; trial < 19; ++trial) {
        /* 0, then -9 ... 9 without 0. */
        const int step = trial == 0 ? 0 : trial < 10 ? trial - 10 : trial - 9;
        const vf inverse = -((float)nmax + 0.1f * (float)step) / peak;
        vf sum_xl = {0}, sum_l2 = {0};
        for (int i = 0; i < n; ++i) {
            const vf v = inverse * x[i];
            vf l;
            if (wrapping) {
                l = vf_from(vi_max(vi_set1(-nmax), vi_min(vi_set1(nmax - 1), vi_nearest(v))));
            } else {
                l = vf_max(vf_min(vf_round(v), vf_set1((float)nmax - 1)), vf_set1(-(float)nmax));
            }
            sum_xl += w[i] * x[i] * l;
            sum_l2 += w[i] * l * l;
        }
        const vf quotient = sum_xl / sum_l2;
        if (trial == 0) {
            scale = vf_sel(sum_l2 == 0.f, vf_set1(0), quotient);
            best = scale * sum_xl;
            rule->inverse = inverse;
        } else {
            const vi better = (sum_l2 > 0.f) & (sum_xl * sum_xl > best * sum_l2);
            scale = vf_sel(better, quotient, scale);
            best = vf_sel(better, quotient * sum_xl, best);
            rule->inverse = vf_sel(better, inverse, rule->inverse);
        }
    }
    return vf_sel(*zero, vf_set1(0), scale);
}

/* x ~ scale * (code - nmax) with weights x^2: plain rounding, then up to five sweeps that move one
 * code at a time. codes[] gets code (0 where all is zero). */
QK_INLINE vf fit_by_sweeps(const vf *x, const int n, const int nmax, vi *restrict codes) {
    vf peak = {0}, size = {0};
    for (int i = 0; i < n; ++i) {
        const vf xi = x[i], ax = vf_abs(xi);
        const vi larger = ax > size;
        size = vf_sel(larger, ax, size);
        peak = vf_sel(larger, xi, peak);
    }
    const vi zero = size < TINY;
    const vf inverse = -(float)nmax / vf_sel(zero, vf_set1(1), peak);
    vf sum_xl = {0}, sum_l2 = {0};
    vf l[16];
    for (int i = 0; i < n; ++i) {
        const vf xi = x[i], w = xi * xi;
        l[i] = vf_max(vf_min(vf_round(inverse * xi), vf_set1((float)nmax - 1)),
                      vf_set1(-(float)nmax));
        sum_xl += w * xi * l[i];
        sum_l2 += w * l[i] * l[i];
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        vi changed = {0};
        for (int i = 0; i < n; ++i) {
            const vf xi = x[i], w = xi * xi;
            vf xl = sum_xl - w * xi * l[i];
            vf l2 = sum_l2 - w * l[i] * l[i];
            const vf moved = vf_from(vi_max(vi_set1(-nmax), vi_min(vi_set1(nmax - 1),
                vi_nearest(xi * l2 / xl))));
            vi better = (xl > 0.f) & (moved != l[i]);
            xl += w * xi * moved;
            l2 += w * moved * moved;
            better &= (l2 > 0.f) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2);
            l[i] = vf_sel(better, moved, l[i]);
            sum_xl = vf_sel(better, xl, sum_xl);
            sum_l2 = vf_sel(better, l2, sum_l2);
            changed |= better;
        }
        if (!vi_any(changed & ~zero)) break;
    }
    for (int i = 0; i < n; ++i) codes[i] = (vi_from(l[i]) + nmax) & ~zero;
    return vf_sel(~zero & (sum_l2 > 0.f), sum_xl / sum_l2, vf_set1(0));
}

/* x ~ scale * code for n non-negative values, codes 0 ... nmax (kept as bytes), weights w. */
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
            const vf l = vf_from(codes[i]);
            vf xl = sum_xl - w[i] * x[i] * l;
            vf l2 = sum_l2 - w[i] * l * l;
            const vi moved = vi_min(vi_set1(nmax), vi_nearest(x[i] * l2 / xl));
            const vf m = vf_from(moved);
            vi better = (xl > 0.f) & (l2 > 0.f) & (moved != codes[i]);
            xl += w[i] * x[i] * m;
            l2 += w[i] * m * m;
            better &= xl * xl * sum_l2 > sum_xl * sum_xl * l2;
            codes[i] = vi_sel(better, moved & 0xff, codes[i]);
            sum_xl = vf_sel(better, xl, sum_xl);
            sum_l2 = vf_sel(better, l2, sum_l2);
            changed |= better;
        }
        if (!vi_any(changed & ~zero)) break;
    }
    for (int i = 0; i < n; ++i) codes[i] &= ~zero;
    return vf_sel(~zero & (sum_l2 > 0.f), sum_xl / sum_l2, vf_set1(0));
}

#endif
