/* The search for a signed scale: make_qx_quants in ggml-quants.c. */
#ifndef QUANTCLI_SEARCH_SYMMETRIC_H
#define QUANTCLI_SEARCH_SYMMETRIC_H

#include "search_rule.h"

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

#endif
