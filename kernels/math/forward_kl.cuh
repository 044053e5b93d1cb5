// The forward KL divergence, KL(p, q) = sum p log(p / q), of the two classes "the target, or not" (TKD) and of the
// renormalised rest of the row (DKD). A divergence is one such file; a kernel over rows takes it as its parameter D:
//
//   State<Real>     the sums of a row, or of a part of it, and the list of their fields (visit); the models' sums and
//                   maxima are in every divergence's, by the names that they have here
//   SWEEPS          how often the row is read before its gradient
//   fold            adds a chunk of both models to a state
//   dkd             the divergence of the rest, from a whole row's state
//   tkd, tkd_slope  the divergence of the two classes, from the margins, and its derivative
//   coefficients    what the gradient of an element needs of its row
//   gradient        the gradient of a chunk
//
// With a, b the teacher's and the student's logits over the temperature, g the target, L_p, L_q = log sum_{j != g}
// e^{..} of either, u = L_p - a_g, w = L_q - b_g, phat_j = e^{a_j - L_p}, qhat_j = e^{b_j - L_q}:
//
//   TKD = softplus(w) - softplus(u) - sigmoid(u) (w - u)        dTKD/dw = sigmoid(w) - sigmoid(u)
//   DKD = sum_{j != g} phat_j (a_j - b_j) - (L_p - L_q)         dDKD/db_j = qhat_j - phat_j
#pragma once

#include "token.cuh"

struct ForwardKl {
    static constexpr uint32_t SWEEPS = 1;

    // One pass over a row, or a part of it, target left out. With the exponents x_j of the teacher relative to the
    // shift of its maximum, y_j likewise of the student:
    template <class Real> struct State {
        Real teacher_sum;               // sum 2^x_j
        Real cross_term;                // sum 2^x_j (x_j - y_j), in units of GAP_UNIT
        Real student_sum;               // sum 2^y_j
        Real student_sum_at_1;          // the student's sum at temperature 1, for cross entropy
        float teacher_max, student_max; // finite; LOWEST for a part without elements, or with none but -inf
        uint32_t mismatch;              // the student rules out (-inf) a token that the teacher does not

        // The list of the fields: calls f(kind, field..) for each, with that field of every state given. CE_SUM: the
        // sum at temperature 1 is one of them.
        template <bool CE_SUM, class F, class... States> static ATKD_DEVICE void visit(F f, States &...states) {
            f(FieldKind<SUM>(), states.teacher_sum...);
            f(FieldKind<SUM>(), states.cross_term...);
            f(FieldKind<SUM>(), states.student_sum...);
            if (CE_SUM) {
                f(FieldKind<SUM>(), states.student_sum_at_1...);
            }
            f(FieldKind<MAX>(), states.teacher_max...);
            f(FieldKind<MAX>(), states.student_max...);
            f(FieldKind<FLAG>(), states.mismatch...);
        }
        // The floats among them, without CE_SUM.
        static constexpr uint32_t FLOATS = 5;

        static ATKD_DEVICE State empty(float teacher_max = LOWEST, float student_max = LOWEST) {
            return {0, 0, 0, 0, teacher_max, student_max, 0};
        }

        // From a lane's maxima to the warp's.
        static ATKD_DEVICE State from(float teacher_max, float student_max) {
            State state = empty();
            state.teacher_max = fmaxf(max_of_warp(teacher_max), LOWEST);
            state.student_max = fmaxf(max_of_warp(student_max), LOWEST);
            return state;
        }

        ATKD_DEVICE Shifts shifts(float exponent) const {
            return {shift_of(teacher_max, exponent), shift_of(student_max, exponent), shift_of(student_max, LOG2_E)};
        }

        // Not if anything was masked, or a shift is LARGE.
        ATKD_DEVICE bool finite() const { return fabsf(cross_term) < -NEG_INF; }

        // The cross term is not a number; without mass to weigh it by, or infinite, it does not count.
        ATKD_DEVICE bool has_nan() const { return teacher_sum != 0 && mismatch == 0 && cross_term != cross_term; }

        // Makes the sums relative to new maxima, neither below the old one.
        template <bool CE_SUM>
        ATKD_DEVICE void rescale(float new_teacher_max, float new_student_max, float exponent) {
            float dp = gap_between(teacher_max, new_teacher_max, exponent);
            float dq = gap_between(student_max, new_student_max, exponent);
            Real teacher = exp2_of_distance(dp * GAP_UNIT), student = exp2_of_distance(dq * GAP_UNIT);
            cross_term = teacher * (cross_term + teacher_sum * (Real(dp) - Real(dq)));
            teacher_sum *= teacher;
            student_sum *= student;
            if (CE_SUM) {
                student_sum_at_1 *= exp2_of_distance(distance(student_max, new_student_max, LOG2_E));
            }
            teacher_max = new_teacher_max;
            student_max = new_student_max;
        }
    };

