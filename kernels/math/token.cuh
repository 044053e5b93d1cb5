// The loss of one token and its gradient's coefficients, from a handful of numbers about its row. D is a divergence
// (forward_kl.cuh). With u, w the margins of teacher and student, L - z_g (L without the target g):
//
//   UNC = sigmoid(u)     TKD = D of the two classes "the target, or not"     DKD = D of the renormalised rest
//   loss = c_tkd TKD + c_dkd DKD + c_ce CE     CE = softplus(w)
//   dloss/db_j = gamma qhat_j + beta dDKD/db_j (j != g)     dloss/db_g = -gamma
//   beta = c_dkd     gamma = c_tkd dTKD/dw + c_ce sigmoid(w)
//
// The passes over a row are in float32, and so is what its gradient waits for. What the loss is made of is in double,
// once per row or token: a few dozen operations beside a hundred thousand. The margins and DKD go from one to the other
// as float32.
#pragma once

#include "../batch.cuh"
#include "groups.cuh"
#include "keys.cuh"
#include "online.cuh"

// A flag that is known when compiling.
template <bool B> struct Flag {
    static constexpr bool value = B;
};

// The kinds of a state's fields, by how two parts of a row merge: sums relative to the same maxima add up; flags are
// 0 or not, and set if they are in either.
enum Field { SUM, MAX, FLAG };
template <Field F> struct FieldKind {
    static constexpr Field value = F;
};
// The model whose probabilities weigh a state's cross term.
enum CrossTerm { NO_CROSS_TERM, BY_TEACHER, BY_STUDENT };

template <class D, class Real> using RowState = typename D::template State<Real>;

ATKD_DEVICE double sigmoid(double x) {
    double e = exp(-fabs(x));
    return (x <= 0 ? e : 1.0) / (1.0 + e);
}

ATKD_DEVICE double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// KL of the two classes with log-odds w from those with u. It is computed on the side where sigmoid(u) is small; swapping
// "the target" for "not the target" changes nothing.
ATKD_DEVICE double bernoulli_kl(double u, double w) {
    double sign = u > 0 ? -1 : 1, infinity = -double(NEG_INF);
    u *= sign;
    w *= sign;
    return u == -infinity        ? softplus(w)
           : fabs(w) == infinity ? infinity
                                 : softplus(w) - softplus(u) - sigmoid(u) * (w - u);
}

// A term with coefficient 0 is absent, even where it is infinite.
ATKD_DEVICE double weighted(double coefficient, double term) { return coefficient == 0 ? 0 : coefficient * term; }

ATKD_DEVICE double coefficient_of(const atkd_coefficient &coefficient, double uncertainty) {
    return coefficient.value * (coefficient.times_uncertainty != 0 ? uncertainty : 1.0);
}

// The loss is the sum of distillation and ce, which have their weights.
struct Terms {
    double uncertainty, tkd, dkd, loss, distillation, ce;
};

// From the margins u and w, the student's at temperature 1, and DKD, which is NaN if anything in the row is; times the
// token's own weight, and the distillation terms times `square`, that of the token's own temperature.
template <class D>
ATKD_DEVICE Terms terms_of(const atkd_objective &objective, const atkd_divergence &divergence, double teacher_margin,
                           double student_margin, double student_margin_at_1, double dkd, bool hard, double weight,
                           double square) {
    Terms terms;
    terms.uncertainty = sigmoid(teacher_margin);
    terms.tkd = terms.dkd = terms.loss = terms.distillation = dkd;
    terms.ce = 0;
    if (dkd != dkd) {
        return terms;
    }
    terms.tkd = D::tkd(divergence, teacher_margin, student_margin);
    double c_tkd = weight * square * coefficient_of(objective.tkd[hard ? 1 : 0], terms.uncertainty);
    double c_dkd = weight * square * coefficient_of(objective.dkd[hard ? 1 : 0], terms.uncertainty);
    terms.ce = weighted(weight * objective.ce_weight, softplus(student_margin_at_1));
    terms.distillation = D::loss(divergence, c_tkd, c_dkd, student_margin, terms.tkd, terms.dkd);
    terms.loss = terms.distillation + terms.ce;
    return terms;
}

