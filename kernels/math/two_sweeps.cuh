// Divergences of the form sum_j f(p_j, q_j) whose f needs both models' normalised probabilities: the first sweep over a
// row finds the sums that normalise, the second the terms of f, and the gradient follows. With h_j = df/dq_j and its mean
// hbar = sum_i qhat_i h_i, by the names of forward_kl.cuh:
//
//   dDKD/db_j = qhat_j (h_j - hbar)      dTKD/dw = sigmoid'(w) (h(sigmoid(u), sigmoid(w)) - h(sigmoid(-u), sigmoid(-w)))
//
// Plain, over the whole vocabulary, the sums that normalise include the target, which is one more pair of the second
// sweep. TKD and DKD are not computed then.
//
// F is the f: what a pair adds to the sums of the second sweep, the value and the mean of h that follow from these, and the
// slope h of an element.
#pragma once

#include "row_sums.cuh"

ATKD_DEVICE float power_of_2(float x) { return exp2_fast(x); }
ATKD_DEVICE double power_of_2(double x) { return exp2(x); }
ATKD_DEVICE float inverse_of(float x) { return reciprocal_fast(x); }
ATKD_DEVICE double inverse_of(double x) { return 1 / x; }
ATKD_DEVICE float fabs_of(float x) { return fabsf(x); }
ATKD_DEVICE double fabs_of(double x) { return fabs(x); }

// An element's probabilities, or those of a class, and log2(p / q), which is NaN if both are 0.
template <class Real> struct Pair {
    Real teacher, student, log_ratio;
};

// log2(p / q) of two classes, from probabilities that are not both in doubt.
ATKD_DEVICE float log_ratio_of(float p, float q) { return log2f(quotient(p, q)); }

// The sums of the second sweep, by the names that MixtureTerm has for them.
template <class Real> struct PairSums {
    Real teacher, student, slope;

    template <bool CE_SUM, class V, class... States> static ATKD_DEVICE void visit(V f, States &...states) {
        f(FieldKind<SUM>(), states.teacher...);
        f(FieldKind<SUM>(), states.student...);
        f(FieldKind<SUM>(), states.slope...);
    }
    template <bool CE_SUM> static constexpr uint32_t FLOATS = 3;
    static constexpr uint32_t FLAGS = 0;
    static constexpr bool RELATIVE = false;
    static ATKD_DEVICE PairSums empty() { return {0, 0, 0}; }

    template <class Part> ATKD_DEVICE void add(const Part &part) {
        teacher += part.teacher;
        student += part.student;
        slope += part.slope;
    }
};

