// The loss and the gradient's coefficients of one token, from a handful of numbers about its row.
//
// With a, b the teacher's and the student's logits over the temperature, g the target, and
// L = log sum_{j != g} e^{..} of either (the target left out):
//
//   u = L_p - a_g   UNC = sigmoid(u)          w = L_q - b_g   -log q_g = softplus(w)
//   TKD = softplus(w) - softplus(u) - sigmoid(u) (w - u)
//   DKD = sum_{j != g} phat_j (a_j - b_j) - (L_p - L_q)        phat_j = e^{a_j - L_p}, qhat_j = e^{b_j - L_q}
//
//   loss = c_tkd TKD + c_dkd DKD + c_ce CE
//   dloss/db_j = (beta + gamma) qhat_j - beta phat_j (j != g)   dloss/db_g = -gamma
//   beta = c_dkd     gamma = c_tkd (sigmoid(w) - sigmoid(u)) + c_ce sigmoid(w)
//
// The passes over a row are in float32. What is done once a row is in double: a few dozen operations
// beside a hundred thousand, and nothing is lost where terms cancel.
#pragma once

#include "memory.cuh"

// A finite stand-in for the maximum of nothing, or of -inf alone: z - max stays a number.
constexpr float NO_MAX = -3.402823466e38f;

// The maximum of the warp's floats, none of them NaN, by way of integers that order as they do.
ATKD_DEVICE float max_of_warp(float x) {
    int32_t bits = static_cast<int32_t>(to_bits(x));
    int32_t max = warp_max(bits ^ (bits >> 31 & 0x7fffffff));
    return from_bits<float>(static_cast<uint32_t>(max ^ (max >> 31 & 0x7fffffff)));
}

// What the exponentials of a chunk may come to while they are relative to less than its maximum. Exponents
// below 4 lose no digits, and a chunk of no more than that maximum comes to 8 at most.
constexpr float HEADROOM = 16.0f;

constexpr float LOG2_E = 1.44269504f;
constexpr double LN_2 = 0.69314718055994530942;

// Exponentials are 2^(z * exponent - reference), exponent = log2(e) / T: one multiply-add each, rounded
// once. The reference is a maximum (or a little less), so that logits of any size lose no digits; its own
// rounding is no error, since the sums, the margins and the gradient share it.
ATKD_DEVICE float reference_of(float max, float exponent) { return fmaxf(max * exponent, NO_MAX); }
// The same for 2^(z * log2(e)).
ATKD_DEVICE float reference_at_1(float reference, float exponent) {
    return reference_of(reference, LOG2_E / exponent);
}

// What a sum starts from, so that the maximum itself, on which a peaked row's loss hangs, counts as exactly
// 2^residue, the residue being the reference's rounding, and not with exp2_fast's error.
ATKD_DEVICE float start_of(float max, float reference, float exponent) {
    float residue = fmaf(max, exponent, -reference), x = residue * float(LN_2);
    return fabsf(x) < 0.01f ? fmaf(x, fmaf(x, 0.5f, 1.0f), 1.0f) - exp2_fast(residue) : 0.0f;
}