// A coefficient in single precision: constant + times_uncertainty * UNC.
struct Weight {
    float constant, times_uncertainty;

    static ATKD_DEVICE Weight of(const atkd_coefficient &coefficient, double scale) {
        // Not 0 times an infinite upstream gradient.
        float value = coefficient.value == 0 ? 0 : float(coefficient.value * scale);
        bool times = coefficient.times_uncertainty != 0;
        return {times ? 0 : value, times ? value : 0};
    }
    ATKD_DEVICE float at(float uncertainty) const { return fmaf(times_uncertainty, uncertainty, constant); }
};

// The weights of the terms times the gradient's scale, for easy tokens and for hard ones; the same for all rows.
struct alignas(16) Weights {
    Weight easy_tkd, hard_tkd, easy_dkd, hard_dkd;
    float ce;             // NaN if the scale is not finite: then so is the whole gradient
    float threshold_odds; // the predicted threshold: a token is taken to be hard from these odds on

    static ATKD_DEVICE Weights of(const atkd_rows &p) {
        const atkd_objective &objective = p.objective;
        uint32_t valid = p.reduction == ATKD_SUM ? 0 : load(&p.batch.summary->counted_valid), hard = 0;
        if (p.reduction == ATKD_GROUP_MEAN) {
            hard = p.hard_ratio < 0 ? load(&p.batch.summary->counted_hard) : hard_count(p.hard_ratio, valid);
        }
        auto scales = ReductionScales::of(p.reduction, p.scale, valid, hard);
        double upstream = p.upstream == nullptr ? 1.0 : load(p.upstream), ce = scales.ce * upstream;
        double easy_at_t = scales.easy * upstream * objective.inverse_temperature;
        double hard_at_t = scales.hard * upstream * objective.inverse_temperature;
        float threshold_odds =
            p.predicts == 0 ? 0 : exp2_fast(margin_of_key(load(&p.batch.summary->predicted_threshold)) * LOG2_E);
        return {Weight::of(objective.tkd[0], easy_at_t),
                Weight::of(objective.tkd[1], hard_at_t),
                Weight::of(objective.dkd[0], easy_at_t),
                Weight::of(objective.dkd[1], hard_at_t),
                float((objective.ce_weight == 0 ? 0 : objective.ce_weight * ce) + (ce - ce)),
                threshold_odds};
    }
};

// A model's odds against the target, e^margin, with the inverse of its sum.
struct Odds {
    float inverse, odds, sigmoid, rest; // rest: 1 - sigmoid

    static ATKD_DEVICE Odds of(float sum, float max, float target_logit, float exponent) {
        // A sum of 0 belongs to exponentials that are all 0, and so is their share of the gradient.
        bool no_mass = sum == 0 && target_logit > NEG_INF;
        float to_target = -Shift::of(max, exponent).exponent_of(target_logit, exponent);
        float odds = no_mass ? 0 : (sum + correction_of(max, exponent)) * exp2_fast(to_target);
        odds = target_logit == -NEG_INF ? nanf("") : odds;
        // 0 from odds of 2^126 on.
        float rest = reciprocal_fast(1 + odds);
        // Not corrected: the gradient's exponential of the maximum has the error that its part of the sum has, and
        // near 1 their ratio must be right to the last bit. So one step of Newton's.
        float inverse = reciprocal_fast(sum);
        inverse = fmaf(inverse, fmaf(-sum, inverse, 1.0f), inverse);
        return {sum == 0 ? 0 : inverse, odds, rest == 0 ? 1 : odds * rest, rest};
    }
};

// The weights of a token's terms in its gradient, and what cross entropy adds to gamma.
struct TermWeights {
    float tkd, dkd, gamma_ce;
};

// A row's numbers for the gradients of its elements.
struct alignas(16) GradientScales {
    float teacher, student, student_at_1; // the divergence's own factors of an element's exponentials
    float target;                         // the gradient at the target
    float teacher_max, student_max, teacher_shift, student_shift;

