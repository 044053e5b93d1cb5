// Divergences of the form sum_j f(p_j, q_j) whose f needs both models' normalised probabilities: the first sweep over a
// row finds the sums that normalise, the second the terms of f, and the gradient follows. With h_j = df/dq_j and its mean
// hbar = sum_i qhat_i h_i, by the names of forward_kl.cuh:
//
//   dDKD/db_j = qhat_j (h_j - hbar)      dTKD/dw = sigmoid'(w) (h(sigmoid(u), sigmoid(w)) - h(sigmoid(-u), sigmoid(-w)))
//
// Plain, over the whole vocabulary, the sums that normalise include the target, which is one more pair of the second
// sweep. TKD and DKD are not computed then.
//
// F is the f: F::of is its value at a pair of probabilities, and its slope, which is h.
#pragma once

#include "row_sums.cuh"

ATKD_DEVICE float power_of_2(float x) { return exp2_fast(x); }
ATKD_DEVICE double power_of_2(double x) { return exp2(x); }
ATKD_DEVICE float inverse_of(float x) { return reciprocal_fast(x); }
ATKD_DEVICE double inverse_of(double x) { return 1 / x; }
ATKD_DEVICE float larger_of(float x, float y) { return fmaxf(x, y); }
ATKD_DEVICE double larger_of(double x, double y) { return fmax(x, y); }

// log2(1 + t) for -1 < t <= 0; near 0 to a relative error of 2e-7, else to an absolute one of 3e-7.
ATKD_DEVICE float log2_1p(float t) {
    float slope = -4.885594845e-1f;
    slope = fmaf(slope, t, 2.086586505e-1f);
    slope = fmaf(slope, t, -3.717020154e-1f);
    slope = fmaf(slope, t, 4.802303910e-1f);
    slope = fmaf(slope, t, -7.213620543e-1f);
    slope = fmaf(slope, t, 1.442695022f);
    return t > -0.25f ? slope * t : log2_fast(1.0f + t);
}
ATKD_DEVICE double log2_1p(double t) { return log1p(t) / LN_2; }

// Probabilities p and q: the larger, the smaller over it, and log2(p / q).
template <class Real> struct Pair {
    Real larger, ratio, log_ratio;

    // The logarithm may be infinite, or NaN where both probabilities are 0.
    static ATKD_DEVICE Pair of(Real larger, Real log_ratio) {
        // Beyond, the smaller is 0 in float64.
        constexpr Real MOST = 2048;
        log_ratio = -larger_of(-larger_of(log_ratio, -MOST), -MOST);
        return {larger, power_of_2(-larger_of(log_ratio, -log_ratio)), log_ratio};
    }
    ATKD_DEVICE Real teacher() const { return log_ratio > 0 ? larger : larger * ratio; }
    ATKD_DEVICE Real student() const { return log_ratio > 0 ? larger * ratio : larger; }
};

// Two classes, from probabilities that are not both in doubt.
ATKD_DEVICE Pair<float> pair_of_odds(float p, float q) { return Pair<float>::of(fmaxf(p, q), log2f(quotient(p, q))); }

// f(p, q), and df/dq but for a constant that is the same for all pairs.
template <class Real> struct PairTerm {
    Real value, slope;
};

