/* What every scale search shares. Each lane searches for one sub-block (or block, or one
 * super-block's scales): it tries a fixed list of scales, rounds with each, fits the scale to the
 * codes by least squares and keeps the best fit. Sums run over the elements in order within each
 * lane, and a branch of the reference is a lane mask.
 *
 * The codes of the winning fit are not kept but given as a rule, code = clamp(round(inverse *
 * (x - offset))): most formats need them only where the rounded scale of a sub-block is zero.
 */
#ifndef QUANTCLI_SEARCH_RULE_H
#define QUANTCLI_SEARCH_RULE_H

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

#endif
