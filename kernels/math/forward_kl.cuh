// The forward KL divergence, KL(p, q) = sum p log(p / q), of the two classes "the target, or not" (TKD) and of the
// renormalised rest of the row (DKD). A divergence is one such file; a kernel over rows takes it as its parameter D:
//
//   SWEEPS          how often the row is read before its gradient; two_sweeps.cuh is for two
//   SPECIALISED     every kernel has code of its own for common rows, and row_stream for common calls
//   State<Real>     the sums of a row, or of a part of it, and the list of their fields (visit); the models' sums and
//                   maxima are in every divergence's, by the names that they have in row_sums.cuh
//   dkd             the divergence of the rest, from a whole row's state
//   tkd             the divergence of the two classes, from the margins
//   loss            both parts, weighted, or the plain divergence
//   Scales, scales  what the gradient of an element needs of its row, from the row's state
//   by_form         calls f with a flag that tells forms of the divergence apart, known when compiling
//   gradient        the gradient of an element, but for cross entropy's that has a sum of its own
//
// With a, b the teacher's and the student's logits over the temperature, g the target, L_p, L_q = log sum_{j != g}
// e^{..} of either, u = L_p - a_g, w = L_q - b_g, phat_j = e^{a_j - L_p}, qhat_j = e^{b_j - L_q}:
//
//   TKD = softplus(w) - softplus(u) - sigmoid(u) (w - u)        dTKD/dw = sigmoid(w) - sigmoid(u)
//   DKD = sum_{j != g} phat_j (a_j - b_j) - (L_p - L_q)         dDKD/db_j = qhat_j - phat_j
#pragma once

#include "row_sums.cuh"

struct ForwardKl {
    static constexpr uint32_t SWEEPS = 1;
    static constexpr bool SPECIALISED = true;
    static constexpr CrossTerm CROSS = BY_TEACHER;

    template <class Real> using State = RowSums<Real, CROSS>;
    // The factors are those of 2^x_j, of 2^y_j, and of 2^(y_j at temperature 1).
    using Scales = GradientScales;

    // From a row's state, the teacher's sum corrected for its maximum (correction_of), and the logarithms of both.
    static ATKD_DEVICE double dkd(const State<double> &state, double teacher_sum, double teacher_log_sum,
                                  double student_log_sum, float) {
        // It may be below 0 by rounding: no less often than above it, so that a mean of many is right.
        double dkd = state.cross_term / teacher_sum * (LN_2 * double(GAP_UNIT)) - teacher_log_sum + student_log_sum;
        return state.teacher_sum == 0 ? 0 : state.mismatch != 0 ? -double(NEG_INF) : dkd;
    }

    static ATKD_DEVICE double tkd(const atkd_divergence &, double u, double w) { return bernoulli_kl(u, w); }

    static ATKD_DEVICE double loss(const atkd_divergence &, double c_tkd, double c_dkd, double, double &tkd,
                                   double &dkd) {
        return weighted(c_tkd, tkd) + weighted(c_dkd, dkd);
    }

    template <bool CE_SUM, class State>
    static ATKD_DEVICE Scales scales(const atkd_divergence &, const State &state, const TermWeights &weights,
                                     const Odds &teacher, const Odds &student, const Odds &student_at_1,
                                     const TargetLogits &, float exponent) {
        // On the side where the teacher's sigmoid is small; swapping "the target" for "not the target" flips the sign.
        float slope = teacher.odds > 1 ? teacher.rest - student.rest : student.sigmoid - teacher.sigmoid;
        // DKD is 0 for a teacher without mass off the target, whatever the student does.
        float beta = state.teacher_sum == 0 ? 0 : weights.dkd, gamma = weights.tkd * slope;
        return {
            // Not 0 times an infinite upstream gradient.
            teacher.inverse == 0 ? 0 : beta * teacher.inverse,
            student.inverse == 0 ? 0 : (beta + gamma + (CE_SUM ? 0 : weights.gamma_ce)) * student.inverse,
            CE_SUM && student_at_1.inverse != 0 ? weights.gamma_ce * student_at_1.inverse : 0,
            -(gamma + weights.gamma_ce),
            state.teacher_max,
            state.student_max,
            shift_of(state.teacher_max, exponent),
            shift_of(state.student_max, exponent),
        };
    }

    template <class G> static ATKD_DEVICE void by_form(const atkd_divergence &, G f) { f(Flag<true>()); }

    template <bool, class Shifts>
    static ATKD_DEVICE float gradient(const atkd_divergence &, const Scales &scales, const Shifts &shifts, float a,
                                      float b) {
        float teacher = exp2_fast(shifts.teacher(a)), student = exp2_fast(shifts.student(b));
        return fmaf(scales.student, student, -(scales.teacher * teacher));
    }
};
