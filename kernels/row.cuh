// What the kernels over rows have in common: everything but how often they read a row.
#pragma once

#include "batch.cuh"
#include "reduce.cuh"

// Where a token's row of the student starts.
template <class Q> ATKD_DEVICE const Q *student_row(const atkd_rows &p, uint32_t token) {
    return row_at(static_cast<const Q *>(p.student), p.student_strides, token);
}

// One token's row, as a thread of its cluster or team sees it. Chunks are dealt to the threads of all its
// blocks in turn.
template <class P, class Q> struct Rows {
    uint32_t token, first, stride;
    // One thread of them all.
    bool speaks;
    Row<const P> teacher;
    Row<const Q> student;
    // Chunks that are whole in both, from the teacher's first on.
    uint32_t wholes;

    ATKD_DEVICE Rows(const atkd_rows &p, uint32_t token_)
        : token(token_), first((cluster_rank() + team_rank(p)) * block_threads() + thread_index()),
          stride(cluster_blocks() * team_blocks(p) * block_threads()), speaks(first == 0),
          // Of two types the narrower leads: its chunks are half as long, so that their starts are harder to meet.
          teacher(teacher_row<P>(p.batch, token), p.batch.vocab,
                  sizeof(Q) < sizeof(P) ? lead_of(student_row<Q>(p, token)) : lead_of(teacher_row<P>(p.batch, token))),
          student(student_row<Q>(p, token), p.batch.vocab, teacher.lead),
          wholes(student.wholes == 0 ? 0 : teacher.wholes) {}

    template <class G> ATKD_DEVICE Row<G> gradient(const atkd_rows &p) const {
        return Row<G>(row_at(static_cast<G *>(p.gradient), p.gradient_strides, token), p.batch.vocab, teacher.lead);
    }

    ATKD_DEVICE bool whole(uint32_t chunk) const { return chunk - teacher.first_whole < wholes; }

    template <bool LAST = false>
    ATKD_DEVICE void load(uint32_t chunk, Packed<P> &teacher_chunk, Packed<Q> &student_chunk) const {
        if (ATKD_RARELY(!whole(chunk))) {
            teacher_chunk = load_packed(teacher, chunk);
            student_chunk = load_packed(student, chunk);
        } else {
            teacher_chunk = load_whole<LAST>(teacher, chunk);
            student_chunk = load_whole<LAST>(student, chunk);
        }
    }
};

// All tokens of the call, or those that are to be done again.
ATKD_DEVICE uint32_t tokens_to_do(const atkd_rows &p) {
    return p.wrong == nullptr ? p.batch.tokens : load(&p.batch.summary->counted_wrong);
}
ATKD_DEVICE uint32_t token_to_do(const atkd_rows &p, uint32_t index) {
    return p.wrong == nullptr ? index : load(p.wrong + index);
}

// Calls f(token) for the tokens that are this cluster's, or team's, to do.
template <class F> ATKD_DEVICE void for_tokens(const atkd_rows &p, F f) {
    // How many there are is read for each again, which takes no register over a row.
    ATKD_NO_UNROLL
    for (uint32_t i = cluster_index() / team_blocks(p); i < tokens_to_do(p); i += p.clusters) {
        f(token_to_do(p, i));
    }
    // No block ends while another may read what it shares.
    ATKD_SYNC_CLUSTER();
}

// Calls f(chunk, teacher, student) for the thread's chunks, and before that begin(..) with the first of
// them, or with -inf alone. The next chunk is read before f may write this one: nothing moves a read ahead
// of a write to what could be the same memory, but a thread's chunks are its own. LAST: of reads.
template <bool LAST, class P, class Q, class Begin, class F>
ATKD_DEVICE void for_chunks(const Rows<P, Q> &rows, Begin begin, F f) {
    uint32_t chunks = rows.teacher.chunks(), chunk = rows.first;
    Packed<P> next_teacher = nothing<P>();
    Packed<Q> next_student = nothing<Q>();
    if (chunk < chunks) {
        rows.template load<LAST>(chunk, next_teacher, next_student);
    }
    begin(chunk, next_teacher, next_student);
    for (; chunk < chunks; chunk += rows.stride) {
        Packed<P> teacher = next_teacher;
        Packed<Q> student = next_student;
        if (chunk + rows.stride < chunks) {
            rows.template load<LAST>(chunk + rows.stride, next_teacher, next_student);
        }
        f(chunk, teacher, student);
    }
}