    ATKD_DEVICE void make_gradient_nan() { teacher = student = student_at_1 = target = nanf(""); }
    // Whatever the row is passed over for again is NaN as well.
    ATKD_DEVICE void make_nan() {
        make_gradient_nan();
        teacher_max = student_max = teacher_shift = student_shift = 0;
    }
    ATKD_DEVICE float shift_at_1() const { return shift_of(student_max, LOG2_E); }
    // A shift is NaN.
    template <bool CE_SUM> ATKD_DEVICE bool large() const {
        float sum = teacher_shift + student_shift + (CE_SUM ? shift_at_1() : 0.0f);
        return sum != sum;
    }
};

// The exponents of a row's elements relative to their shifts. LARGE_ROW: a shift is LARGE.
template <bool LARGE_ROW> struct RowShifts {
    Shift teacher_shift, student_shift, shift_at_1;
    float exponent;

    ATKD_DEVICE RowShifts(const GradientScales &scales, float exponent_)
        : teacher_shift(full(scales.teacher_max, scales.teacher_shift, exponent_)),
          student_shift(full(scales.student_max, scales.student_shift, exponent_)),
          shift_at_1(full(scales.student_max, scales.shift_at_1(), LOG2_E)), exponent(exponent_) {}

    static ATKD_DEVICE Shift full(float max, float shift, float exponent) {
        return LARGE_ROW ? Shift::of(max, exponent) : Shift{0, shift};
    }
    static ATKD_DEVICE float of(const Shift &shift, float z, float exponent) {
        return LARGE_ROW ? shift.exponent_of(z, exponent) : fmaf(z, exponent, -shift.exponent_shift);
    }
    ATKD_DEVICE float teacher(float z) const { return of(teacher_shift, z, exponent); }
    ATKD_DEVICE float student(float z) const { return of(student_shift, z, exponent); }
    ATKD_DEVICE float student_at_1(float z) const { return of(shift_at_1, z, LOG2_E); }
};

// The gradient of a chunk but for the target. LARGE_ROW: a shift of the row is LARGE.
template <class D, bool CE_SUM, bool LARGE_ROW, class P, class Q>
ATKD_DEVICE void gradient_chunk(const atkd_divergence &divergence, const typename D::Scales &scales, float exponent,
                                const Packed<P> &teacher, const Packed<Q> &student, float (&g)[CHUNK]) {
    float a[CHUNK], b[CHUNK];
    unpack(teacher, a);
    unpack(student, b);
    RowShifts<LARGE_ROW> shifts(scales, exponent);
    D::by_form(divergence, [&](auto form) {
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            g[k] = D::template gradient<decltype(form)::value>(divergence, scales, shifts, a[k], b[k]);
            if (CE_SUM) {
                g[k] += scales.student_at_1 * exp2_fast(shifts.student_at_1(b[k]));
            }
        }
    });
}

// The target's logit in either model; to be read before a gradient in place overwrites it.
struct TargetLogits {
    float teacher, student;
};

