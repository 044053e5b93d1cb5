// row_states, row_terms, row_gradient, merge_states: the stages of a call of which each rank has a shard of the vocabulary,
// some columns of each row. A cluster takes one token, in merge_states a warp one at a time. The passes over a row are those of
// row_stream, over the shard's columns alone; what one launch of row_stream hands from pass to pass goes through the ranks:
//
//   row_states     | first sweep                         | own state   -> exchanged
//   row_terms      | merge the states  | second sweep    | own terms   -> exchanged; divergences of two sweeps only
//   row_gradient   | merge both        | gradient        |
//   merge_states   | merge both                          | what the loss follows from
//
// Whoever needs a row's state merges those of all ranks by the same arithmetic in the same order, and so has the same bits.
#include "math/divergences.cuh"
#include "row.cuh"

namespace {

// The column of a target that this shard does not have.
constexpr uint32_t NOT_IN_SHARD = 0xffffffffu;

// The label of a token, in the whole vocabulary, or IGNORED_TARGET.
ATKD_DEVICE int32_t whole_label_of(const atkd_shard &p, uint32_t token) {
    atkd_batch whole = p.rows.batch;
    whole.vocab = p.whole_vocab;
    return label_of(whole, token);
}

// The column of a token of the vocabulary. -1, which is none, is in no shard.
ATKD_DEVICE uint32_t column_of(const atkd_shard &p, int32_t target) {
    uint32_t column = uint32_t(target) - p.first_column;
    return column < p.rows.batch.vocab ? column : NOT_IN_SHARD;
}

// The column that the shard leaves out of its state. The teacher's arg max of the shard may be that of the row.
ATKD_DEVICE uint32_t left_out_column(const atkd_shard &p, uint32_t token, int32_t label) {
    const atkd_batch &batch = p.rows.batch;
    if (batch.target == ATKD_TARGET_TEACHER) {
        return batch.vocab == 0 ? NOT_IN_SHARD : uint32_t(load(batch.targets + token));
    }
    return column_of(p, label);
}

template <class P, class Q> ATKD_DEVICE uint32_t chunk_of_column(const Rows<P, Q> &rows, uint32_t column) {
    return column == NOT_IN_SHARD ? NOT_IN_SHARD : rows.teacher.chunk_of(column);
}

// Cross entropy at a temperature other than 1 has a sum of its own.
ATKD_DEVICE bool has_sum_at_1(const atkd_rows &p) {
    return p.objective.ce_weight != 0 && (p.objective.inverse_temperature != 1 || p.batch.temperatures != nullptr);
}

// A state as ranks exchange it.
template <class D, class Real>
ATKD_DEVICE atkd_row_state to_exchange(const RowState<D, Real> &state, const TargetLogits &logits, int32_t target) {
    float cross_term = D::CROSS == NO_CROSS_TERM ? 0 : state.mismatch != 0 ? -NEG_INF : float(state.cross_term);
    return {float(state.teacher_sum),
            float(state.student_sum),
            float(state.student_sum_at_1),
            cross_term,
            state.teacher_max,
            state.student_max,
            state.teacher_reference,
            logits.teacher,
            logits.student,
            target};
}

// The state that was exchanged. Without a sum of its own, the student's sum at temperature 1 is the other one.
template <class D> ATKD_DEVICE RowState<D, double> from_exchange(const atkd_row_state &from, bool sum_at_1) {
    bool mismatch = D::CROSS == BY_TEACHER && from.cross_term == -NEG_INF;
    return {from.teacher_sum,       mismatch ? 0.0 : from.cross_term,
            from.student_sum,       sum_at_1 ? from.student_sum_at_1 : from.student_sum,
            from.teacher_max,       from.student_max,
            from.teacher_reference, mismatch ? 1u : 0u};
}

// A token that shards have left out, and its logits; -1 where there is none.
struct LeftOut {
    TargetLogits logits;
    int32_t token;