template <class F> struct TwoSweeps {
    static constexpr uint32_t SWEEPS = 2;
    static constexpr CrossTerm CROSS = NO_CROSS_TERM;
    static constexpr bool SPECIALISED = false;

    template <class Real> using State = RowSums<Real, CROSS>;
    // The second sweep sums these up.
    template <class Real> struct Terms {
        Real value, slope; // sum f(p, q), sum q h

        template <bool CE_SUM, class V, class... States> static ATKD_DEVICE void visit(V f, States &...states) {
            f(FieldKind<SUM>(), states.value...);
            f(FieldKind<SUM>(), states.slope...);
        }
        template <bool CE_SUM> static constexpr uint32_t FLOATS = 2;
        static constexpr uint32_t FLAGS = 0;
        static constexpr bool RELATIVE = false;
        static ATKD_DEVICE Terms empty() { return {0, 0}; }

        ATKD_DEVICE void add(const atkd_divergence &divergence, const Pair<Real> &pair) {
            PairTerm<Real> term = F::of(divergence, pair);
            value += term.value;
            slope += pair.student() * term.slope;
        }
        template <class Part> ATKD_DEVICE void add(const Part &part) {
            value += part.value;
            slope += part.slope;
        }
    };

    // The second sweep needs the first four of its own, and leaves the factors of 2^y_j h_j (teacher) and 2^y_j (student).
    struct alignas(16) Scales : GradientScales {
        float teacher_inverse, student_inverse; // p = 2^x_j teacher_inverse
        float log_ratio;                        // what log2(p / q) is less than x_j - y_j
        float dkd_weight;
        float target_larger, target_log_ratio; // the target as a pair; 0 if it is left out

        ATKD_DEVICE void make_nan() {
            GradientScales::make_nan();
            teacher_inverse = student_inverse = nanf("");
        }
    };

    static ATKD_DEVICE double tkd(const atkd_divergence &divergence, double u, double w) {
        auto terms = Terms<double>::empty();
        // The first class is the target, the second the rest.
        terms.add(divergence, Pair<double>::of(sigmoid(-(u < w ? u : w)), (softplus(w) - softplus(u)) / LN_2));
        terms.add(divergence, Pair<double>::of(sigmoid(u > w ? u : w), (softplus(-w) - softplus(-u)) / LN_2));
        return terms.value;
    }

    static ATKD_DEVICE double loss(const atkd_divergence &divergence, double c_tkd, double c_dkd, double, double &tkd,
                                   double &dkd) {
        if (divergence.plain != 0) {
            double plain = dkd;
            tkd = dkd = nan("");
            return weighted(c_dkd, plain);
        }
        return weighted(c_tkd, tkd) + weighted(c_dkd, dkd);
    }

    template <bool CE_SUM, class State>
    static ATKD_DEVICE Scales scales(const atkd_divergence &divergence, const State &state, const TermWeights &weights,
                                     const Odds &teacher, const Odds &student, const Odds &student_at_1,
                                     const TargetLogits &, float exponent) {
        bool plain = divergence.plain != 0, exists = plain || (state.teacher_sum != 0 && state.student_sum != 0);
        Pair<float> rest = pair_of_odds(teacher.sigmoid, student.sigmoid);
        Pair<float> target = pair_of_odds(teacher.rest, student.rest);
        float slope = plain || weights.tkd == 0 ? 0
                                                : student.sigmoid * student.rest *
                                                      (F::of(divergence, rest).slope - F::of(divergence, target).slope);
        float gamma = weights.tkd * slope;
        float of_teacher = plain ? teacher.sigmoid : 1, of_student = plain ? student.sigmoid : 1;
        Scales scales;
        scales.teacher = exists && student.inverse != 0 ? weights.dkd * student.inverse * of_student : 0;
        scales.student = student.inverse == 0 ? 0 : (gamma + (CE_SUM ? 0 : weights.gamma_ce)) * student.inverse;
        scales.student_at_1 = CE_SUM && student_at_1.inverse != 0 ? weights.gamma_ce * student_at_1.inverse : 0;
        scales.target = -(gamma + weights.gamma_ce);
        scales.teacher_max = state.teacher_max;
        scales.student_max = state.student_max;
        scales.teacher_shift = shift_of(state.teacher_max, exponent);
        scales.student_shift = shift_of(state.student_max, exponent);
        scales.teacher_inverse = exists ? teacher.inverse * of_teacher : 0;
        scales.student_inverse = exists ? student.inverse * of_student : 0;
        scales.log_ratio = log_ratio_of(state, exponent);
        if (plain) {
            float t = teacher.sigmoid, s = student.sigmoid;
            // A model without mass off the target has less there than any other.
            scales.log_ratio = t != 0 && s != 0 ? scales.log_ratio - log2f(quotient(t, s)) : t < s ? -NEG_INF : NEG_INF;
        }
        scales.dkd_weight = weights.dkd;
        scales.target_larger = plain ? target.larger : 0;
        scales.target_log_ratio = plain ? target.log_ratio : 0;
        return scales;
    }

    // Adds a chunk to the terms of the second sweep. The target, and what lies outside the row, are -inf in both.
    template <bool LARGE_ROW, class P, class Q>
    static ATKD_DEVICE void add(Terms<float> &terms, const atkd_divergence &divergence, const Scales &scales,
                                float exponent, const Packed<P> &teacher_chunk, const Packed<Q> &student_chunk) {
        float a[CHUNK], b[CHUNK];
        unpack(teacher_chunk, a);
        unpack(student_chunk, b);
        RowShifts<LARGE_ROW> shifts(scales, exponent);
        auto of_chunk = Terms<float>::empty();
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            float x = shifts.teacher(a[k]), y = shifts.student(b[k]), log_ratio = x - y - scales.log_ratio;
            bool teacher_is_larger = log_ratio > 0;
            float larger = exp2_fast(teacher_is_larger ? x : y) *
                           (teacher_is_larger ? scales.teacher_inverse : scales.student_inverse);
            of_chunk.add(divergence, Pair<float>::of(larger, log_ratio));
        }
        terms.add(of_chunk);
    }

    // Ends the second sweep: completes the scales, and returns DKD or, plain, the divergence.
    template <class Real>
    static ATKD_DEVICE Real finish(const atkd_divergence &divergence, Scales &scales, Terms<Real> terms) {
        Pair<float> target = Pair<float>::of(scales.target_larger, scales.target_log_ratio);
        auto of_target = Terms<float>::empty();
        of_target.add(divergence, target);
        terms.add(of_target);
        float mean = float(terms.slope);
        bool exists = divergence.plain != 0 || (scales.teacher_inverse != 0 && scales.student_inverse != 0);
        scales.student -= scales.teacher == 0 ? 0 : scales.teacher * mean;
        if (divergence.plain != 0 && scales.dkd_weight != 0) {
            scales.target += scales.dkd_weight * target.student() * (F::of(divergence, target).slope - mean);
        }
        return exists ? terms.value : 0;
    }

    template <class Shifts>
    static ATKD_DEVICE float gradient(const atkd_divergence &divergence, const Scales &scales, const Shifts &shifts,
                                      float a, float b) {
        float x = shifts.teacher(a), y = shifts.student(b);
        float slope = F::of(divergence, Pair<float>::of(0, x - y - scales.log_ratio)).slope;
        return exp2_fast(y) * fmaf(scales.teacher, slope, scales.student);
    }
};
