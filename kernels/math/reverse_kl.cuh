// The reverse KL divergence, KL(q, p) = sum q log(q / p). By the names of forward_kl.cuh, and with r_j = a_j - b_j less
// their mean over qhat:
//
//   TKD = KL(Bernoulli(w), Bernoulli(u))                        dTKD/dw = sigmoid'(w) (w - u)
//   DKD = sum_{j != g} qhat_j (b_j - a_j) + (L_p - L_q)         dDKD/db_j = -qhat_j r_j
//
// Plain, over the whole vocabulary, it is TKD + sigmoid(w) DKD, of which the weight has a gradient too.
//
// An element's gradient has its gap x - y as a factor, which a finite mask makes as large as 2^133. In units of GAP_UNIT
// that is 2^69 at most; a probability times 2^32, and what is multiplied with it times 2^-32, neither overflow nor lose
// digits.
#pragma once

#include "row_sums.cuh"

struct ReverseKl {
    static constexpr uint32_t SWEEPS = 1;
    static constexpr bool SPECIALISED = false;
    static constexpr CrossTerm CROSS = BY_STUDENT;
    static constexpr float HALF_UNIT = 0x1p32f, MOST_GAP = 0x1p72f;

    template <class Real> using State = RowSums<Real, CROSS>;
    // teacher: of 2^y_j (x_j - y_j); student: of 2^y_j.
    using Scales = GradientScales;

    template <bool CE_SUM, bool GUARDED, class P, class Q>
    static ATKD_DEVICE void fold(State<float> &state, const Shifts &shifts, const Packed<P> &teacher,
                                 const Packed<Q> &student, float exponent) {
        fold_chunk<CE_SUM, GUARDED>(state, shifts, teacher, student, exponent);
    }

    static ATKD_DEVICE double dkd(const State<double> &state, double student_sum, double teacher_log_sum,
                                  double student_log_sum) {
        double dkd = teacher_log_sum - student_log_sum - state.cross_term / student_sum * (LN_2 * double(GAP_UNIT));
        return state.student_sum == 0 ? 0 : state.mismatch != 0 ? -double(NEG_INF) : dkd;
    }

    static ATKD_DEVICE double tkd(const atkd_divergence &, double u, double w) {
        // On the side where the student's sigmoid is small.
        double sign = w > 0 ? -1 : 1, infinity = -double(NEG_INF);
        u *= sign;
        w *= sign;
        return w == -infinity        ? softplus(u)
               : fabs(u) == infinity ? infinity
                                     : softplus(u) - softplus(w) - sigmoid(w) * (u - w);
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
                                     const Odds &teacher, const Odds &student, const Odds &student_at_1,
                                     const TargetLogits &target, float exponent) {
        bool plain = divergence.plain != 0, no_mass = state.student_sum == 0;
        Shift teacher_shift = Shift::of(state.teacher_max, exponent);
        Shift student_shift = Shift::of(state.student_max, exponent);
        // In units of GAP_UNIT octaves: the mean gap, the difference of the logarithms of the sums, w - u.
        float mean_gap = no_mass ? 0 : float(state.cross_term) * student.inverse;
        float log_ratio = log_ratio_of(state, exponent) * (1 / GAP_UNIT);
        float margin_gap =
            teacher_shift.gap_of(target.teacher, exponent) - student_shift.gap_of(target.student, exponent) - log_ratio;
        float variance = student.sigmoid * student.rest;
        float tkd_weight = plain ? weights.dkd : weights.tkd;
        float dkd_weight = no_mass ? 0 : plain ? weights.dkd * student.sigmoid : weights.dkd;
        float slope = variance == 0 || tkd_weight == 0 ? 0 : variance * margin_gap;
        float weight_slope = variance == 0 || !plain || no_mass ? 0 : variance * (log_ratio - mean_gap);
        float gamma = tkd_weight * slope * float(LN_2) + weights.dkd * weight_slope * float(LN_2);
        float inverse = student.inverse * HALF_UNIT;
        float of_gap = dkd_weight == 0 ? 0 : dkd_weight * inverse * float(LN_2);
        Scales scales = {
            of_gap,
            no_mass ? 0
                    : fmaf(of_gap, mean_gap, inverse * (gamma + (CE_SUM ? 0 : weights.gamma_ce * (1 / GAP_UNIT)))),
            CE_SUM && student_at_1.inverse != 0 ? weights.gamma_ce * student_at_1.inverse : 0,
            -fmaf(gamma, GAP_UNIT, weights.gamma_ce),
            state.teacher_max,
            state.student_max,
            shift_of(state.teacher_max, exponent),
            shift_of(state.student_max, exponent),
        };
        // An infinite divergence has no gradient.
        bool no_rest = state.teacher_sum == 0 && !no_mass;
        bool no_target = target.teacher == NEG_INF && target.student > NEG_INF;
        if ((tkd_weight != 0 && (no_rest || no_target)) || (dkd_weight != 0 && state.mismatch != 0)) {
            scales.make_nan();
        }
        return scales;
    }

    template <bool CE_SUM, bool LARGE_ROW, class P, class Q>
    static ATKD_DEVICE void gradient(const atkd_divergence &, const Scales &scales, float exponent,
                                     const Packed<P> &teacher_chunk, const Packed<Q> &student_chunk,
                                     float (&g)[CHUNK]) {
        float a[CHUNK], b[CHUNK];
        unpack(teacher_chunk, a);
        unpack(student_chunk, b);
        RowShifts<LARGE_ROW> shifts(scales, exponent);
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            // Of what both models rule out, or the student alone, the probability is 0.
            float gap = shifts.teacher_gap(a[k]) - shifts.student_gap(b[k]);
            gap = fminf(fmaxf(gap, -MOST_GAP), MOST_GAP);
            float student = exp2_fast(shifts.student(b[k]) + 32.0f);
            g[k] = student * fmaf(-scales.teacher, gap, scales.student);
            if (CE_SUM) {
                g[k] += scales.student_at_1 * exp2_fast(shifts.student_at_1(b[k]));
            }
        }
    }
};