// An ignored token has no loss, and a gradient of zeros.
template <class G, class P, class Q> ATKD_DEVICE void drop_row(const atkd_rows &p, const Rows<P, Q> &rows) {
    float zeros[CHUNK] = {};
    for (uint32_t chunk = rows.first; p.gradient != nullptr && chunk < rows.teacher.chunks(); chunk += rows.stride) {
        store_chunk(rows.template gradient<G>(p), chunk, zeros);
    }
    if (rows.speaks && p.write_keys != 0) {
        store(p.batch.keys + rows.token, 0u);
    }
}

// What a row's threads share, in shared memory.
#define ATKD_ROW_SHARED(threads)                                                                              \
    ATKD_SHARED(RowState<float>, warps, (threads) / WARP);                                                    \
    ATKD_SHARED(GradientScales, scales, 1)

// The target's logit in either model; to be read before a gradient in place overwrites it.
struct TargetLogits {
    float teacher, student;
};
template <class P, class Q>
ATKD_DEVICE TargetLogits target_logits_of(const atkd_rows &p, uint32_t token, uint32_t target) {
    TargetLogits own = {0, 0};
    if (thread_index() % WARP == 0) {
        own = {widen(load(teacher_row<P>(p.batch, token) + target)), widen(load(student_row<Q>(p, token) + target))};
    }
    return {shuffle_from(own.teacher, 0), shuffle_from(own.student, 0)};
}

// A coefficient is constant + times_uncertainty * UNC.
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

// What the gradients of all rows have in common: the weights of the terms, times the gradient's scale; of easy tokens
// and of hard ones.
struct alignas(16) Weights {
    Weight easy_tkd, hard_tkd, easy_dkd, hard_dkd;
    float ce;    // NaN if the scale is not finite: then so is the whole gradient
    float guess; // the odds from which on a token is taken to be hard

    static ATKD_DEVICE Weights of(const atkd_rows &p) {
        const atkd_objective &objective = p.objective;
        double scale = p.scale * (p.mean != 0 ? 1.0 / load(&p.batch.summary->counted_valid) : 1.0) *
                       (p.upstream == nullptr ? 1.0 : load(p.upstream));
        double at_t = scale * objective.inverse_temperature;
        float guess = p.guess == 0 ? 0 : exp2_fast(margin_of_key(load(&p.batch.summary->guess)) * LOG2_E);
        return {Weight::of(objective.tkd[0], at_t),
                Weight::of(objective.tkd[1], at_t),
                Weight::of(objective.dkd[0], at_t),
                Weight::of(objective.dkd[1], at_t),
                float((objective.ce_weight == 0 ? 0 : objective.ce_weight * scale) + (scale - scale)),
                guess};
    }
};

// Of a model: the inverse of its sum, the odds against the target, e^margin, and what follows from them.
struct Odds {
    float inverse, odds, sigmoid, rest; // rest: 1 - sigmoid

    static ATKD_DEVICE Odds of(float sum, float max, float target_logit, float exponent) {
        // A sum of 0 belongs to exponentials that are all 0, and so is their share of the gradient.
        bool nothing = sum == 0 && target_logit > OUTSIDE;
        float to_target = -Base::of(max, exponent).exponent_of(target_logit, exponent);
        float odds = nothing ? 0 : (sum + correction_of(max, exponent)) * exp2_fast(to_target);
        odds = target_logit == -OUTSIDE ? nanf("") : odds;
        // 0 from odds of 2^126 on.
        float rest = reciprocal_fast(1 + odds);
        // Not corrected: the gradient's exponential of the maximum has the error that its part of the sum has, and
        // near 1 their ratio must be right to the last bit. So one step of Newton's.
        float inverse = reciprocal_fast(sum);
        inverse = fmaf(inverse, fmaf(-sum, inverse, 1.0f), inverse);
        return {sum == 0 ? 0 : inverse, odds, rest == 0 ? 1 : odds * rest, rest};
    }
};