    // The row's target: the largest one, NaN being the smallest, and the lowest token among equals.
    ATKD_DEVICE bool comes_before(const LeftOut &other) const {
        float own_logit = fmaxf(logits.teacher, NEG_INF), others = fmaxf(other.logits.teacher, NEG_INF);
        return token >= 0 && (other.token < 0 || own_logit > others || (own_logit == others && token < other.token));
    }
};

// The state of one token of the vocabulary by itself.
template <class D> ATKD_DEVICE RowState<D, double> state_of_token(const TargetLogits &logits, float exponent) {
    auto teacher = all_neg_inf<float>(), student = all_neg_inf<float>();
    set_element<float>(teacher.part[0], 0, logits.teacher);
    set_element<float>(student.part[0], 0, logits.student);
    auto state = RowState<D, float>::empty();
    state.teacher_max = state.teacher_reference = fmaxf(logits.teacher, LOWEST);
    state.student_max = fmaxf(logits.student, LOWEST);
    fold_chunk<true, true>(state, {0, 0, 0}, teacher, student, exponent);
    return from_exchange<D>(to_exchange<D>(state, {0, 0}, IGNORED_TARGET), true);
}

// A row of the whole vocabulary. Where no shard has its target, the target's logits are NaN.
template <class D> struct WholeRow {
    RowState<D, double> state;
    LeftOut target;
};

// Merges the states of all ranks, of which each lane takes some, in every lane of the calling warp.
template <class D> ATKD_DEVICE WholeRow<D> merge_ranks(const atkd_shard &p, uint32_t token) {
    const atkd_batch &batch = p.rows.batch;
    float exponent = inverse_temperature_of(batch, token) * LOG2_E;
    uint32_t lane = thread_index() % WARP;
    auto state_of = [&](uint32_t rank) { return load(p.states + uint64_t(rank) * batch.tokens + token); };
    auto part = RowState<D, double>::empty();
    LeftOut target = {{nanf(""), nanf("")}, IGNORED_TARGET};
    auto add = [&](const RowState<D, double> &other) {
        // Without mass of the student the reference is none; it must not win where that mass is at LOWEST, too.
        part.teacher_reference = part.student_sum == 0 ? other.teacher_reference : part.teacher_reference;
        merge<true>(part, other, exponent);
    };
    auto elect = [&](const LeftOut &other) { target = other.comes_before(target) ? other : target; };
    ATKD_NO_UNROLL
    for (uint32_t rank = lane; rank < p.ranks; rank += WARP) {
        atkd_row_state state = state_of(rank);
        add(from_exchange<D>(state, has_sum_at_1(p.rows)));
        elect({{state.teacher_target, state.student_target}, state.target});
    }
    ATKD_NO_UNROLL
    for (uint32_t mask = WARP / 2; mask > 0; mask /= 2) {
        elect({{shuffle_xor(target.logits.teacher, mask), shuffle_xor(target.logits.student, mask)},
               shuffle_xor(target.token, mask)});
    }
    // The arg maxima of the other shards are not left out of the row.
    if (ATKD_RARELY(batch.target == ATKD_TARGET_TEACHER)) {
        ATKD_NO_UNROLL
        for (uint32_t rank = lane; rank < p.ranks; rank += WARP) {
            atkd_row_state state = state_of(rank);
            if (state.target >= 0 && state.target != target.token) {
                add(state_of_token<D>({state.teacher_target, state.student_target}, exponent));
            }
        }
    }
    share_maxima<true>(part, exponent);
    return {merge_warp<true>(part), target};
}

// The same of the terms of the second sweep.
template <class D> ATKD_DEVICE typename D::template Terms<double> merge_terms(const atkd_shard &p, uint32_t token) {
    auto part = D::template Terms<double>::empty();
    ATKD_NO_UNROLL
    for (uint32_t rank = thread_index() % WARP; rank < p.ranks; rank += WARP) {
        part.add(load(p.terms + uint64_t(rank) * p.rows.batch.tokens + token));
    }
    return merge_warp<false>(part);
}

// By the first warp of each block: the scales of the row, and the target's column in this shard.
template <class D, bool CE_SUM, class Scales, class Columns>
ATKD_DEVICE void find_scales(const atkd_shard &p, const Weights &weights, uint32_t token, uint8_t group, Scales &scales,
                             Columns &target_column) {
    auto row = merge_ranks<D>(p, token);
    auto found = scales_of<D, CE_SUM>(p.rows, weights, token, group, row.state, row.target.logits, false);
    if (thread_index() == 0) {
        scales[0] = found;
        target_column[0] = column_of(p, row.target.token);
    }
    sync_warp();
}

template <class D, bool CE_SUM, class P, class Q> ATKD_DEVICE void row_states(const atkd_shard &p, uint32_t token) {
    using WarpState = RowState<D, float>;
    ATKD_SHARED(WarpState, warps, ATKD_STREAM_THREADS / WARP);
    Rows<P, Q> rows(p.rows, token);
    int32_t label = whole_label_of(p, token);
    if (ATKD_RARELY(label == IGNORED_TARGET)) {
        if (rows.is_leader) {
            store(p.own_states + token, to_exchange<D>(WarpState::empty(), {0, 0}, IGNORED_TARGET));
        }
        return;
    }
    uint32_t column = left_out_column(p, token, label);
    float exponent = inverse_temperature_of(p.rows.batch, token) * LOG2_E;
    auto own = first_sweep<D, CE_SUM>(rows, column, chunk_of_column(rows, column), exponent);
    store_warp_state<CE_SUM>(own, warps);
    ATKD_SYNC_CLUSTER();
    if (thread_index() < WARP && cluster_rank() == 0) {
        // Computed again: kept, it would take a register from the sweep.
        exponent = inverse_temperature_of(p.rows.batch, opaque(token)) * LOG2_E;
        auto state = merge_cluster<D, CE_SUM>(warps, block_threads() / WARP, exponent);
        TargetLogits logits = {0, 0};
        int32_t target = IGNORED_TARGET;
        if (column != NOT_IN_SHARD) {
            logits = target_logits_of<P, Q>(p.rows, token, column);
            target = int32_t(p.first_column + column);
        }
        if (thread_index() == 0) {
            store(p.own_states + token, to_exchange<D>(state, logits, target));
        }
    }
    // No block ends while another may read what it shares.
    ATKD_SYNC_CLUSTER();
}

template <class D, class P, class Q> ATKD_DEVICE void row_states(const atkd_shard &p) {
    if (ATKD_RARELY(has_sum_at_1(p.rows))) {
        row_states<D, true, P, Q>(p, cluster_index());
    } else {
        row_states<D, false, P, Q>(p, cluster_index());
    }
}

template <class D, class P, class Q> ATKD_DEVICE void row_terms(const atkd_shard &p) {
    uint32_t token = cluster_index();
    using RowScales = typename D::Scales;
    ATKD_SHARED(RowScales, scales, 1);
    ATKD_SHARED(uint32_t, target_column, 1);
    ATKD_SECOND_SWEEP_SHARED(D, ATKD_STREAM_THREADS);
    Rows<P, Q> rows(p.rows, token);
    if (ATKD_RARELY(whole_label_of(p, token) == IGNORED_TARGET)) {
        if (rows.is_leader) {
            store(p.own_terms + token, {0, 0, 0});
        }
        return;
    }
    if (thread_index() < WARP) {
        // The terms depend on no weight, and on no group.
        find_scales<D, true>(p, Weights(), token, ATKD_EASY, scales, target_column);
    }
    ATKD_SYNC_BLOCK();
    RowScales row_scales = scales[0];
    uint32_t column = target_column[0];
    float exponent = inverse_temperature_of(p.rows.batch, opaque(token)) * LOG2_E;
    auto own =
        second_sweep<D, true>(p.rows.divergence, rows, column, chunk_of_column(rows, column), row_scales, exponent);
    store_warp_state<false>(own, warp_terms);
    ATKD_SYNC_CLUSTER();
    if (thread_index() < WARP && cluster_rank() == 0) {
        auto terms = merge_cluster<SecondSweep<D>, false>(warp_terms, block_threads() / WARP, 0);
        if (thread_index() == 0) {
            store(p.own_terms + token, {float(terms.teacher), float(terms.student), float(terms.slope)});
        }
    }
    // No block ends while another may read what it shares.
    ATKD_SYNC_CLUSTER();
}

template <class D, bool CE_SUM, class P, class Q> ATKD_DEVICE void row_gradient(const atkd_shard &p, uint32_t token) {
    using RowScales = typename D::Scales;
    ATKD_SHARED(RowScales, scales, 1);
    ATKD_SHARED(uint32_t, target_column, 1);
    Rows<P, Q> rows(p.rows, token);
    uint8_t group = load(p.rows.batch.groups + token);
    if (ATKD_RARELY(group == ATKD_IGNORED)) {
        by_gradient_type<Q>(p.rows, [&](auto g) { drop_row<decltype(g)>(p.rows, rows); });
        return;
    }
    if (thread_index() < WARP) {
        find_scales<D, CE_SUM>(p, Weights::of(p.rows), token, group, scales, target_column);
        if constexpr (D::SWEEPS == 2) {
            // Not read from shared memory within: for sm_100 the compiler would leave a part of them in local memory.
            RowScales found = scales[0];
            D::finish(p.rows.divergence, found, merge_terms<D>(p, token), found);
            sync_warp();
            if (thread_index() == 0) {
                scales[0] = found;
            }
        }
    }
    ATKD_SYNC_BLOCK();
    RowScales row_scales = scales[0];
    uint32_t column = target_column[0];
    float exponent = inverse_temperature_of(p.rows.batch, opaque(token)) * LOG2_E;
    by_gradient_type<Q>(p.rows, [&](auto g) {
        // Common rows have no code of their own, whose few instructions less would not make up for being compiled.
        write_gradient<D, CE_SUM, decltype(g), false>(p.rows, rows, column, chunk_of_column(rows, column), row_scales,
                                                      exponent);
    });
}

template <class D, class P, class Q> ATKD_DEVICE void row_gradient(const atkd_shard &p) {
    if (!D::SPECIALISED || ATKD_RARELY(has_sum_at_1(p.rows))) {
        row_gradient<D, true, P, Q>(p, cluster_index());
    } else if constexpr (D::SPECIALISED) {
        row_gradient<D, false, P, Q>(p, cluster_index());
    }
}

template <class D> ATKD_DEVICE void merge_states(const atkd_shard &p) {
    const atkd_batch &batch = p.rows.batch;
    uint32_t lane = thread_index() % WARP, warps = block_threads() / WARP;
    ATKD_NO_UNROLL
    for (uint32_t token = block_index() * warps + thread_index() / WARP; token < batch.tokens;
         token += p.blocks * warps) {
        if (ATKD_RARELY(whole_label_of(p, token) == IGNORED_TARGET)) {
            if (lane == 0) {
                bool ignored = given_label(batch, token) == batch.ignore_index;
                store(batch.keys + token, 0u);
                if (p.margins != nullptr) {
                    store(p.margins + token, ignored ? NEG_INF : nanf(""));
                }
            }
            continue;
        }
        auto row = merge_ranks<D>(p, token);
        store_margins<D, true>(p.rows, token, row.state, row.target.logits);
        if (lane == TEACHER && p.margins != nullptr) {
            store(p.margins + token, load(p.rows.teacher_margin + token));
        }
        if constexpr (D::SWEEPS == 2) {
            if (p.terms != nullptr) {
                typename D::Scales scales =
                    scales_of<D, true>(p.rows, Weights(), token, ATKD_EASY, row.state, row.target.logits, false);
                store_dkd(p.rows, token, D::finish(p.rows.divergence, scales, merge_terms<D>(p, token), scales));
            }
        }
    }
}

} // namespace

