// The reverse KL divergence, KL(q, p) = sum q log(q / p). By the names of forward_kl.cuh, and with r_j = a_j - b_j less
// their mean over qhat:
//
//   TKD = KL(Bernoulli(w), Bernoulli(u))                        dTKD/dw = sigmoid'(w) (w - u)
//   DKD = sum_{j != g} qhat_j (b_j - a_j) + (L_p - L_q)         dDKD/db_j = -qhat_j r_j
//
// Plain, over the whole vocabulary, it is TKD + sigmoid(w) DKD, of which the weight has a gradient too.
//
// Gaps are relative to the token r that the student thinks likeliest. An element's gradient has its gap as a factor, which
// a finite mask makes as large as 2^133. In units of GAP_UNIT that is 2^69 at most; a probability times 2^32, and what is
// multiplied with it times 2^-32, neither overflow nor lose digits.
#pragma once

#include "row_sums.cuh"

struct ReverseKl {
    static constexpr uint32_t SWEEPS = 1;
    static constexpr bool SPECIALISED = false;
    static constexpr CrossTerm CROSS = BY_STUDENT;
    static constexpr float HALF_UNIT = 0x1p32f;

    template <class Real> using State = RowSums<Real, CROSS>;
    // `teacher` is the factor of 2^y_j times a quarter of the gap, `student` that of 2^y_j, and teacher_max the reference.
    using Scales = GradientScales;

    static ATKD_DEVICE double dkd(const State<double> &state, double student_sum, double teacher_log_sum,
                                  double student_log_sum, float exponent) {
        // L_p - a_r and L_q - b_r.
        double teacher = teacher_log_sum + to_margin(state.teacher_max, state.teacher_reference, exponent);
        double student = student_log_sum + to_margin(state.student_max, state.student_max, exponent);
        double dkd = teacher - student - state.cross_term / student_sum * (LN_2 * double(GAP_UNIT));
        return state.student_sum == 0 ? 0 : state.cross_term == double(NEG_INF) ? -double(NEG_INF) : dkd;
    }

    static ATKD_DEVICE double tkd(const atkd_divergence &, double u, double w) {
        // Margins too large for the column that they come from are infinite; times a probability of 0, that is nothing.
        double sign = w > 0 ? -1 : 1;
        return sigmoid(sign * w) == 0 ? softplus(sign * u) - softplus(sign * w) : bernoulli_kl(w, u);
    }

    static ATKD_DEVICE double loss(const atkd_divergence &divergence, double c_tkd, double c_dkd, double w, double &tkd,
                                   double &dkd) {
        if (divergence.plain != 0) {
            return weighted(c_dkd, tkd + weighted(sigmoid(w), dkd));
        }
        return weighted(c_tkd, tkd) + weighted(c_dkd, dkd);
    }

    template <bool CE_SUM, class State>
    static ATKD_DEVICE Scales scales(const atkd_divergence &divergence, const State &state, const TermWeights &weights,
                                     const Odds &, const Odds &student, const Odds &student_at_1,
                                     const TargetLogits &target, float exponent) {
        bool plain = divergence.plain != 0, no_mass = state.student_sum == 0;
        bool mismatch = state.cross_term == NEG_INF && !no_mass;
        float variance = student.sigmoid * student.rest;
        // In units of GAP_UNIT octaves: the rest's mean gap, the target's, and w - u.
        float mean_gap = no_mass || mismatch ? 0 : float(state.cross_term) * student.inverse;
        float target_gap = reference_gap(target.teacher, target.student, state.teacher_reference, state.student_max) *
                           (4 * exponent / GAP_UNIT);
        float margin_gap = Shift::of(state.teacher_max, exponent).gap_of(target.teacher, exponent) -
                           Shift::of(state.student_max, exponent).gap_of(target.student, exponent) -
                           log_ratio_of(state, exponent) * (1 / GAP_UNIT);
        float of_gap = weights.dkd, gamma = 0;
        if (plain) {
            // The mean over the whole vocabulary, relative to which nothing cancels.
            float above = student.rest == 0 ? 0 : target_gap - mean_gap;
            mean_gap = fmaf(student.rest, above, mean_gap);
            of_gap *= student.sigmoid;
            gamma = of_gap == 0 ? 0 : of_gap * student.rest * above;
        } else if (variance != 0 && weights.tkd != 0) {
            gamma = weights.tkd * variance * margin_gap;
        }
        gamma *= float(LN_2);
        float inverse = student.inverse * HALF_UNIT;
        of_gap = no_mass || of_gap == 0 ? 0 : of_gap * inverse * float(LN_2);
        // Without a weight it may be infinite.
        mean_gap = of_gap == 0 ? 0 : mean_gap;
        float gamma_ce = CE_SUM ? 0 : weights.gamma_ce * (1 / GAP_UNIT);
        Scales scales = {
            of_gap * (4 * exponent / GAP_UNIT),
            no_mass ? 0 : fmaf(of_gap, mean_gap, inverse * ((plain ? 0 : gamma) + gamma_ce)),
            CE_SUM && student_at_1.inverse != 0 ? weights.gamma_ce * student_at_1.inverse : 0,
            -fmaf(gamma, GAP_UNIT, weights.gamma_ce),
            state.teacher_reference,
            state.student_max,
            0,
            shift_of(state.student_max, exponent),
        };
        // An infinite divergence has no gradient.
        bool no_rest = state.teacher_sum == 0 && !no_mass;
        bool no_target = target.teacher == NEG_INF && target.student > NEG_INF;
        float tkd_weight = plain ? weights.dkd : weights.tkd;
        if ((tkd_weight != 0 && (no_rest || no_target)) || (weights.dkd != 0 && mismatch)) {
            scales.make_nan();
        }
        return scales;
    }

    template <class G> static ATKD_DEVICE void by_form(const atkd_divergence &, G f) { f(Flag<true>()); }

    template <bool, class Shifts>
    static ATKD_DEVICE float gradient(const atkd_divergence &, const Scales &scales, const Shifts &shifts, float a,
                                      float b) {
        // An element that a model rules out has the probability 0 here.
        float gap = reference_gap(a, b, scales.teacher_max, scales.student_max);
        gap = fminf(fmaxf(gap, LOWEST), -LOWEST);
        // Added to the exponent, the unit costs it five bits, which it has to spare far below 0; there alone the exponential
        // would be 0 without.
        float exponent = shifts.student(b);
        bool small = exponent < -64.0f;
        float power = exp2_fast(small ? exponent + 32.0f : exponent);
        return (small ? power : power * HALF_UNIT) * fmaf(-scales.teacher, gap, scales.student);
    }
};