template <class F> struct TwoSweeps {
    static constexpr uint32_t SWEEPS = 2;
    static constexpr CrossTerm CROSS = NO_CROSS_TERM;
    static constexpr bool SPECIALISED = false;

    template <class Real> using State = RowSums<Real, CROSS>;
    template <class Real> using Terms = PairSums<Real>;

    // The second sweep needs the first four of its own, and leaves the factors of 2^y_j h_j (teacher) and 2^y_j (student).
    struct alignas(16) Scales : GradientScales {
        float teacher_inverse, student_inverse; // p = 2^x_j teacher_inverse
        float log_ratio;                        // what log2(p / q) is less than x_j - y_j
        float dkd_weight;
        Pair<float> target_pair; // 0 if the target is left out

        ATKD_DEVICE void make_nan() {
            GradientScales::make_nan();
            teacher_inverse = student_inverse = nanf("");
        }
    };

    static ATKD_DEVICE double tkd(const atkd_divergence &divergence, double u, double w) {
        auto terms = Terms<double>::empty();
        // The first class is the target, the second the rest.
        F::template add<true>(terms, divergence, {sigmoid(-u), sigmoid(-w), (softplus(w) - softplus(u)) * (1 / LN_2)});
        F::template add<true>(terms, divergence, {sigmoid(u), sigmoid(w), (softplus(-w) - softplus(-u)) * (1 / LN_2)});
        return F::value(divergence, terms);
    }

    static ATKD_DEVICE double loss(const atkd_divergence &divergence, double c_tkd, double c_dkd, double, double &tkd,
                                   double &dkd) {
        if (divergence.plain != 0) {
            double plain = dkd;
            tkd = dkd = nan("");
            return weighted(c_dkd, plain);
        }
        return weighted(c_tkd, tkd) + weighted(c_dkd, dkd);
    }

    template <bool CE_SUM, class State>
    static ATKD_DEVICE Scales scales(const atkd_divergence &divergence, const State &state, const TermWeights &weights,
                                     const Odds &teacher, const Odds &student, const Odds &student_at_1,
                                     const TargetLogits &, float exponent) {
        bool plain = divergence.plain != 0, exists = plain || (state.teacher_sum != 0 && state.student_sum != 0);
        float of_rest = log_ratio_of(teacher.sigmoid, student.sigmoid);
        float of_target = log_ratio_of(teacher.rest, student.rest);
        float slope =
            plain || weights.tkd == 0
                ? 0
                : student.sigmoid * student.rest *
                      (F::template slope<true>(divergence, of_rest) - F::template slope<true>(divergence, of_target));
        float gamma = weights.tkd * slope;
        float of_teacher = plain ? teacher.sigmoid : 1, of_student = plain ? student.sigmoid : 1;
        Scales scales;
        scales.teacher = exists && student.inverse != 0 ? weights.dkd * student.inverse * of_student : 0;
        scales.student = student.inverse == 0 ? 0 : (gamma + (CE_SUM ? 0 : weights.gamma_ce)) * student.inverse;
        scales.student_at_1 = CE_SUM && student_at_1.inverse != 0 ? weights.gamma_ce * student_at_1.inverse : 0;
        scales.target = -(gamma + weights.gamma_ce);
        scales.teacher_max = state.teacher_max;
        scales.student_max = state.student_max;
        scales.teacher_shift = shift_of(state.teacher_max, exponent);
        scales.student_shift = shift_of(state.student_max, exponent);
        scales.teacher_inverse = exists ? teacher.inverse * of_teacher : 0;
        scales.student_inverse = exists ? student.inverse * of_student : 0;
        scales.log_ratio = log_ratio_of(state, exponent);
        if (plain) {
            float t = teacher.sigmoid, s = student.sigmoid;
            // A model without mass off the target has less there than any other.
            scales.log_ratio = t != 0 && s != 0 ? scales.log_ratio - log2f(quotient(t, s)) : t < s ? -NEG_INF : NEG_INF;
        }
        scales.dkd_weight = weights.dkd;
        scales.target_pair = plain ? Pair<float>{teacher.rest, student.rest, of_target} : Pair<float>{0, 0, 0};
        return scales;
    }

    // Adds a chunk to the terms of the second sweep. The target, and what lies outside the row, are -inf in both.
    template <bool LARGE_ROW, class P, class Q>
    static ATKD_DEVICE void add(Terms<float> &terms, const atkd_divergence &divergence, const Scales &scales,
                                float exponent, const Packed<P> &teacher_chunk, const Packed<Q> &student_chunk) {
        float a[CHUNK], b[CHUNK];
        unpack(teacher_chunk, a);
        unpack(student_chunk, b);
        RowShifts<LARGE_ROW> shifts(scales, exponent);
        auto of_chunk = Terms<float>::empty();
        F::by_form(divergence, [&](auto form) {
            ATKD_UNROLL
            for (uint32_t k = 0; k < CHUNK; k++) {
                float x = shifts.teacher(a[k]), y = shifts.student(b[k]);
                Pair<float> pair = {exp2_fast(x) * scales.teacher_inverse, exp2_fast(y) * scales.student_inverse,
                                    x - y - scales.log_ratio};
                F::template add<decltype(form)::value>(of_chunk, divergence, pair);
            }
        });
        terms.add(of_chunk);
    }

    // Ends the second sweep: completes the scales that lie in `before`, and returns DKD or, plain, the divergence. They are
    // read again behind the mathematics in double precision, which needs the registers.
    template <class Real>
    static ATKD_DEVICE Real finish(const atkd_divergence &divergence, const Scales &before, Terms<Real> terms,
                                   Scales &scales) {
        Pair<float> target = before.target_pair;
        F::template add<true>(terms, divergence, Pair<Real>{target.teacher, target.student, target.log_ratio});
        float mean = opaque(float(F::mean(divergence, terms)));
        Real value = F::value(divergence, terms);
        scales = before;
        target = scales.target_pair;
        bool exists = divergence.plain != 0 || (scales.teacher_inverse != 0 && scales.student_inverse != 0);
        scales.student -= scales.teacher == 0 ? 0 : scales.teacher * mean;
        if (divergence.plain != 0 && scales.dkd_weight != 0) {
            scales.target +=
                scales.dkd_weight * target.student * (F::template slope<true>(divergence, target.log_ratio) - mean);
        }
        return exists ? value : 0;
    }

    template <class G> static ATKD_DEVICE void by_form(const atkd_divergence &divergence, G f) {
        F::by_form(divergence, f);
    }

    template <bool FORM, class Shifts>
    static ATKD_DEVICE float gradient(const atkd_divergence &divergence, const Scales &scales, const Shifts &shifts,
                                      float a, float b) {
        float x = shifts.teacher(a), y = shifts.student(b);
        float slope = F::template slope<FORM>(divergence, x - y - scales.log_ratio);
        return exp2_fast(y) * fmaf(scales.teacher, slope, scales.student);
    }
};