// One pass over a row, or a part of it, target left out. With the exponents
// x_j = z^p_j * exponent - teacher_reference, y_j = z^q_j * exponent - student_reference:
template <class Real> struct RowState {
    Real teacher_sum;      // sum 2^x_j
    Real weighted_gap;     // sum 2^x_j (x_j - y_j)
    Real student_sum;      // sum 2^y_j
    Real student_sum_at_1; // sum 2^(z^q_j * log2(e) - reference_at_1), for cross entropy
    float teacher_reference, student_reference;
    uint32_t ruled_out; // the student rules out (-inf) a token that the teacher does not

    static ATKD_DEVICE RowState empty() { return {0, 0, 0, 0, NO_MAX, NO_MAX, 0}; }

    // From a lane's maxima; the references are the warp's.
    static ATKD_DEVICE RowState from(float teacher_max, float student_max, float exponent) {
        RowState state = empty();
        state.teacher_reference = reference_of(max_of_warp(teacher_max), exponent);
        state.student_reference = reference_of(max_of_warp(student_max), exponent);
        state.teacher_sum = start_of(teacher_max, state.teacher_reference, exponent);
        state.student_sum = start_of(student_max, state.student_reference, exponent);
        return state;
    }

    // Not if anything was masked.
    ATKD_DEVICE bool finite() const { return fabsf(weighted_gap) < -OUTSIDE; }

    // The same sums relative to new references, neither below the old one.
    ATKD_DEVICE void rebase(float new_teacher, float new_student, float exponent) {
        float dp = teacher_reference - new_teacher, dq = student_reference - new_student;
        Real teacher = exp2_fast(dp), student = exp2_fast(dq);
        // A part that holds nothing has no gap to carry, and its distance may overflow.
        Real shift = teacher_sum == 0 ? 0 : teacher_sum * (Real(dp) - Real(dq));
        weighted_gap = teacher == 0 ? Real(0) : teacher * (weighted_gap + shift);
        teacher_sum *= teacher;
        student_sum *= student;
        if (student_sum_at_1 != 0) {
            student_sum_at_1 *=
                exp2_fast(reference_at_1(student_reference, exponent) - reference_at_1(new_student, exponent));
        }
        teacher_reference = new_teacher;
        student_reference = new_student;
    }

    // Another part of the same row.
    ATKD_DEVICE void merge(RowState other, float exponent) {
        float teacher = fmaxf(teacher_reference, other.teacher_reference);
        float student = fmaxf(student_reference, other.student_reference);
        rebase(teacher, student, exponent);
        other.rebase(teacher, student, exponent);
        teacher_sum += other.teacher_sum;
        weighted_gap += other.weighted_gap;
        student_sum += other.student_sum;
        student_sum_at_1 += other.student_sum_at_1;
        ruled_out |= other.ruled_out;
    }
};

// The largest of many elements, NaN aside.
template <class T> struct Largest {
    uint32_t two = to_bits(narrow<T>(OUTSIDE)) * 0x10001u;

    ATKD_DEVICE void add(const Packed<T> &packed) {
        ATKD_UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            two = max_of_two<T>(two, packed.part[0].word[i]);
        }
    }
    ATKD_DEVICE float value() const {
        return fmaxf(fmaxf(OUTSIDE, widen(from_bits<T>(two))), widen(from_bits<T>(two >> 16)));
    }
};
template <> struct Largest<float> {
    float one = OUTSIDE;

    ATKD_DEVICE void add(const Packed<float> &packed) {
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            one = fmaxf(one, from_bits<float>(packed.part[k / 4].word[k % 4]));
        }
    }
    ATKD_DEVICE float value() const { return one; }
};

template <class T> ATKD_DEVICE float max_of(const Packed<T> &packed) {
    Largest<T> largest;
    largest.add(packed);
    return largest.value();
}

// Adds a chunk of both models, relative to the state's references. The target, and what lies outside the
// row, are -inf in both; MASKED says that something is.
template <bool AT_1, bool MASKED, class P, class Q>
ATKD_DEVICE void add(RowState<float> &state, const Packed<P> &teacher, const Packed<Q> &student, float exponent) {
    float a[CHUNK], b[CHUNK];
    unpack(teacher, a);
    unpack(student, b);
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        float x = fmaf(a[k], exponent, -state.teacher_reference);
        float y = fmaf(b[k], exponent, -state.student_reference);
        float p = exp2_fast(x), gap = x - y;
        if (MASKED) {
            // Not 0 * inf; and what the student rules out is counted, not multiplied.
            bool ruled_out = b[k] == OUTSIDE && a[k] != OUTSIDE;
            state.ruled_out |= ruled_out ? 1u : 0u;
            gap = p == 0.0f || ruled_out ? 0.0f : gap;
        }
        state.teacher_sum += p;
        state.weighted_gap = fmaf(p, gap, state.weighted_gap);
        state.student_sum += exp2_fast(y);
        if (AT_1) {
            state.student_sum_at_1 +=
                exp2_fast(fmaf(b[k], LOG2_E, -reference_at_1(state.student_reference, exponent)));
        }
    }
}

