// The sums of a row, or of a part of it, which one pass finds: those of every divergence, and a cross term for those that
// need no second pass.
#pragma once

#include "token.cuh"

// A quarter of the gap of two logits relative to the reference and the maximum: finite for finite logits.
ATKD_DEVICE float reference_gap(float teacher, float student, float teacher_reference, float student_max) {
    return fmaf(0.25f, teacher, -0.25f * teacher_reference) - fmaf(0.25f, student, -0.25f * student_max);
}

// The target is left out. With the exponents x_j of the teacher relative to the shift of its maximum, y_j likewise of the
// student, and r the index of the student's largest logit, relative to which the students' gaps keep their digits even where
// the teacher gives next to nothing to all that the student thinks likely:
template <class Real, CrossTerm CROSS> struct RowSums {
    Real teacher_sum;               // sum 2^x_j
    Real cross_term;                // sum 2^x_j (x_j - y_j), or sum 2^y_j (x_j - x_r - y_j + y_r), in units of GAP_UNIT
    Real student_sum;               // sum 2^y_j
    Real student_sum_at_1;          // the student's sum at temperature 1, for cross entropy
    float teacher_max, student_max; // finite; LOWEST for a part without elements, or with none but -inf
    float teacher_reference;        // BY_STUDENT: the teacher's logit r, finite
    uint32_t mismatch;              // BY_TEACHER: the student rules out (-inf) a token that the teacher does not

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
        if constexpr (CROSS == BY_STUDENT) {
            f(FieldKind<MAX>(), states.teacher_reference...);
        }
        if constexpr (CROSS == BY_TEACHER) {
            f(FieldKind<FLAG>(), states.mismatch...);
        }
    }
    // The floats among them, and the flags.
    template <bool CE_SUM>
    static constexpr uint32_t FLOATS = (CROSS == NO_CROSS_TERM ? 4
                                        : CROSS == BY_TEACHER  ? 5
                                                               : 6) +
                                       (CE_SUM ? 1 : 0);
    static constexpr uint32_t FLAGS = CROSS == BY_TEACHER ? 1 : 0;
    static constexpr bool RELATIVE = true; // to the maxima
    static constexpr CrossTerm CROSS_TERM = CROSS;

    static ATKD_DEVICE RowSums empty() { return {0, 0, 0, 0, LOWEST, LOWEST, LOWEST, 0}; }
    // Keeps the maxima and the reference, without sums.
    ATKD_DEVICE RowSums cleared() const { return {0, 0, 0, 0, teacher_max, student_max, teacher_reference, 0}; }

    // From a lane's maxima, and the teacher's logit at its maximum of the student, to the warp's.
    static ATKD_DEVICE RowSums from(float teacher_max, float student_max, float teacher_reference) {
        RowSums state = empty();
        state.teacher_max = fmaxf(max_of_warp(teacher_max), LOWEST);
        state.student_max = fmaxf(max_of_warp(student_max), LOWEST);
        if (CROSS == BY_STUDENT) {
            state.teacher_reference = reference_of_warp(student_max == state.student_max, teacher_reference);
        }
        return state;
    }
    // One of those of the lanes that have the student's largest logit; finite where the teacher rules it out.
    static ATKD_DEVICE float reference_of_warp(bool has_max, float teacher_reference) {
        return fmaxf(max_of_warp(has_max ? teacher_reference : LOWEST), LOWEST);
    }

    ATKD_DEVICE Shifts shifts(float exponent) const {
        return {shift_of(teacher_max, exponent), shift_of(student_max, exponent), shift_of(student_max, LOG2_E)};
    }

    // Not if a shift is LARGE or, where there is a cross term, anything was masked.
    ATKD_DEVICE bool finite() const {
        // Only the teacher's cross term is made of both models' shifts.
        Real sum = CROSS == BY_TEACHER   ? cross_term
                   : CROSS == BY_STUDENT ? cross_term + teacher_sum
                                         : teacher_sum + student_sum;
        return fabsf(sum) < -NEG_INF;
    }

    // The sum of the model that weighs the cross term.
    ATKD_DEVICE Real weight() const { return CROSS == BY_STUDENT ? student_sum : teacher_sum; }

    // The cross term is not a number; without mass to weigh it by, or infinite, it does not count.
    ATKD_DEVICE bool has_nan() const {
        return CROSS != NO_CROSS_TERM && weight() != 0 && mismatch == 0 && cross_term != cross_term;
    }

    // Makes the sums relative to new maxima, neither below the old one, and to a new reference.
    template <bool CE_SUM>
    ATKD_DEVICE void rescale(float new_teacher_max, float new_student_max, float new_reference, float exponent) {
        float dp = gap_between(teacher_max, new_teacher_max, exponent);
        float dq = gap_between(student_max, new_student_max, exponent);
        Real teacher = exp2_of_distance(dp * GAP_UNIT), student = exp2_of_distance(dq * GAP_UNIT);
        if (CROSS == BY_STUDENT) {
            float moved = reference_gap(teacher_reference, student_max, new_reference, new_student_max);
            // Infinite: it stays so.
            if (cross_term != Real(NEG_INF)) {
                cross_term = student * (cross_term + student_sum * Real(moved * (4 * exponent / GAP_UNIT)));
            }
            teacher_reference = new_reference;
        } else {
            cross_term = teacher * (cross_term + teacher_sum * (Real(dp) - Real(dq)));
        }
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
            // Not 0 * inf.
            if (CROSS == BY_TEACHER) {
                // An element that the student rules out is counted, not multiplied.
                bool mismatch = b[k] == NEG_INF && a[k] != NEG_INF;
                state.mismatch |= mismatch ? 1u : 0u;
                gap = p == 0.0f || mismatch ? 0.0f : x_gap - y_gap;
            }
            if (CROSS == BY_STUDENT) {
                // One that the teacher rules out makes the sum infinite.
                gap = reference_gap(a[k], b[k], state.teacher_reference, state.student_max) * (4 * exponent / GAP_UNIT);
                bool mismatch = a[k] == NEG_INF && b[k] != NEG_INF;
                cross_term = mismatch ? NEG_INF : cross_term;
                gap = exp2_fast(y) == 0.0f || mismatch ? 0.0f : gap;
            }
        } else {
            x = fmaf(a[k], exponent, -shifts.teacher);
            y = fmaf(b[k], exponent, -shifts.student);
            p = exp2_fast(x);
            gap = CROSS == BY_STUDENT ? (a[k] - state.teacher_reference) - (b[k] - state.student_max) : x - y;
        }
        q = exp2_fast(y);
        teacher_sum = k == 0 ? p : teacher_sum + p;
        if (CROSS != NO_CROSS_TERM) {
            float weight = CROSS == BY_STUDENT ? q : p;
            cross_term = k == 0 && CROSS == BY_TEACHER ? weight * gap : fmaf(weight, gap, cross_term);
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
        constexpr float UNIT = 1 / GAP_UNIT;
        state.cross_term = GUARDED ? state.cross_term + cross_term
                                   : fmaf(cross_term, CROSS == BY_STUDENT ? exponent * UNIT : UNIT, state.cross_term);
    }
    state.student_sum += student_sum;
    if (CE_SUM) {
        state.student_sum_at_1 += student_sum_at_1;
    }
}