    // Adds a chunk of both models, relative to the shifts of the state's maxima, which are given. The target, and
    // what lies outside the row, are -inf in both. GUARDED: the chunk may have such elements, or the shifts may be
    // LARGE. The chunk has sums of its own first, so that few additions round a large one.
    template <bool CE_SUM, bool GUARDED, class P, class Q>
    static ATKD_DEVICE void fold(State<float> &state, const Shifts &shifts, const Packed<P> &teacher,
                                 const Packed<Q> &student, float exponent) {
        float a[CHUNK], b[CHUNK];
        unpack(teacher, a);
        unpack(student, b);
        Shift teacher_shift = Shift::of(state.teacher_max, exponent);
        Shift student_shift = Shift::of(state.student_max, exponent);
        Shift student_shift_at_1 = Shift::of(state.student_max, LOG2_E);
        float teacher_sum = 0, cross_term = 0, student_sum = 0, student_sum_at_1 = 0;
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            float x, y, p, gap;
            if (GUARDED) {
                float x_gap = teacher_shift.gap_of(a[k], exponent), y_gap = student_shift.gap_of(b[k], exponent);
                x = x_gap * GAP_UNIT;
                y = y_gap * GAP_UNIT;
                p = exp2_fast(x);
                // Not 0 * inf; and an element that the student rules out is counted, not multiplied.
                bool ruled_out = b[k] == NEG_INF && a[k] != NEG_INF;
                state.mismatch |= ruled_out ? 1u : 0u;
                gap = p == 0.0f || ruled_out ? 0.0f : x_gap - y_gap;
            } else {
                x = fmaf(a[k], exponent, -shifts.teacher);
                y = fmaf(b[k], exponent, -shifts.student);
                p = exp2_fast(x);
                gap = x - y;
            }
            float q = exp2_fast(y);
            teacher_sum = k == 0 ? p : teacher_sum + p;
            cross_term = k == 0 ? p * gap : fmaf(p, gap, cross_term);
            student_sum = k == 0 ? q : student_sum + q;
            if (CE_SUM) {
                float q_at_1 = exp2_fast(GUARDED ? student_shift_at_1.exponent_of(b[k], LOG2_E)
                                                 : fmaf(b[k], LOG2_E, -shifts.student_at_1));
                student_sum_at_1 = k == 0 ? q_at_1 : student_sum_at_1 + q_at_1;
            }
        }
        state.teacher_sum += teacher_sum;
        state.cross_term = GUARDED ? state.cross_term + cross_term : fmaf(cross_term, 1 / GAP_UNIT, state.cross_term);
        state.student_sum += student_sum;
        if (CE_SUM) {
            state.student_sum_at_1 += student_sum_at_1;
        }
    }

    // From a row's state, the teacher's sum corrected for its maximum (correction_of), and the logarithms of both sums.
    static ATKD_DEVICE double dkd(const State<double> &state, double teacher_sum, double teacher_log_sum,
                                  double student_log_sum) {
        // It may be below 0 by rounding: no less often than above it, so that a mean of many is right.
        double dkd = state.cross_term / teacher_sum * (LN_2 * double(GAP_UNIT)) - teacher_log_sum + student_log_sum;
        return state.teacher_sum == 0 ? 0 : state.mismatch != 0 ? -double(NEG_INF) : dkd;
    }

    // Without a teacher's margin above 0 (swap "the target" and "not the target" there).
    static ATKD_DEVICE double tkd(double u, double w) {
        double infinity = -double(NEG_INF);
        return u == -infinity        ? softplus(w)
               : fabs(w) == infinity ? infinity
                                     : softplus(w) - softplus(u) - sigmoid(u) * (w - u);
    }
    // On the side where the teacher's sigmoid is small; swapping "the target" for "not the target" flips the sign.
    static ATKD_DEVICE float tkd_slope(const Odds &teacher, const Odds &student) {
        return teacher.odds > 1 ? teacher.rest - student.rest : student.sigmoid - teacher.sigmoid;
    }

    // The gradient with respect to z_j is student 2^y_j - teacher 2^x_j + student_at_1 2^(y_j at temperature 1). Given
    // are beta and gamma as in token.cuh, the latter's part from cross entropy apart.
    template <bool CE_SUM>
    static ATKD_DEVICE Coefficients coefficients(float beta, float gamma, float gamma_ce, const Odds &teacher,
                                                 const Odds &student, const Odds &student_at_1) {
        return {
            // Not 0 times an infinite upstream gradient.
            teacher.inverse == 0 ? 0 : beta * teacher.inverse,
            student.inverse == 0 ? 0 : (beta + gamma + (CE_SUM ? 0 : gamma_ce)) * student.inverse,
            CE_SUM && student_at_1.inverse != 0 ? gamma_ce * student_at_1.inverse : 0,
        };
    }

    // The gradient of a chunk but for the target. LARGE_ROW: a shift of the row is LARGE.
    template <bool CE_SUM, bool LARGE_ROW, class P, class Q>
    static ATKD_DEVICE void gradient(const GradientScales &scales, float exponent, const Packed<P> &teacher_chunk,
                                     const Packed<Q> &student_chunk, float (&g)[CHUNK]) {
        float a[CHUNK], b[CHUNK];
        unpack(teacher_chunk, a);
        unpack(student_chunk, b);
        auto full_shift = [](float max, float shift, float exponent) {
            return LARGE_ROW ? Shift::of(max, exponent) : Shift{0, shift};
        };
        Shift teacher_shift = full_shift(scales.teacher_max, scales.teacher_shift, exponent);
        Shift student_shift = full_shift(scales.student_max, scales.student_shift, exponent);
        Shift shift_at_1 = full_shift(scales.student_max, scales.shift_at_1(), LOG2_E);
        auto exponential = [](const Shift &shift, float z, float exponent) {
            return exp2_fast(LARGE_ROW ? shift.exponent_of(z, exponent) : fmaf(z, exponent, -shift.exponent_shift));
        };
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            float teacher = exponential(teacher_shift, a[k], exponent);
            float student = exponential(student_shift, b[k], exponent);
            g[k] = fmaf(scales.student, student, -(scales.teacher * teacher));
            if (CE_SUM) {
                g[k] += scales.student_at_1 * exponential(shift_at_1, b[k], LOG2_E);
            }
        }
    }
};