// As add, and raises the references where the chunk exceeds them by much.
template <bool AT_1, class P, class Q>
ATKD_DEVICE void accumulate(RowState<float> &state, const Packed<P> &teacher, const Packed<Q> &student,
                            float exponent) {
    RowState<float> before = state;
    add<AT_1, false>(state, teacher, student, exponent);
    bool fits = state.finite() && state.teacher_sum - before.teacher_sum < HEADROOM &&
                state.student_sum - before.student_sum < HEADROOM &&
                (!AT_1 || state.student_sum_at_1 - before.student_sum_at_1 < HEADROOM);
    if (ATKD_RARELY(!fits)) {
        state = before;
        state.rebase(fmaxf(state.teacher_reference, reference_of(max_of(teacher), exponent)),
                     fmaxf(state.student_reference, reference_of(max_of(student), exponent)), exponent);
        add<AT_1, true>(state, teacher, student, exponent);
    }
}

// The log-odds against the target: log sum_{j != g} e^{(z_j - z_g) / T}.
ATKD_DEVICE double margin_of(float reference, double sum, float target, float exponent) {
    if (target == -OUTSIDE) {
        return nan("");
    }
    return log(sum) + (double(reference) - double(target) * double(exponent)) * LN_2;
}

ATKD_DEVICE double sigmoid(double x) {
    double e = exp(-fabs(x));
    return (x <= 0 ? e : 1.0) / (1.0 + e);
}

ATKD_DEVICE double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// A term with coefficient 0 is absent, even where it is infinite.
ATKD_DEVICE double weighted(double coefficient, double term) {
    return coefficient == 0 ? 0 : coefficient * term;
}

// The log-odds against the target in each model's distribution; NaN if anything in the row is.
struct Margins {
    double teacher;
    double student;
    double student_at_1;
    bool not_a_number;
};

ATKD_DEVICE Margins margins_of(const atkd_objective &objective, const RowState<double> &state, float exponent,
                               float teacher_target, float student_target) {
    Margins m;
    m.teacher = margin_of(state.teacher_reference, state.teacher_sum, teacher_target, exponent);
    m.student = margin_of(state.student_reference, state.student_sum, student_target, exponent);
    m.student_at_1 = m.student;
    if (ATKD_RARELY(objective.ce_weight != 0 && objective.inverse_temperature != 1.0)) {
        m.student_at_1 = margin_of(reference_at_1(state.student_reference, exponent), state.student_sum_at_1,
                                   student_target, LOG2_E);
    }
    bool gap_not_a_number = state.teacher_sum != 0 && state.ruled_out == 0 && state.weighted_gap != state.weighted_gap;
    m.not_a_number = m.teacher != m.teacher || m.student != m.student || gap_not_a_number;
    return m;
}

ATKD_DEVICE double coefficient_of(const atkd_coefficient &coefficient, double uncertainty) {
    return coefficient.value * (coefficient.times_uncertainty != 0 ? uncertainty : 1.0);
}

// The gradient with respect to z_j is
// student 2^y_j - teacher 2^x_j + student_at_1 2^(z^q_j * log2(e) - reference_at_1).
struct alignas(16) GradientScales {
    float teacher, student, student_at_1;
    float target; // the gradient at the target
    float teacher_reference, student_reference;
};

