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

// How far a logit over the temperature may exceed what exponentials are relative to. The sums lose no
// digits to it, and few chunks need a rebase.
constexpr float HEADROOM = 2.0f;

constexpr float LOG2_E = 1.44269504f;

// One pass over a row, or a part of it, target left out. Sums are relative to a maximum of each model
// (or a little less), so that logits of any size lose no digits. At temperature T exponents are
// (z - max) / T, while weighted_gap is in logits.
template <class Real> struct RowState {
    Real teacher_sum;      // sum e^{(z^p_j - max_p) / T}
    Real weighted_gap;     // sum e^{(z^p_j - max_p) / T} ((z^p_j - max_p) - (z^q_j - max_q))
    Real student_sum;      // sum e^{(z^q_j - max_q) / T}
    Real student_sum_at_1; // sum e^{z^q_j - max_q}, for cross entropy
    float teacher_max, student_max;
    uint32_t ruled_out; // the student rules out (-inf) a token that the teacher does not

    static ATKD_DEVICE RowState empty() { return {0, 0, 0, 0, NO_MAX, NO_MAX, 0}; }

    // The same sums relative to new maxima, neither below the old one.
    ATKD_DEVICE void rebase(float new_teacher_max, float new_student_max, float exponent) {
        float dp = teacher_max - new_teacher_max, dq = student_max - new_student_max;
        Real teacher = exp2_fast(dp * exponent), student = exp2_fast(dq * exponent);
        // A part that holds nothing has no gap to carry, and its distance may overflow.
        Real shift = teacher_sum == 0 ? 0 : teacher_sum * (Real(dp) - Real(dq));
        weighted_gap = teacher == 0 ? Real(0) : teacher * (weighted_gap + shift);
        teacher_sum *= teacher;
        student_sum *= student;
        student_sum_at_1 *= exp2_fast(dq * LOG2_E);
        teacher_max = new_teacher_max;
        student_max = new_student_max;
    }

    // Another part of the same row.
    ATKD_DEVICE void merge(RowState other, float exponent) {
        float teacher = fmaxf(teacher_max, other.teacher_max), student = fmaxf(student_max, other.student_max);
        rebase(teacher, student, exponent);
        other.rebase(teacher, student, exponent);
        teacher_sum += other.teacher_sum;
        weighted_gap += other.weighted_gap;
        student_sum += other.student_sum;
        student_sum_at_1 += other.student_sum_at_1;
        ruled_out |= other.ruled_out;
    }
};

ATKD_DEVICE float max_of(const float (&x)[CHUNK]) {
    float max = x[0];
    ATKD_UNROLL
    for (uint32_t k = 1; k < CHUNK; k++) {
        max = fmaxf(max, x[k]);
    }
    return max;
}

ATKD_DEVICE float min_of(const float (&x)[CHUNK]) {
    float min = x[0];
    ATKD_UNROLL
    for (uint32_t k = 1; k < CHUNK; k++) {
        min = fminf(min, x[k]);
    }
    return min;
}

// What a chunk's exponentials must be relative to, given that those before were relative to `max`.
ATKD_DEVICE float raised(float max, float chunk_max, float inverse_temperature) {
    return (chunk_max - max) * inverse_temperature > HEADROOM ? chunk_max : max;
}

// Adds a chunk of both models, relative to the state's maxima. The target, and what lies outside the row,
// are -inf in both; MASKED says that something is.
template <bool AT_1, bool MASKED>
ATKD_DEVICE void add(RowState<float> &state, const float (&a)[CHUNK], const float (&b)[CHUNK], float exponent) {
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        float da = a[k] - state.teacher_max, db = b[k] - state.student_max;
        float p = exp2_fast(da * exponent);
        float gap = da - db;
        if (MASKED) {
            // Not 0 * inf; and what the student rules out is counted, not multiplied.
            bool ruled_out = b[k] == OUTSIDE && a[k] != OUTSIDE;
            state.ruled_out |= ruled_out ? 1u : 0u;
            gap = p == 0.0f || ruled_out ? 0.0f : gap;
        }
        state.teacher_sum += p;
        state.weighted_gap += p * gap;
        state.student_sum += exp2_fast(db * exponent);
        if (AT_1) {
            state.student_sum_at_1 += exp2_fast(db * LOG2_E);
        }
    }
}

