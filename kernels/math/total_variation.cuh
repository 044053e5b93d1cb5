// Total variation, sum |p - q| / 2. Its slope is half the sign of q - p, and 0 where they are equal: equal rows are summed
// alike, and have a gradient of 0.
#pragma once

#include "two_sweeps.cuh"

struct TotalVariationTerm {
    template <class Real>
    static ATKD_DEVICE PairTerm<Real> of(const atkd_divergence &, const Pair<Real> &pair) {
        Real half = Real(0.5);
        return {
            half * pair.larger * (1 - pair.ratio),
            pair.log_ratio == 0  ? 0
            : pair.log_ratio > 0 ? -half
                                 : half,
        };
    }
};

using TotalVariation = TwoSweeps<TotalVariationTerm>;
