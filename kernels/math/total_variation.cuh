// Total variation, sum |p - q| / 2. Its slope is half the sign of q - p, and 0 where they are equal: equal rows are summed
// alike, and have a gradient of 0.
#pragma once

#include "two_sweeps.cuh"

struct TotalVariationTerm {
    template <class G> static ATKD_DEVICE void by_form(const atkd_divergence &, G f) { f(Flag<true>()); }

    // Adds |p - q| to the teacher's sum and q times the sign to the student's.
    template <bool, class Real>
    static ATKD_DEVICE void add(PairSums<Real> &sums, const atkd_divergence &, const Pair<Real> &pair) {
        sums.teacher += fabs_of(pair.teacher - pair.student);
        sums.student += pair.log_ratio == 0 ? 0 : pair.log_ratio > 0 ? -pair.student : pair.student;
    }
    template <class Real> static ATKD_DEVICE Real value(const atkd_divergence &, const PairSums<Real> &sums) {
        return Real(0.5) * sums.teacher;
    }
    template <class Real> static ATKD_DEVICE Real mean(const atkd_divergence &, const PairSums<Real> &sums) {
        return Real(0.5) * sums.student;
    }
    template <bool> static ATKD_DEVICE float slope(const atkd_divergence &, float log_ratio) {
        return log_ratio == 0 ? 0 : log_ratio > 0 ? -0.5f : 0.5f;
    }
};

using TotalVariation = TwoSweeps<TotalVariationTerm>;