// row_states_<teacher>_<student>, for each kind of cross term.
#define ATKD_ROW_STATES(D, suffix, teacher, P, student, Q)                                                             \
    ATKD_KERNEL(row_states_##teacher##_##student##suffix, atkd_shard, ATKD_STREAM) { row_states<D, P, Q>(p); }
// row_terms_<teacher>_<student><divergence>
#define ATKD_ROW_TERMS(D, suffix, teacher, P, student, Q)                                                              \
    ATKD_KERNEL(row_terms_##teacher##_##student##suffix, atkd_shard, ATKD_STREAM) { row_terms<D, P, Q>(p); }
// row_gradient_<teacher>_<student><divergence>
#define ATKD_ROW_GRADIENT(D, suffix, teacher, P, student, Q)                                                           \
    ATKD_KERNEL(row_gradient_##teacher##_##student##suffix, atkd_shard, ATKD_STREAM) { row_gradient<D, P, Q>(p); }
#define ATKD_ROW_SHARD(...)                                                                                            \
    ATKD_ROW_STATES(ForwardKl, , __VA_ARGS__)                                                                          \
    ATKD_ROW_STATES(ReverseKl, _reverse_kl, __VA_ARGS__)                                                               \
    ATKD_ROW_STATES(Mixture, _two_sweeps, __VA_ARGS__)                                                                 \
    ATKD_ROW_TERMS(Mixture, _mixture, __VA_ARGS__)                                                                     \
    ATKD_ROW_TERMS(TotalVariation, _total_variation, __VA_ARGS__)                                                      \
    ATKD_DIVERGENCES(ATKD_ROW_GRADIENT, __VA_ARGS__)
#define ATKD_ROW_SHARD_OF(teacher, P)                                                                                  \
    ATKD_ROW_SHARD(teacher, P, f32, float)                                                                             \
    ATKD_ROW_SHARD(teacher, P, f16, f16)                                                                               \
    ATKD_ROW_SHARD(teacher, P, bf16, bf16)

ATKD_ROW_SHARD_OF(f32, float)
ATKD_ROW_SHARD_OF(f16, f16)
ATKD_ROW_SHARD_OF(bf16, bf16)

#define ATKD_MERGE_STATES(D, suffix, ...)                                                                              \
    ATKD_KERNEL(merge_states##suffix, atkd_shard, ATKD_MERGE) { merge_states<D>(p); }
ATKD_DIVERGENCES(ATKD_MERGE_STATES)