// What the row's gradient needs, from the state of the row, which every lane has. All warps of the row wait for it: so
// it is in single precision, and in odds, which need no logarithm. AT_1: cross entropy has a sum of its own.
template <bool AT_1, class Real>
ATKD_DEVICE GradientScales scales_of(const atkd_rows &p, const Weights &weights, uint32_t token, uint8_t mode,
                                     const RowState<Real> &state, const TargetLogits &target, bool tells) {
    float exponent = p.batch.inverse_temperature * LOG2_E;
    auto teacher = Odds::of(float(state.teacher_sum), state.teacher_max, target.teacher, exponent);
    auto student = Odds::of(float(state.student_sum), state.student_max, target.student, exponent);
    auto student_at_1 =
        AT_1 ? Odds::of(float(state.student_sum_at_1), state.student_max, target.student, LOG2_E) : student;
    // On the side where the teacher's sigmoid is small; swapping "the target" for "not the target" flips
    // the sign.
    float slope = teacher.odds > 1 ? teacher.rest - student.rest : student.sigmoid - teacher.sigmoid;
    // By the token's mode or, before the selection, by a guess of its outcome. Rounding may decide here otherwise than
    // in the margin that the selection goes by; then the guess was wrong.
    bool hard = p.guess != 0 ? teacher.odds >= weights.guess : mode == ATKD_HARD;
    // Where the teacher has no mass off the target, DKD is 0 whatever the student does.
    float beta = state.teacher_sum == 0 ? 0 : (hard ? weights.hard_dkd : weights.easy_dkd).at(teacher.sigmoid);
    float gamma = (hard ? weights.hard_tkd : weights.easy_tkd).at(teacher.sigmoid) * slope;
    float gamma_at_1 = weights.ce == 0 ? 0 : weights.ce * student_at_1.sigmoid;
    if (p.guess != 0 && tells && thread_index() % WARP == 0) {
        store(p.batch.modes + token, static_cast<uint8_t>(hard ? ATKD_HARD : ATKD_EASY));
    }
    GradientScales scales = {
        // Not 0 times an infinite upstream gradient.
        teacher.inverse == 0 ? 0 : beta * teacher.inverse,
        student.inverse == 0 ? 0 : (beta + gamma + (AT_1 ? 0 : gamma_at_1)) * student.inverse,
        AT_1 && student_at_1.inverse != 0 ? gamma_at_1 * student_at_1.inverse : 0,
        -(gamma + gamma_at_1),
        state.teacher_max,
        state.student_max,
        reference_of(state.teacher_max, exponent),
        reference_of(state.student_max, exponent),
    };
    if (has_nan(state) || teacher.odds != teacher.odds || student.odds != student.odds || weights.ce != weights.ce) {
        scales.teacher = scales.student = scales.student_at_1 = scales.target = nanf("");
        scales.teacher_max = scales.student_max = scales.teacher_reference = scales.student_reference = 0;
    }
    return scales;
}

// The lanes that tell: what is done to the sums of teacher and student is the same, and done at once.
constexpr uint32_t TEACHER = 0, STUDENT = 1, STUDENT_AT_1 = 2;

// Margins and DKD, for the selection and for token_terms, where a lane has a token of its own. By one warp.
template <bool AT_1>
ATKD_DEVICE void tell(const atkd_rows &p, uint32_t token, const RowState<double> &state, const TargetLogits &target) {
    uint32_t lane = thread_index() % WARP;
    float exponent = p.batch.inverse_temperature * LOG2_E;
    double sum = lane == TEACHER ? state.teacher_sum : state.student_sum;
    float max = lane == TEACHER ? state.teacher_max : state.student_max;
    if (AT_1 && lane == STUDENT_AT_1) {
        sum = state.student_sum_at_1;
        exponent = LOG2_E;
    }
    sum += correction_of(max, exponent);
    double log_sum = log(sum);
    float target_logit = lane == TEACHER ? target.teacher : target.student;
    double margin = log_sum + to_margin(max, target_logit, exponent);
    double dkd = state.weighted_gap / sum * (LN_2 * double(GAP_UNIT)) - log_sum + shuffle_from(log_sum, STUDENT);
    bool not_a_number = has_nan(state) || warp_ballot(lane <= STUDENT && margin != margin) != 0;
    // It may be below 0 by rounding: no less than above it, so that a mean of many is right.
    dkd = not_a_number             ? nan("")
          : state.teacher_sum == 0 ? 0
          : state.ruled_out != 0   ? -double(OUTSIDE)
                                   : dkd;
    if (lane == TEACHER) {
        store(p.teacher_margin + token, float(margin));
        store(p.dkd + token, float(dkd * (1 / double(GAP_UNIT))));
        if (p.write_keys != 0) {
            store(p.batch.keys + token, key_of(float(margin)));
        }
    }
    if (lane == STUDENT) {
        store(p.student_margin + token, float(margin * (1 / double(GAP_UNIT))));
    }
    if (p.objective.ce_weight != 0 && lane == (AT_1 ? STUDENT_AT_1 : STUDENT)) {
        store(p.student_margin_at_1 + token, margin);
    }
}