// As add, with few chunks masked: the others are spared what those take.
template <bool AT_1>
ATKD_DEVICE void add(RowState<float> &state, const float (&a)[CHUNK], const float (&b)[CHUNK], float exponent,
                     bool masked) {
    if (masked) {
        add<AT_1, true>(state, a, b, exponent);
    } else {
        add<AT_1, false>(state, a, b, exponent);
    }
}

// As add, and raises the maxima where the chunk exceeds them by much.
template <bool AT_1>
ATKD_DEVICE void accumulate(RowState<float> &state, const float (&a)[CHUNK], const float (&b)[CHUNK],
                            float inverse_temperature) {
    float exponent = inverse_temperature * LOG2_E;
    float teacher_max = raised(state.teacher_max, max_of(a), inverse_temperature);
    // At temperature 1 the same distance is a larger exponent.
    float student_max = raised(state.student_max, max_of(b), AT_1 ? fmaxf(inverse_temperature, 1.0f) : inverse_temperature);
    if (teacher_max != state.teacher_max || student_max != state.student_max) {
        state.rebase(teacher_max, student_max, exponent);
    }
    add<AT_1>(state, a, b, exponent, fminf(min_of(a), min_of(b)) == OUTSIDE);
}

// The log-odds against the target: log sum_{j != g} e^{(z_j - z_g) / T}.
ATKD_DEVICE double margin_of(float max, double sum, float target, double inverse_temperature) {
    if (target == -OUTSIDE) {
        return nan("");
    }
    return log(sum) + (double(max) - double(target)) * inverse_temperature;
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

ATKD_DEVICE Margins margins_of(const atkd_objective &objective, const RowState<double> &state, float teacher_target,
                               float student_target) {
    double inverse_temperature = objective.inverse_temperature;
    Margins m;
    m.teacher = margin_of(state.teacher_max, state.teacher_sum, teacher_target, inverse_temperature);
    m.student = margin_of(state.student_max, state.student_sum, student_target, inverse_temperature);
    m.student_at_1 = inverse_temperature == 1.0
                         ? m.student
                         : margin_of(state.student_max, state.student_sum_at_1, student_target, 1.0);
    bool gap_not_a_number = state.teacher_sum != 0 && state.ruled_out == 0 && state.weighted_gap != state.weighted_gap;
    m.not_a_number = m.teacher != m.teacher || m.student != m.student || gap_not_a_number;
    return m;
}

ATKD_DEVICE double coefficient_of(const atkd_coefficient &coefficient, double uncertainty) {
    return coefficient.value * (coefficient.times_uncertainty != 0 ? uncertainty : 1.0);
}

// The gradient with respect to z_j is
// student e^{(z^q_j - max_q) / T} - teacher e^{(z^p_j - max_p) / T} + student_at_1 e^{z^q_j - max_q}.
struct GradientScales {
    float teacher, student, student_at_1;
    float target; // the gradient at the target
};

// What the whole block waits for between its two passes, and so no more than that. `scale` is the
// reduction's and the upstream gradient's.
ATKD_DEVICE GradientScales scales_of(const atkd_objective &objective, const RowState<double> &state,
                                     const Margins &m, bool hard, double scale) {
    if (m.not_a_number) {
        float not_a_number = nanf("");
        return {not_a_number, not_a_number, not_a_number, not_a_number};
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
            float(-(gamma * inverse_temperature + gamma_at_1) * scale)};
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
        double dkd = state.weighted_gap / state.teacher_sum * objective.inverse_temperature -
                     log(state.teacher_sum) + log(state.student_sum);
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
