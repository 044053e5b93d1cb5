// The sums of a row, or of a part of it, which one pass finds: those of every divergence, and a cross term for those that
// need no second pass.
#pragma once

#include "token.cuh"

// The target is left out. With the exponents x_j of the teacher relative to the shift of its maximum, y_j likewise of the
// student:
template <class Real, CrossTerm CROSS> struct RowSums {
    Real teacher_sum;               // sum 2^x_j
    Real cross_term;                // sum 2^x_j (x_j - y_j) or sum 2^y_j (x_j - y_j), in units of GAP_UNIT
    Real student_sum;               // sum 2^y_j
    Real student_sum_at_1;          // the student's sum at temperature 1, for cross entropy
    float teacher_max, student_max; // finite; LOWEST for a part without elements, or with none but -inf
    uint32_t mismatch;              // the other model rules out (-inf) a token that the one which weighs does not

    // The list of the fields: calls f(kind, field..) for each, with that field of every state given. CE_SUM: the
    // sum at temperature 1 is one of them.
    template <bool CE_SUM, class F, class... States> static ATKD_DEVICE void visit(F f, States &...states) {
        f(FieldKind<SUM>(), states.teacher_sum...);
        if constexpr (CROSS != NO_CROSS_TERM) {
            f(FieldKind<SUM>(), states.cross_term...);
        }
        f(FieldKind<SUM>(), states.student_sum...);
        if (CE_SUM) {
            f(FieldKind<SUM>(), states.student_sum_at_1...);
        }
        f(FieldKind<MAX>(), states.teacher_max...);
        f(FieldKind<MAX>(), states.student_max...);
        if constexpr (CROSS != NO_CROSS_TERM) {
            f(FieldKind<FLAG>(), states.mismatch...);
        }
    }
    // The floats among them, without CE_SUM, and the flags.
    static constexpr uint32_t FLOATS = CROSS == NO_CROSS_TERM ? 4 : 5, FLAGS = CROSS == NO_CROSS_TERM ? 0 : 1;

    static constexpr bool RELATIVE = true; // to the maxima

    static ATKD_DEVICE RowSums empty(float teacher_max = LOWEST, float student_max = LOWEST) {
        return {0, 0, 0, 0, teacher_max, student_max, 0};
    }

    // From a lane's maxima to the warp's.
    static ATKD_DEVICE RowSums from(float teacher_max, float student_max) {
        RowSums state = empty();
        state.teacher_max = fmaxf(max_of_warp(teacher_max), LOWEST);
        state.student_max = fmaxf(max_of_warp(student_max), LOWEST);
        return state;
    }

    ATKD_DEVICE Shifts shifts(float exponent) const {
        return {shift_of(teacher_max, exponent), shift_of(student_max, exponent), shift_of(student_max, LOG2_E)};
    }

    // Not if a shift is LARGE or, where there is a cross term, anything was masked.
    ATKD_DEVICE bool finite() const {
        return fabsf(CROSS == NO_CROSS_TERM ? teacher_sum + student_sum : cross_term) < -NEG_INF;
    }

    // The sum of the model that weighs the cross term.
    ATKD_DEVICE Real weight() const { return CROSS == BY_STUDENT ? student_sum : teacher_sum; }

    // The cross term is not a number; without mass to weigh it by, or infinite, it does not count.
    ATKD_DEVICE bool has_nan() const {
        return CROSS != NO_CROSS_TERM && weight() != 0 && mismatch == 0 && cross_term != cross_term;
    }

    // Makes the sums relative to new maxima, neither below the old one.
    template <bool CE_SUM> ATKD_DEVICE void rescale(float new_teacher_max, float new_student_max, float exponent) {
        float dp = gap_between(teacher_max, new_teacher_max, exponent);
        float dq = gap_between(student_max, new_student_max, exponent);
        Real teacher = exp2_of_distance(dp * GAP_UNIT), student = exp2_of_distance(dq * GAP_UNIT);
        cross_term = (CROSS == BY_STUDENT ? student : teacher) * (cross_term + weight() * (Real(dp) - Real(dq)));
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
template <bool CE_SUM, bool GUARDED, CrossTerm CROSS, class P, class Q>
ATKD_DEVICE void fold_chunk(RowSums<float, CROSS> &state, const Shifts &shifts, const Packed<P> &teacher,
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
        float x, y, p, q, gap = 0;
        if (GUARDED) {
            float x_gap = teacher_shift.gap_of(a[k], exponent), y_gap = student_shift.gap_of(b[k], exponent);
            x = x_gap * GAP_UNIT;
            y = y_gap * GAP_UNIT;
            p = exp2_fast(x);
            q = exp2_fast(y);
            if (CROSS != NO_CROSS_TERM) {
                // Not 0 * inf; and an element that the other model rules out is counted, not multiplied.
                float other = CROSS == BY_STUDENT ? a[k] : b[k], own = CROSS == BY_STUDENT ? b[k] : a[k];
                bool ruled_out = other == NEG_INF && own != NEG_INF;
                state.mismatch |= ruled_out ? 1u : 0u;
                gap = (CROSS == BY_STUDENT ? q : p) == 0.0f || ruled_out ? 0.0f : x_gap - y_gap;
            }
        } else {
            x = fmaf(a[k], exponent, -shifts.teacher);
            y = fmaf(b[k], exponent, -shifts.student);
            p = exp2_fast(x);
            gap = x - y;
            q = exp2_fast(y);
        }
        teacher_sum = k == 0 ? p : teacher_sum + p;
        if (CROSS != NO_CROSS_TERM) {
            float weight = CROSS == BY_STUDENT ? q : p;
            cross_term = k == 0 ? weight * gap : fmaf(weight, gap, cross_term);
        }
        student_sum = k == 0 ? q : student_sum + q;
        if (CE_SUM) {
            float q_at_1 = exp2_fast(GUARDED ? student_shift_at_1.exponent_of(b[k], LOG2_E)
                                             : fmaf(b[k], LOG2_E, -shifts.student_at_1));
            student_sum_at_1 = k == 0 ? q_at_1 : student_sum_at_1 + q_at_1;
        }
    }
    state.teacher_sum += teacher_sum;
    if (CROSS != NO_CROSS_TERM) {
        state.cross_term = GUARDED ? state.cross_term + cross_term : fmaf(cross_term, 1 / GAP_UNIT, state.cross_term);
    }
    state.student_sum += student_sum;
    if (CE_SUM) {
        state.student_sum_at_1 += student_sum_at_1;
    }
}

// log2 of the teacher's sum over the student's, both corrected for their maxima, from a whole row's state.
template <class State> ATKD_DEVICE float log_ratio_of(const State &state, float exponent) {
    float teacher = float(state.teacher_sum) + correction_of(state.teacher_max, exponent);
    float student = float(state.student_sum) + correction_of(state.student_max, exponent);
    // The logarithm of each would lose digits, of which most cancel.
    return log2f(teacher / student);
}
