// Divergences from a mixture of the models: of_teacher KL(p, m) + of_student KL(q, m), m = share p + (1 - share) q. The
// generalised Jensen-Shannon divergence has the weights share and 1 - share; the skewed KL divergences have one of the two.
//
//   h_j = of_student log(q_j / m_j) + of_ratio (p_j / m_j - 1)      of_ratio = of_student share - of_teacher (1 - share)
//
// up to a constant, and so that it is 0 where p = q. For JSD it is the first term. With r = log(p / q) the larger
// probability is taken out of m, so that 1 + t is left, t = k (e^{-|r|} - 1), where k is the share of the smaller: both
// logarithms follow from log1p(t), and p / m - 1 is a number times t / (1 + t).
#pragma once

#include "two_sweeps.cuh"

struct MixtureTerm {
    template <class Real>
    static ATKD_DEVICE PairTerm<Real> of(const atkd_divergence &divergence, const Pair<Real> &pair) {
        bool teacher_is_larger = pair.log_ratio > 0;
        Real t = Real(teacher_is_larger ? divergence.rest : divergence.share) * (pair.ratio - 1);
        // log2 of m over the larger; of p / m, and of q / m.
        Real log_mixture = log2_1p(t);
        Real teacher = -larger_of(-pair.log_ratio, Real(0)) - log_mixture;
        Real student = -larger_of(pair.log_ratio, Real(0)) - log_mixture;
        Real of_excess = Real(teacher_is_larger ? divergence.teacher_excess : divergence.student_excess);
        return {
            (Real(divergence.of_teacher) * pair.teacher() * teacher +
             Real(divergence.of_student) * pair.student() * student) *
                Real(LN_2),
            Real(divergence.of_student) * Real(LN_2) * student + of_excess * t * inverse_of(1 + t),
        };
    }
};

using Mixture = TwoSweeps<MixtureTerm>;