// From the state of a row, which every lane has, to the scales of its gradient. All warps of the row wait for it: so
// it is in single precision, and in odds, which need no logarithm. CE_SUM: cross entropy has a sum of its own. Where
// groups are predicted, the token's is stored if `writes_group`.
template <class D, bool CE_SUM, class State>
ATKD_DEVICE typename D::Scales scales_of(const atkd_rows &p, const Weights &weights, uint32_t token, uint8_t group,
                                         const State &state, const TargetLogits &target, bool writes_group) {
    float inverse_temperature = inverse_temperature_of(p.batch, token);
    float exponent = inverse_temperature * LOG2_E;
    auto teacher = Odds::of(float(state.teacher_sum), state.teacher_max, target.teacher, exponent);
    auto student = Odds::of(float(state.student_sum), state.student_max, target.student, exponent);
    auto student_at_1 =
        CE_SUM ? Odds::of(float(state.student_sum_at_1), state.student_max, target.student, LOG2_E) : student;
    // The token's group or, before the selection, a prediction of it. Rounding may decide here otherwise than in the
    // margin that the selection goes by; then the prediction was wrong.
    bool hard = p.predicts != 0 ? teacher.odds >= weights.threshold_odds : group == ATKD_HARD;
    float weight = token_weight(p.batch, token), at_t = weight;
    if (p.batch.temperatures != nullptr) {
        // 1 / T of the derivative, and T^2 where that multiplies the terms.
        at_t *= p.objective.times_square != 0 ? load(p.batch.temperatures + token) : inverse_temperature;
    }
    TermWeights of_token = {
        at_t * (hard ? weights.hard_tkd : weights.easy_tkd).at(teacher.sigmoid),
        at_t * (hard ? weights.hard_dkd : weights.easy_dkd).at(teacher.sigmoid),
        weights.ce == 0 ? 0 : weight * weights.ce * student_at_1.sigmoid,
    };
    if (p.predicts != 0 && writes_group && thread_index() % WARP == 0) {
        store(p.batch.groups + token, static_cast<uint8_t>(hard ? ATKD_HARD : ATKD_EASY));
    }
    auto scales =
        D::template scales<CE_SUM>(p.divergence, state, of_token, teacher, student, student_at_1, target, exponent);
    bool finite = weight - weight == 0 && weights.ce == weights.ce;
    if (state.has_nan() || teacher.odds != teacher.odds || student.odds != student.odds) {
        scales.make_nan();
    } else if (!finite) {
        scales.make_gradient_nan();
    }
    return scales;
}

// The lanes of store_margins: lane 0 finishes the teacher, lane 1 the student, lane 2 the student at temperature 1, by
// the same arithmetic at once.
constexpr uint32_t TEACHER = 0, STUDENT = 1, STUDENT_AT_1 = 2;

// By lane 0 of a warp, every lane of which has it.
ATKD_DEVICE void store_dkd(const atkd_rows &p, uint32_t token, double dkd) {
    if (thread_index() % WARP == 0) {
        store(p.dkd + token, float(dkd * (1 / double(GAP_UNIT))));
    }
}

// Stores a row's margins and, where one sweep finds it, DKD, for the selection and for token_terms. Run by one warp, every
// lane of which has the row's state.
template <class D, bool CE_SUM>
ATKD_DEVICE void store_margins(const atkd_rows &p, uint32_t token, const RowState<D, double> &state,
                               const TargetLogits &target) {
    uint32_t lane = thread_index() % WARP;
    float exponent_at_t = inverse_temperature_of(p.batch, token) * LOG2_E, exponent = exponent_at_t;
    double sum = lane == TEACHER ? state.teacher_sum : state.student_sum;
    float max = lane == TEACHER ? state.teacher_max : state.student_max;
    if (CE_SUM && lane == STUDENT_AT_1) {
        sum = state.student_sum_at_1;
        exponent = LOG2_E;
    }
    sum += correction_of(max, exponent);
    double log_sum = log(sum);
    float target_logit = lane == TEACHER ? target.teacher : target.student;
    double margin = log_sum + to_margin(max, target_logit, exponent);
    if constexpr (D::SWEEPS == 1) {
        double weight = D::CROSS == BY_STUDENT ? shuffle_from(sum, STUDENT) : sum;
        double dkd = D::dkd(state, weight, log_sum, shuffle_from(log_sum, STUDENT), exponent_at_t);
        bool not_a_number = state.has_nan() || warp_ballot(lane <= STUDENT && margin != margin) != 0;
        store_dkd(p, token, not_a_number ? nan("") : dkd);
    }
    if (lane == TEACHER) {
        store(p.teacher_margin + token, float(margin));
        if (p.write_keys != 0) {
            store(p.batch.keys + token, key_of(float(margin)));
        }
    }
    if (lane == STUDENT) {
        store(p.student_margin + token, float(margin * (1 / double(GAP_UNIT))));
    }
    if (p.objective.ce_weight != 0 && lane == (CE_SUM ? STUDENT_AT_1 : STUDENT)) {
        store(p.student_margin_at_1 + token, margin);
    }
}
