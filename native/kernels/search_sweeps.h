/* Searches that improve one code after the other: make_q3_quants (fit_by_sweeps) and make_qp_quants
 * (fit_positive) in ggml-quants.c.
 */
#ifndef QUANTCLI_SEARCH_SWEEPS_H
#define QUANTCLI_SEARCH_SWEEPS_H

#include "search_symmetric.h"

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
