// Total variation, sum |p - q| / 2. Its slope is half the sign of q - p, and 0 where they are equal: equal rows are summed
// alike, and have a gradient of 0.
#pragma once

#include "two_sweeps.cuh"

struct TotalVariationTerms {
    template <class Real> struct Terms {
        Real distance; // sum |p - q|
        Real sign;     // sum q sign(q - p)

        template <bool CE_SUM, class F, class... States> static ATKD_DEVICE void visit(F f, States &...states) {
            f(FieldKind<SUM>(), states.distance...);
            f(FieldKind<SUM>(), states.sign...);
        }
        static constexpr uint32_t FLOATS = 2, FLAGS = 0;
        static constexpr bool RELATIVE = false;
        static ATKD_DEVICE Terms empty() { return {0, 0}; }
    };

    template <class Real>
    static ATKD_DEVICE void add(Terms<Real> &terms, const atkd_divergence &divergence, const Pair<Real> &pair) {
        terms.distance += pair.larger * (1 - pair.ratio);
        terms.sign += 2 * slope(divergence, pair) * pair.student();
    }

    template <class Real> static ATKD_DEVICE Real slope(const atkd_divergence &, const Pair<Real> &pair) {
        return pair.log_ratio == 0 ? 0 : pair.log_ratio > 0 ? Real(-0.5) : Real(0.5);
    }

    template <class Real> static ATKD_DEVICE Real mean_slope(const atkd_divergence &, const Terms<Real> &terms) {
        return terms.sign / 2;
    }

    template <class Real> static ATKD_DEVICE Real value(const atkd_divergence &, const Terms<Real> &terms) {
        return terms.distance / 2;
    }
};

using TotalVariation = TwoSweeps<TotalVariationTerms>;
