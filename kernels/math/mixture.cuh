// Divergences from a mixture of the models: of_teacher KL(p, m) + of_student KL(q, m), m = share p + (1 - share) q. The
// generalised Jensen-Shannon divergence has the weights share and 1 - share; the skewed KL divergences have one of the two.
//
//   h_j = of_student log(q_j / m_j) + of_ratio p_j / m_j        of_ratio = of_student share - of_teacher (1 - share)
//
// which for JSD is its first term. With r = log(p / q) the larger probability is taken out of m: both logarithms follow
// from log1p(k (e^{-|r|} - 1)), where k is the share of the smaller one.
#pragma once

#include "two_sweeps.cuh"

struct MixtureTerms {
    template <class Real> struct Terms {
        Real teacher, student; // sum p log2(p / m), sum q log2(q / m)
        Real ratio;            // sum q p / m

        template <bool CE_SUM, class F, class... States> static ATKD_DEVICE void visit(F f, States &...states) {
            f(FieldKind<SUM>(), states.teacher...);
            f(FieldKind<SUM>(), states.student...);
            f(FieldKind<SUM>(), states.ratio...);
        }
        static constexpr uint32_t FLOATS = 3, FLAGS = 0;
        static constexpr bool RELATIVE = false;
        static ATKD_DEVICE Terms empty() { return {0, 0, 0}; }
    };

    // The pair by what m is made of: log2 of m over the larger, and p / m.
    template <class Real> struct Mixed {
        Real log_mixture, ratio;

        ATKD_DEVICE Mixed(const atkd_divergence &divergence, const Pair<Real> &pair) {
            bool teacher_is_larger = pair.log_ratio > 0;
            Real t = Real(teacher_is_larger ? divergence.rest : divergence.share) * (pair.ratio - 1);
            log_mixture = log2_1p(t);
            ratio = divergence.of_ratio == 0 ? 0 : (teacher_is_larger ? 1 : pair.ratio) * inverse_of(1 + t);
        }
    };

    template <class Real>
    static ATKD_DEVICE void add(Terms<Real> &terms, const atkd_divergence &divergence, const Pair<Real> &pair) {
        Mixed<Real> mixed(divergence, pair);
        Real p = pair.teacher(), q = pair.student();
        terms.teacher += p * (-larger_of(-pair.log_ratio, Real(0)) - mixed.log_mixture);
        terms.student += q * (-larger_of(pair.log_ratio, Real(0)) - mixed.log_mixture);
        terms.ratio += q * mixed.ratio;
    }

    template <class Real>
    static ATKD_DEVICE Real slope(const atkd_divergence &divergence, const Pair<Real> &pair) {
        Mixed<Real> mixed(divergence, pair);
        Real log_student = -larger_of(pair.log_ratio, Real(0)) - mixed.log_mixture;
        return Real(divergence.of_student) * Real(LN_2) * log_student + Real(divergence.of_ratio) * mixed.ratio;
    }

    template <class Real>
    static ATKD_DEVICE Real mean_slope(const atkd_divergence &divergence, const Terms<Real> &terms) {
        return Real(divergence.of_student) * Real(LN_2) * terms.student + Real(divergence.of_ratio) * terms.ratio;
    }

    template <class Real>
    static ATKD_DEVICE Real value(const atkd_divergence &divergence, const Terms<Real> &terms) {
        return (Real(divergence.of_teacher) * terms.teacher + Real(divergence.of_student) * terms.student) * Real(LN_2);
    }
};

using Mixture = TwoSweeps<MixtureTerms>;
