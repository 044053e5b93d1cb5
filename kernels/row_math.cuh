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
// The passes over a row are in float32, and so is what its gradient waits for. What the loss is made of is in double,
// once a row or token: a few dozen operations beside a hundred thousand. The margins and DKD go from one to the other as
// float32.
#pragma once

#include "memory.cuh"

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

constexpr float LOWEST = -3.402823466e38f;

// To and from float, an integer below 2^22 is what this one's last bits say.
constexpr float ROUNDS = 12582912.0f; // 1.5 * 2^23

// Exponentials are 2^(z * exponent - reference), exponent = log2(e) / T: one multiply-add each, rounded once. The
// reference is the integer nearest to a maximum's exponent (or a little less), so that logits up to 1e5 lose no digits
// and sums are rebased by exact powers of 2. From LARGE on the exponents' digits would not do: there the maximum itself
// is subtracted first. Passes over a row do so only where they must, in code of its own: in the common code a LARGE
// reference is NaN, and so is what it makes of a row.
constexpr float LARGE = 262144.0f;

ATKD_DEVICE float reference_of(float max, float exponent) {
    float reference = fmaf(max, exponent, ROUNDS) - ROUNDS;
    return fabsf(reference) < LARGE ? reference : nanf("");
}

// Gaps are in units of this, so that those between any two logits are finite. Nothing but the exponent of a float
// changes.
constexpr float GAP_UNIT = 0x1p64f;

// What the exponents of a part of a row are relative to: (z - shift) * exponent - reference, for any finite maximum.
struct Base {
    float shift, reference;

    static ATKD_DEVICE Base of(float max, float exponent) {
        float reference = fmaf(max, exponent, ROUNDS) - ROUNDS;
        bool large = !(fabsf(reference) < LARGE);
        return {large ? max : 0.0f, large ? 0.0f : reference};
    }
    ATKD_DEVICE float exponent_of(float z, float exponent) const { return fmaf(z - shift, exponent, -reference); }
    // The same in units of GAP_UNIT.
    ATKD_DEVICE float gap_of(float z, float exponent) const {
        return fmaf(0.5f * z - 0.5f * shift, exponent * (2 / GAP_UNIT), -reference * (1 / GAP_UNIT));
    }
};

// How much the exponents change from one maximum's base to another's; and the same in units of GAP_UNIT.
ATKD_DEVICE float distance(float from_max, float to_max, float exponent) {
    Base from = Base::of(from_max, exponent), to = Base::of(to_max, exponent);
    return fmaf(from.shift - to.shift, exponent, from.reference - to.reference);
}
ATKD_DEVICE float gap_between(float from_max, float to_max, float exponent) {
    Base from = Base::of(from_max, exponent), to = Base::of(to_max, exponent);
    return fmaf(0.5f * from.shift - 0.5f * to.shift, exponent * (2 / GAP_UNIT),
                (from.reference - to.reference) * (1 / GAP_UNIT));
}

// 2^x of such a distance, which is not above 0: exactly, where it is an integer.
ATKD_DEVICE float exp2_of_distance(float x) {
    x = fmaxf(x, -127.0f);
    float rounded = x + ROUNDS;
    // 0 from -127.
    float power = from_bits<float>((to_bits(rounded) << 23) + 0x3f800000u);
    return power * exp2_fast(x - (rounded - ROUNDS));
}

// What a sum lacks for the maximum itself, on which a peaked row's loss hangs, to count as exactly 2^residue, the
// residue being what the reference is off by, and not with exp2_fast's error.
ATKD_DEVICE float correction_of(float max, float exponent) {
    float x = Base::of(max, exponent).exponent_of(max, exponent);
    // 2^x for |x| <= 1/2, to 2e-8: Cephes'.
    float power = 1.535336188e-4f;
    power = fmaf(power, x, 1.339887440e-3f);
    power = fmaf(power, x, 9.618437358e-3f);
    power = fmaf(power, x, 5.550332471e-2f);
    power = fmaf(power, x, 2.402264791e-1f);
    power = fmaf(power, x, 6.931472029e-1f);
    return fmaf(power, x, 1.0f) - exp2_fast(x);
}

struct References {
    float teacher, student;
    float student_at_1; // of 2^(z^q_j * log2(e))
};