// x / y, for y that is neither subnormal nor 0 but for y = 0 an infinity or NaN; 1 for equal ones. The compiler's division
// would take more registers.
ATKD_DEVICE float quotient(float x, float y) {
    float inverse = reciprocal_fast(y), quotient = x * inverse;
    return y == 0 ? quotient : fmaf(fmaf(-quotient, y, x), inverse, quotient);
}

// log2 of the teacher's sum over the student's, both corrected for their maxima, from a whole row's state.
template <class State> ATKD_DEVICE float log_ratio_of(const State &state, float exponent) {
    float teacher = state.teacher_sum == 0 ? 0 : float(state.teacher_sum) + correction_of(state.teacher_max, exponent);
    float student = state.student_sum == 0 ? 0 : float(state.student_sum) + correction_of(state.student_max, exponent);
    // The logarithm of each would lose digits, of which most cancel.
    return log2f(quotient(teacher, student));
}

// The largest logits of a thread's part of the row, and the teacher's logit where the student's is largest.
template <CrossTerm CROSS, class P, class Q = P> struct Maxima {
    Largest<P> teacher;
    Largest<Q> student;

    ATKD_DEVICE void add(const Packed<P> &teacher_chunk, const Packed<Q> &student_chunk) {
        teacher.add(teacher_chunk);
        student.add(student_chunk);
    }
    // The state of the warp, without sums.
    template <class State> ATKD_DEVICE State state() const { return State::from(teacher.value(), student.value(), 0); }
    ATKD_DEVICE float student_max() const { return student.value(); }
    ATKD_DEVICE float teacher_reference() const { return 0; }
};
template <class P, class Q> struct Maxima<BY_STUDENT, P, Q> {
    Largest<P> teacher;
    float student = NEG_INF, reference = LOWEST;

    ATKD_DEVICE void add(const Packed<P> &teacher_chunk, const Packed<Q> &student_chunk) {
        teacher.add(teacher_chunk);
        float max = max_of(student_chunk);
        if (ATKD_RARELY(max > student)) {
            float a[CHUNK], b[CHUNK];
            unpack(teacher_chunk, a);
            unpack(student_chunk, b);
            student = max;
            ATKD_UNROLL
            for (uint32_t k = 0; k < CHUNK; k++) {
                reference = b[k] == max ? a[k] : reference;
            }
        }
    }
    template <class State> ATKD_DEVICE State state() const { return State::from(teacher.value(), student, reference); }
    ATKD_DEVICE float student_max() const { return student; }
    ATKD_DEVICE float teacher_reference() const { return fmaxf(reference, LOWEST); }
};