// From every thread's part of the row, relative to its warp's maxima, to what its gradient needs.
template <bool AT_1 = false, class P, class Q, class Warps, class Scales>
ATKD_DEVICE GradientScales settle_row(const atkd_rows &p, const Rows<P, Q> &rows, uint8_t mode, uint32_t target,
                                      const RowState<float> &own, Warps &warps, Scales &scales) {
    // One warp of the cluster; of a team, one of each block.
    bool settles = thread_index() < WARP && cluster_rank() == 0, tells = rows.first < WARP;
    TargetLogits target_logits = {0, 0};
    Weights weights = {};
    post_state<AT_1>(own, warps);
    if (settles) {
        // region: one warp per row
        target_logits = target_logits_of<P, Q>(p, rows.token, target);
        weights = Weights::of(p);
        // end region
    }
    ATKD_SYNC_CLUSTER();
    if (settles) {
        // region: one warp per row
        float exponent = p.batch.inverse_temperature * LOG2_E;
        RowState<double> state = merge_cluster<AT_1>(warps, block_threads() / WARP, exponent);
        if (team_blocks(p) > 1) {
            state = merge_team<AT_1>(state, p, exponent);
        }
        GradientScales settled = scales_of<AT_1>(p, weights, rows.token, mode, state, target_logits, tells);
        if (thread_index() == 0) {
            scales[0] = settled;
        }
        // Later, the row's state would take registers from the passes.
        if (tells) {
            tell<AT_1>(p, rows.token, state, target_logits);
        }
        // end region
    }
    ATKD_SYNC_CLUSTER();
    if (cluster_rank() == 0) {
        return scales[0];
    }
    // By one thread, which uses them at once: no block ends while another's read is on its way.
    if (thread_index() == 0) {
        // region: one warp per block
        scales[0] = ATKD_REMOTE(scales, 0, 0);
        // end region
    }
    ATKD_SYNC_BLOCK();
    return scales[0];
}

// A flag that is known when compiling.
template <bool B> struct Flag {
    static constexpr bool value = B;
};

// The gradient of a chunk, but for the target. LARGE_ROW: of a row with a LARGE reference.
template <bool AT_1, bool LARGE_ROW, class P, class Q>
ATKD_DEVICE void gradient_of(const GradientScales &scales, float exponent, const Packed<P> &teacher_chunk,
                             const Packed<Q> &student_chunk, float (&g)[CHUNK]) {
    float a[CHUNK], b[CHUNK];
    unpack(teacher_chunk, a);
    unpack(student_chunk, b);
    auto base_of = [](float max, float reference, float exponent) {
        return LARGE_ROW ? Base::of(max, exponent) : Base{0, reference};
    };
    Base teacher_base = base_of(scales.teacher_max, scales.teacher_reference, exponent);
    Base student_base = base_of(scales.student_max, scales.student_reference, exponent);
    Base base_at_1 = base_of(scales.student_max, scales.reference_at_1(), LOG2_E);
    auto exponential = [](const Base &base, float z, float exponent) {
        return exp2_fast(LARGE_ROW ? base.exponent_of(z, exponent) : fmaf(z, exponent, -base.reference));
    };
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        float teacher = exponential(teacher_base, a[k], exponent), student = exponential(student_base, b[k], exponent);
        g[k] = fmaf(scales.student, student, -(scales.teacher * teacher));
        if (AT_1) {
            g[k] += scales.student_at_1 * exponential(base_at_1, b[k], LOG2_E);
        }
    }
}

ATKD_DEVICE void put_target(uint32_t within, float value, float (&g)[CHUNK]) {
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        g[k] = within == k ? value : g[k];
    }
}