// One pass over a row, or a part of it, target left out. With the exponents x_j of the teacher relative to the base of
// its maximum, y_j likewise of the student:
template <class Real> struct RowState {
    Real teacher_sum;      // sum 2^x_j
    Real weighted_gap;     // sum 2^x_j (x_j - y_j), in units of GAP_UNIT
    Real student_sum;      // sum 2^y_j
    Real student_sum_at_1; // the student's sum at temperature 1, for cross entropy
    float teacher_max, student_max; // finite; of nothing, or of -inf alone, LOWEST
    uint32_t ruled_out; // the student rules out (-inf) a token that the teacher does not

    static ATKD_DEVICE RowState empty() { return {0, 0, 0, 0, LOWEST, LOWEST, 0}; }

    // From a lane's maxima to the warp's.
    static ATKD_DEVICE RowState from(float teacher_max, float student_max) {
        RowState state = empty();
        state.teacher_max = fmaxf(max_of_warp(teacher_max), LOWEST);
        state.student_max = fmaxf(max_of_warp(student_max), LOWEST);
        return state;
    }

    ATKD_DEVICE References references(float exponent) const {
        return {reference_of(teacher_max, exponent), reference_of(student_max, exponent),
                reference_of(student_max, LOG2_E)};
    }

    // Not if anything was masked, or a reference is LARGE.
    ATKD_DEVICE bool finite() const { return fabsf(weighted_gap) < -OUTSIDE; }

    // The same sums relative to new maxima, neither below the old one.
    template <bool AT_1> ATKD_DEVICE void rebase(float new_teacher_max, float new_student_max, float exponent) {
        float dp = gap_between(teacher_max, new_teacher_max, exponent);
        float dq = gap_between(student_max, new_student_max, exponent);
        Real teacher = exp2_of_distance(dp * GAP_UNIT), student = exp2_of_distance(dq * GAP_UNIT);
        weighted_gap = teacher * (weighted_gap + teacher_sum * (Real(dp) - Real(dq)));
        teacher_sum *= teacher;
        student_sum *= student;
        if (AT_1) {
            student_sum_at_1 *= exp2_of_distance(distance(student_max, new_student_max, LOG2_E));
        }
        teacher_max = new_teacher_max;
        student_max = new_student_max;
    }

    // Another part of the same row.
    template <bool AT_1> ATKD_DEVICE void merge(RowState other, float exponent) {
        float teacher = fmaxf(teacher_max, other.teacher_max), student = fmaxf(student_max, other.student_max);
        rebase<AT_1>(teacher, student, exponent);
        other.template rebase<AT_1>(teacher, student, exponent);
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
        return fmaxf(widen(from_bits<T>(two)), widen(from_bits<T>(two >> 16)));
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

// Adds a chunk of both models, relative to the bases of the state's maxima, whose references are given. The target, and
// what lies outside the row, are -inf in both. CAREFUL: that or LARGE references are there. The chunk has sums of its
// own first, so that few additions round a large one.
template <bool AT_1, bool CAREFUL, class P, class Q>
ATKD_DEVICE void add(RowState<float> &state, const References &references, const Packed<P> &teacher,
                     const Packed<Q> &student, float exponent) {
    float a[CHUNK], b[CHUNK];
    unpack(teacher, a);
    unpack(student, b);
    Base teacher_base = Base::of(state.teacher_max, exponent), student_base = Base::of(state.student_max, exponent);
    Base student_base_at_1 = Base::of(state.student_max, LOG2_E);
    float teacher_sum = 0, weighted_gap = 0, student_sum = 0, student_sum_at_1 = 0;
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        float x, y, p, gap;
        if (CAREFUL) {
            float x_gap = teacher_base.gap_of(a[k], exponent), y_gap = student_base.gap_of(b[k], exponent);
            x = x_gap * GAP_UNIT;
            y = y_gap * GAP_UNIT;
            p = exp2_fast(x);
            // Not 0 * inf; and what the student rules out is counted, not multiplied.
            bool ruled_out = b[k] == OUTSIDE && a[k] != OUTSIDE;
            state.ruled_out |= ruled_out ? 1u : 0u;
            gap = p == 0.0f || ruled_out ? 0.0f : x_gap - y_gap;
        } else {
            x = fmaf(a[k], exponent, -references.teacher);
            y = fmaf(b[k], exponent, -references.student);
            p = exp2_fast(x);
            gap = x - y;
        }
        float q = exp2_fast(y);
        teacher_sum = k == 0 ? p : teacher_sum + p;
        weighted_gap = k == 0 ? p * gap : fmaf(p, gap, weighted_gap);
        student_sum = k == 0 ? q : student_sum + q;
        if (AT_1) {
            float q_at_1 = exp2_fast(CAREFUL ? student_base_at_1.exponent_of(b[k], LOG2_E)
                                             : fmaf(b[k], LOG2_E, -references.student_at_1));
            student_sum_at_1 = k == 0 ? q_at_1 : student_sum_at_1 + q_at_1;
        }
    }
    state.teacher_sum += teacher_sum;
    state.weighted_gap = CAREFUL ? state.weighted_gap + weighted_gap
                                 : fmaf(weighted_gap, 1 / GAP_UNIT, state.weighted_gap);
    state.student_sum += student_sum;
    if (AT_1) {
        state.student_sum_at_1 += student_sum_at_1;
    }
}

// As add, and raises the references where the chunk exceeds them by much.
template <bool AT_1, class P, class Q>
ATKD_DEVICE void accumulate(RowState<float> &state, References &references, const Packed<P> &teacher,
                            const Packed<Q> &student, float exponent) {
    RowState<float> before = state;
    add<AT_1, false>(state, references, teacher, student, exponent);
    bool fits = state.finite() && state.teacher_sum - before.teacher_sum < HEADROOM &&
                state.student_sum - before.student_sum < HEADROOM &&
                (!AT_1 || state.student_sum_at_1 - before.student_sum_at_1 < HEADROOM);
    if (ATKD_RARELY(!fits)) {
        state = before;
        state.rebase<AT_1>(fmaxf(state.teacher_max, max_of(teacher)), fmaxf(state.student_max, max_of(student)),
                           exponent);
        references = state.references(exponent);
        add<AT_1, true>(state, references, teacher, student, exponent);
    }
}

// Whether the gap is not a number; without mass to weigh it by, or infinite, it does not count.
template <class Real> ATKD_DEVICE bool has_nan(const RowState<Real> &state) {
    return state.teacher_sum != 0 && state.ruled_out == 0 && state.weighted_gap != state.weighted_gap;
}

// From the logarithm of a sum to the log-odds against the target, log sum_{j != g} e^{(z_j - z_g) / T}.
ATKD_DEVICE double to_margin(float max, float target, float exponent) {
    float residue = Base::of(max, exponent).exponent_of(max, exponent);
    double difference = ((double(max) - double(target)) * double(exponent) - double(residue)) * LN_2;
    return target == -OUTSIDE ? nan("") : difference;
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

ATKD_DEVICE double coefficient_of(const atkd_coefficient &coefficient, double uncertainty) {
    return coefficient.value * (coefficient.times_uncertainty != 0 ? uncertainty : 1.0);
}

struct Terms {
    double uncertainty, tkd, dkd, loss;
};

// From the margins u and w, the student's at temperature 1, and DKD, which is NaN if anything in the row is.
ATKD_DEVICE Terms terms_of(const atkd_objective &objective, double teacher_margin, double student_margin,
                           double student_margin_at_1, double dkd, bool hard) {
    Terms terms;
    terms.uncertainty = sigmoid(teacher_margin);
    terms.tkd = terms.dkd = terms.loss = dkd;
    if (dkd != dkd) {
        return terms;
    }
    // On the side where the teacher's sigmoid is small; swapping "the target" for "not the target" changes
    // nothing.
    double infinity = -double(OUTSIDE);
    double sign = teacher_margin > 0 ? -1 : 1, u = sign * teacher_margin, w = sign * student_margin;
    terms.tkd = u == -infinity         ? softplus(w)
                : fabs(w) == infinity ? infinity
                                      : softplus(w) - softplus(u) - sigmoid(u) * (w - u);
    double c_tkd = coefficient_of(objective.tkd[hard ? 1 : 0], terms.uncertainty);
    double c_dkd = coefficient_of(objective.dkd[hard ? 1 : 0], terms.uncertainty);
    terms.loss = weighted(c_tkd, terms.tkd) + weighted(c_dkd, terms.dkd) +
                 weighted(objective.ce_weight, softplus(student_margin_at_1));
    return terms;
}

// The gradient with respect to z_j is student 2^y_j - teacher 2^x_j + student_at_1 2^(y_j at temperature 1).
struct alignas(16) GradientScales {
    float teacher, student, student_at_1;
    float target; // the gradient at the target
    float teacher_max, student_max, teacher_reference, student_reference;

    ATKD_DEVICE float reference_at_1() const { return reference_of(student_max, LOG2_E); }
    // A reference is NaN.
    template <bool AT_1> ATKD_DEVICE bool large() const {
        float sum = teacher_reference + student_reference + (AT_1 ? reference_at_1() : 0.0f);
        return sum != sum;
    }
};

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

// The margin of a key; of NaN or an ignored token one below all.
ATKD_DEVICE float margin_of_key(uint32_t key) {
    return key <= 1 ? OUTSIDE : from_bits<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}