// What the whole cluster waits for between its two passes, and so no more than that. `scale` is the
// reduction's and the upstream gradient's.
ATKD_DEVICE GradientScales scales_of(const atkd_objective &objective, const RowState<double> &state,
                                     const Margins &m, bool hard, double scale) {
    if (m.not_a_number) {
        float not_a_number = nanf("");
        return {not_a_number, not_a_number, not_a_number, not_a_number, 0, 0};
    }
    double inverse_temperature = objective.inverse_temperature;
    bool at_1 = inverse_temperature != 1.0;
    // On the side where the teacher's sigmoid is small; swapping "the target" for "not the target" flips
    // the sign.
    double sign = m.teacher > 0 ? -1 : 1;
    double slope = sign * (sigmoid(sign * m.student) - sigmoid(sign * m.teacher));
    double uncertainty = sigmoid(m.teacher);
    // Where the teacher has no mass off the target, DKD is 0 whatever the student does.
    double beta = state.teacher_sum == 0 ? 0 : coefficient_of(objective.dkd[hard ? 1 : 0], uncertainty);
    double gamma = coefficient_of(objective.tkd[hard ? 1 : 0], uncertainty) * slope;
    double gamma_at_1 = weighted(objective.ce_weight, sigmoid(m.student_at_1));
    // A sum of 0 belongs to exponentials that are all 0, and so is their share of the gradient.
    double teacher = state.teacher_sum == 0 ? 0 : beta * inverse_temperature * scale / state.teacher_sum;
    double student =
        state.student_sum == 0 ? 0 : (beta + gamma) * inverse_temperature * scale / state.student_sum;
    double sum_at_1 = at_1 ? state.student_sum_at_1 : state.student_sum;
    double student_at_1 = sum_at_1 == 0 ? 0 : gamma_at_1 * scale / sum_at_1;
    return {float(teacher), float(at_1 ? student : student + student_at_1), at_1 ? float(student_at_1) : 0.0f,
            float(-(gamma * inverse_temperature + gamma_at_1) * scale), state.teacher_reference,
            state.student_reference};
}

struct Terms {
    double uncertainty, tkd, dkd, loss;
};

ATKD_DEVICE Terms terms_of(const atkd_objective &objective, const RowState<double> &state, const Margins &m,
                           bool hard) {
    Terms terms;
    terms.uncertainty = sigmoid(m.teacher);
    if (m.not_a_number) {
        terms.tkd = terms.dkd = terms.loss = nan("");
        return terms;
    }
    double infinity = -double(OUTSIDE);
    double sign = m.teacher > 0 ? -1 : 1, u = sign * m.teacher, w = sign * m.student;
    terms.tkd = u == -infinity         ? softplus(w)
                : fabs(w) == infinity ? infinity
                                      : softplus(w) - softplus(u) - sigmoid(u) * (w - u);
    terms.dkd = 0;
    if (state.teacher_sum != 0) {
        double dkd =
            state.weighted_gap / state.teacher_sum * LN_2 - log(state.teacher_sum) + log(state.student_sum);
        // Rounding may fall below 0, a divergence cannot.
        terms.dkd = state.ruled_out != 0 ? infinity : fmax(dkd, 0.0);
    }
    double c_tkd = coefficient_of(objective.tkd[hard ? 1 : 0], terms.uncertainty);
    double c_dkd = coefficient_of(objective.dkd[hard ? 1 : 0], terms.uncertainty);
    terms.loss = weighted(c_tkd, terms.tkd) + weighted(c_dkd, terms.dkd) +
                 weighted(objective.ce_weight, softplus(m.student_at_1));
    return terms;
}

// An unsigned integer that orders as the margins do: NaN is 1, below every number; 0 is left for
// ignored tokens. -0 and 0 are one.
ATKD_DEVICE uint32_t key_of(float margin) {
    if (margin != margin) {
        return 1;
    }
    union {
        float number;
        uint32_t bits;
    } image = {margin + 0.0f};
    return image.bits & 0x80000000u ? ~image.bits : image.bits | 0x80000000u;
}
