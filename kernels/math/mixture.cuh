// Divergences from a mixture of the models: of_teacher KL(p, m) + of_student KL(q, m), m = share p + rest q. The generalised
// Jensen-Shannon divergence has the weights share and rest; the skewed KL divergences have one of the two.
//
//   h_j = of_student log(q_j / m_j) + of_difference (p_j - q_j) / m_j
//   of_difference = rest (of_student share - of_teacher rest)
//
// up to a constant, and so that it is 0 where p = q. For JSD it is the first term. With r = log2(p / q) the larger of p and q
// is taken out of m: what is left, u = k 2^-|r| + 1 - k with k the share of the smaller, lies in [1 - k, 1], so that no digit
// of a share is lost beside the other's. Then log2(p / m) = min(r, 0) - log2(u) and log2(q / m) = -max(r, 0) - log2(u). Near
// r = 0, where log2(u) has no digits, it follows from a Taylor polynomial of log2(q / m) in r.
#pragma once

#include "two_sweeps.cuh"

struct MixtureTerm {
    // The logarithm is cut where more of it makes no difference, so that its power is finite. NaN is cut as well.
    static ATKD_DEVICE float cut(float log_ratio) { return fmaxf(fminf(log_ratio, 100.0f), -100.0f); }
    static ATKD_DEVICE double cut(double log_ratio) { return fmax(fmin(log_ratio, 1000.0), -1000.0); }

    template <class Real> struct OfRatio {
        Real log_teacher, log_student, difference; // log2(p / m), log2(q / m), (p - q) / m
    };
    // log2(u), from r and the larger one of it and 0.
    static ATKD_DEVICE float log_rest(const atkd_divergence &divergence, float log_ratio, float above, float u) {
        float polynomial = divergence.taylor[ATKD_TAYLOR - 1];
        ATKD_UNROLL
        for (uint32_t i = ATKD_TAYLOR - 1; i-- > 0;) {
            polynomial = fmaf(polynomial, log_ratio, divergence.taylor[i]);
        }
        polynomial = opaque(fmaf(-polynomial, log_ratio, -above));
        return fabsf(log_ratio) < 0.25f ? polynomial : log2_fast(u);
    }
    static ATKD_DEVICE double log_rest(const atkd_divergence &divergence, double log_ratio, double, double u) {
        double share_of_smaller = log_ratio > 0 ? divergence.rest : divergence.share;
        double near = log1p(share_of_smaller * expm1(-fabs(log_ratio) * LN_2));
        // The shares, rounded each by itself, do not add up to 1.
        return (fabs(log_ratio) < 0.25 ? near : log(u)) * (1 / LN_2);
    }
    template <bool SKEWED, class Real>
    static ATKD_DEVICE OfRatio<Real> of_ratio(const atkd_divergence &divergence, Real log_ratio) {
        log_ratio = cut(log_ratio);
        bool teacher_is_larger = log_ratio > 0;
        Real larger = teacher_is_larger ? divergence.share : divergence.rest;
        Real smaller = teacher_is_larger ? divergence.rest : divergence.share;
        Real above = teacher_is_larger ? log_ratio : 0, ratio = power_of_2(-fabs_of(log_ratio));
        Real u = smaller * ratio + larger, log_u = log_rest(divergence, log_ratio, above, u);
        Real difference = SKEWED ? (teacher_is_larger ? 1 - ratio : ratio - 1) * inverse_of(u) : 0;
        return {log_ratio - above - log_u, -above - log_u, difference};
    }

    // Calls f with whether the divergence is a skewed one, as a flag that the compiler knows: JSD has no ratio.
    template <class G> static ATKD_DEVICE void by_form(const atkd_divergence &divergence, G f) {
        if (divergence.of_difference != 0) {
            f(Flag<true>());
        } else {
            f(Flag<false>());
        }
    }

    template <bool SKEWED, class Real>
    static ATKD_DEVICE void add(PairSums<Real> &sums, const atkd_divergence &divergence, const Pair<Real> &pair) {
        auto of_pair = of_ratio<SKEWED>(divergence, pair.log_ratio);
        sums.teacher += pair.teacher * of_pair.log_teacher;
        sums.student += pair.student * of_pair.log_student;
        if (SKEWED) {
            sums.slope += pair.student * of_pair.difference;
        }
    }
    // The weights of logarithms to the base 2 are times LN_2.
    template <class Real> static ATKD_DEVICE Real value(const atkd_divergence &divergence, const PairSums<Real> &sums) {
        return Real(divergence.of_teacher) * sums.teacher + Real(divergence.of_student) * sums.student;
    }
    template <class Real> static ATKD_DEVICE Real mean(const atkd_divergence &divergence, const PairSums<Real> &sums) {
        return Real(divergence.of_student) * sums.student + Real(divergence.of_difference) * sums.slope;
    }
    template <bool SKEWED> static ATKD_DEVICE float slope(const atkd_divergence &divergence, float log_ratio) {
        auto of_pair = of_ratio<SKEWED>(divergence, log_ratio);
        float of_student = divergence.of_student * of_pair.log_student;
        return SKEWED ? fmaf(divergence.of_difference, of_pair.difference, of_student) : of_student;
    }
};

using Mixture = TwoSweeps<MixtureTerm>;
