// Iteration over tokens and over the chunks of their rows, for the kernels over rows. D is a divergence
// (math/forward_kl.cuh).
#pragma once

#include "batch.cuh"
#include "row_state.cuh"

// The start of a token's row of the student.
template <class Q> ATKD_DEVICE const Q *student_row(const atkd_rows &p, uint32_t token) {
    return row_at(static_cast<const Q *>(p.student), p.student_strides, token);
}

// One token's row, as a thread of its cluster or team sees it. Chunks are dealt to the threads of all its
// blocks in turn.
template <class P, class Q> struct Rows {
    uint32_t token, first, stride;
    // True in exactly one thread per row.
    bool is_leader;
    Row<const P> teacher;
    Row<const Q> student;
    // The chunks that are full in both rows, from the teacher's first on.
    uint32_t full_count;

    ATKD_DEVICE Rows(const atkd_rows &p, uint32_t token_)
        : token(token_), first((cluster_rank() + team_rank(p)) * block_threads() + thread_index()),
          stride(cluster_blocks() * team_blocks(p) * block_threads()), is_leader(first == 0),
          // The narrower of two types gives the head: its chunks are half as long, so that their starts are harder to
          // meet.
          teacher(teacher_row<P>(p.batch, token), p.batch.vocab,
                  sizeof(Q) < sizeof(P) ? head_of(student_row<Q>(p, token)) : head_of(teacher_row<P>(p.batch, token))),
          student(student_row<Q>(p, token), p.batch.vocab, teacher.head),
          full_count(student.full_count == 0 ? 0 : teacher.full_count) {}

    template <class G> ATKD_DEVICE Row<G> gradient(const atkd_rows &p) const {
        return Row<G>(row_at(static_cast<G *>(p.gradient), p.gradient_strides, token), p.batch.vocab, teacher.head);
    }

    ATKD_DEVICE bool full(uint32_t chunk) const { return chunk - teacher.first_full < full_count; }

    template <bool STREAMING = false>
    ATKD_DEVICE void load(uint32_t chunk, Packed<P> &teacher_chunk, Packed<Q> &student_chunk) const {
        if (ATKD_RARELY(!full(chunk))) {
            teacher_chunk = load_packed(teacher, chunk);
            student_chunk = load_packed(student, chunk);
        } else {
            teacher_chunk = load_full<STREAMING>(teacher, chunk);
            student_chunk = load_full<STREAMING>(student, chunk);
        }
    }
};

// The tokens of the call, or those of the repair pass.
ATKD_DEVICE uint32_t tokens_to_do(const atkd_rows &p) {
    return p.mispredicted == nullptr ? p.batch.tokens : load(&p.batch.summary->counted_mispredicted);
}
ATKD_DEVICE uint32_t token_to_do(const atkd_rows &p, uint32_t index) {
    return p.mispredicted == nullptr ? index : load(p.mispredicted + index);
}

// Calls f(token) for the tokens that are this cluster's, or team's, to do.
template <class F> ATKD_DEVICE void for_tokens(const atkd_rows &p, F f) {
    // The count is loaded again for each token, which takes no register over a row.
    ATKD_NO_UNROLL
    for (uint32_t i = cluster_index() / team_blocks(p); i < tokens_to_do(p); i += p.clusters) {
        f(token_to_do(p, i));
    }
    // No block ends while another may read what it shares.
    ATKD_SYNC_CLUSTER();
}

// Calls f(chunk, teacher, student) for the thread's chunks, and before that begin(..) with the first of them, or with
// -inf alone. The next chunk is read before f may write this one: the compiler moves no read ahead of a write to what
// could be the same memory, but a thread's chunks are its own. STREAMING: the row is read for the last time. Without
// PREFETCHES f needs the registers, and the next chunk is read after it.
template <bool STREAMING, bool PREFETCHES, class P, class Q, class Begin, class F>
ATKD_DEVICE void for_chunks(const Rows<P, Q> &rows, Begin begin, F f) {
    uint32_t chunks = rows.teacher.chunks(), chunk = rows.first;
    Packed<P> next_teacher = all_neg_inf<P>();
    Packed<Q> next_student = all_neg_inf<Q>();
    if (chunk < chunks) {
        rows.template load<STREAMING>(chunk, next_teacher, next_student);
    }
    begin(chunk, next_teacher, next_student);
    for (; chunk < chunks; chunk += rows.stride) {
        Packed<P> teacher = next_teacher;
        Packed<Q> student = next_student;
        if (PREFETCHES && chunk + rows.stride < chunks) {
            rows.template load<STREAMING>(chunk + rows.stride, next_teacher, next_student);
        }
        f(chunk, teacher, student);
        if (!PREFETCHES && chunk + rows.stride < chunks) {
            rows.template load<STREAMING>(chunk + rows.stride, next_teacher, next_student);
        }
    }
}

// An ignored token has no loss, and a gradient of zeros.
template <class G, class P, class Q> ATKD_DEVICE void drop_row(const atkd_rows &p, const Rows<P, Q> &rows) {
    float zeros[CHUNK] = {};
    for (uint32_t chunk = rows.first; p.gradient != nullptr && chunk < rows.teacher.chunks(); chunk += rows.stride) {
        store_chunk(rows.template gradient<G>(p), chunk, zeros);
    }
    if (rows.is_leader && p.write_keys != 0) {
        store(p.batch.keys + rows.token, 0u);
    }
}

// The shared memory of a row's block.
#define ATKD_ROW_SHARED(D, threads)                                                                                    \
    using WarpState = RowState<D, float>;                                                                              \
    using RowScales = typename D::Scales;                                                                              \
    ATKD_SHARED(WarpState, warps, (threads) / WARP);                                                                   \
    ATKD_SHARED(RowScales, scales, 1)

// The same for the second sweep of a divergence that has one.
#define ATKD_SECOND_SWEEP_SHARED(D, threads)                                                                           \
    using WarpTerms = typename D::template Terms<float>;                                                               \
    ATKD_SHARED(WarpTerms, warp_terms, (threads) / WARP)

// The target's logits, in every lane of the calling warp.
template <class P, class Q>
ATKD_DEVICE TargetLogits target_logits_of(const atkd_rows &p, uint32_t token, uint32_t target) {
    TargetLogits own = {0, 0};
    if (thread_index() % WARP == 0) {
        own = {widen(load(teacher_row<P>(p.batch, token) + target)), widen(load(student_row<Q>(p, token) + target))};
    }
    return {shuffle_from(own.teacher, 0), shuffle_from(own.student, 0)};
}

// Adds a chunk, and raises the shifts where the chunk exceeds them by much.
template <class D, bool CE_SUM, class P, class Q>
ATKD_DEVICE void accumulate(RowState<D, float> &state, Shifts &shifts, const Packed<P> &teacher,
                            const Packed<Q> &student, float exponent) {
    RowState<D, float> before = state;
    fold_chunk<CE_SUM, false>(state, shifts, teacher, student, exponent);
    bool fits = state.finite() && state.teacher_sum - before.teacher_sum < HEADROOM &&
                state.student_sum - before.student_sum < HEADROOM &&
                (!CE_SUM || state.student_sum_at_1 - before.student_sum_at_1 < HEADROOM);
    if (ATKD_RARELY(!fits)) {
        state = before;
        Maxima<D::CROSS, P, Q> maxima;
        maxima.add(teacher, student);
        bool is_larger = maxima.student_max() > state.student_max;
        state.template rescale<CE_SUM>(fmaxf(state.teacher_max, maxima.teacher.value()),
                                       fmaxf(state.student_max, maxima.student_max()),
                                       is_larger ? maxima.teacher_reference() : state.teacher_reference, exponent);
        shifts = state.shifts(exponent);
        fold_chunk<CE_SUM, true>(state, shifts, teacher, student, exponent);
    }
}

// Makes the target -inf in the chunk that has it.
template <class P, class Q>
ATKD_DEVICE void leave_out(const Rows<P, Q> &rows, uint32_t target, uint32_t target_chunk, uint32_t chunk,
                           Packed<P> &teacher, Packed<Q> &student) {
    if (ATKD_RARELY(chunk == target_chunk)) {
        mask_out(rows.teacher.within(target, chunk), teacher);
        mask_out(rows.teacher.within(target, chunk), student);
    }
}

// The registers have room for a chunk ahead, but not for two of single precision beside the heavier divergences.
template <class D, class P, class Q> constexpr bool READS_AHEAD = D::SPECIALISED || sizeof(P) + sizeof(Q) < 8;

// The first sweep over a row, without the target, which is in target_chunk: the state of the thread's part, relative to its
// warp's maxima.
template <class D, bool CE_SUM, class P, class Q>
ATKD_DEVICE RowState<D, float> first_sweep(const Rows<P, Q> &rows, uint32_t target, uint32_t target_chunk,
                                           float exponent) {
    RowState<D, float> own;
    Shifts shifts;
    for_chunks<false, READS_AHEAD<D, P, Q>>(
        rows,
        // The first chunk's maxima are a good estimate of the row's, so that few chunks exceed them.
        [&](uint32_t chunk, Packed<P> teacher, Packed<Q> student) {
            leave_out(rows, target, target_chunk, chunk, teacher, student);
            Maxima<D::CROSS, P, Q> maxima;
            maxima.add(teacher, student);
            own = maxima.template state<RowState<D, float>>();
            shifts = own.shifts(exponent);
        },
        [&](uint32_t chunk, Packed<P> &teacher, Packed<Q> &student) {
            leave_out(rows, target, target_chunk, chunk, teacher, student);
            accumulate<D, CE_SUM>(own, shifts, teacher, student, exponent);
        });
    share_maxima<CE_SUM>(own, exponent);
    return own;
}

// The scales that the cluster's first block has found, in all threads of the cluster.
template <class Scales> ATKD_DEVICE auto scales_for_all(Scales &scales) {
    ATKD_SYNC_CLUSTER();
    if (cluster_rank() == 0) {
        return scales[0];
    }
    // One thread reads, and uses the values at once: no block ends while another's read is on its way.
    if (thread_index() == 0) {
        // region: one warp per block
        scales[0] = ATKD_REMOTE(scales, 0, 0);
        // end region
    }
    ATKD_SYNC_BLOCK();
    return scales[0];
}

// Reduces every thread's part of the row, relative to its warp's maxima, to the row's state, and stores what the loss
// follows from. Returns the scales of the row's gradient.
template <class D, bool CE_SUM = false, class P, class Q, class Warps, class Scales>
ATKD_DEVICE typename D::Scales reduce_row(const atkd_rows &p, const Rows<P, Q> &rows, uint8_t group, uint32_t target,
                                          const RowState<D, float> &own, Warps &warps, Scales &scales) {
    // One warp of the cluster reduces the row; in a team, one of each block does, and the first block's stores.
    bool reduces = thread_index() < WARP && cluster_rank() == 0, stores = rows.first < WARP;
    TargetLogits target_logits = {0, 0};
    Weights weights = {};
    store_warp_state<CE_SUM>(own, warps);
    if (reduces) {
        // region: one warp per row
        target_logits = target_logits_of<P, Q>(p, rows.token, target);
        weights = Weights::of(p);
        // end region
    }
    ATKD_SYNC_CLUSTER();
    if (reduces) {
        // region: one warp per row
        float exponent = inverse_temperature_of(p.batch, rows.token) * LOG2_E;
        auto state = merge_cluster<D, CE_SUM>(warps, block_threads() / WARP, exponent);
        if (team_blocks(p) > 1) {
            state = merge_team<D, CE_SUM>(state, p, exponent);
        }
        auto found = scales_of<D, CE_SUM>(p, weights, rows.token, group, state, target_logits, stores);
        if (thread_index() == 0) {
            scales[0] = found;
        }
        // Stored now: later, the row's state would take registers from the passes.
        if (stores) {
            store_margins<D, CE_SUM>(p, rows.token, state, target_logits);
        }
        // end region
    }
    return scales_for_all(scales);
}

// The same for the terms of the second sweep: completes the row's scales.
template <class D, class P, class Q, class WarpTerms, class Scales>
ATKD_DEVICE typename D::Scales reduce_terms(const atkd_rows &p, const Rows<P, Q> &rows,
                                            const typename D::template Terms<float> &own, WarpTerms &warp_terms,
                                            Scales &scales) {
    store_warp_state<false>(own, warp_terms);
    ATKD_SYNC_CLUSTER();
    if (thread_index() < WARP && cluster_rank() == 0) {
        using Sweep = SecondSweep<D>;
        auto terms = merge_cluster<Sweep, false>(warp_terms, block_threads() / WARP, 0);
        if (team_blocks(p) > 1) {
            terms = merge_team<Sweep, false>(terms, p, 0);
        }
        typename D::Scales found;
        double dkd = D::finish(p.divergence, scales[0], terms, found);
        sync_warp();
        if (thread_index() == 0) {
            scales[0] = found;
        }
        if (rows.first < WARP) {
            store_dkd(p, rows.token, dkd);
        }
    }
    return scales_for_all(scales);
}

// Calls f with whether a shift of the row is LARGE, as a flag that the compiler knows: common rows have code of their own.
// Code that is not SPECIALISED is that for LARGE shifts alone, which is right for any.
template <class D, bool CE_SUM, bool SPECIALISED = D::SPECIALISED, class F>
ATKD_DEVICE void by_size(const typename D::Scales &scales, F f) {
    if constexpr (!SPECIALISED) {
        f(Flag<true>());
    } else if (ATKD_RARELY(scales.template large<CE_SUM>())) {
        f(Flag<true>());
    } else {
        f(Flag<false>());
    }
}

// The second sweep over a row, likewise: the terms of the thread's part.
template <class D, bool CE_SUM, class P, class Q>
ATKD_DEVICE typename D::template Terms<float> second_sweep(const atkd_divergence &divergence, const Rows<P, Q> &rows,
                                                           uint32_t target, uint32_t target_chunk,
                                                           const typename D::Scales &scales, float exponent) {
    auto terms = D::template Terms<float>::empty();
    by_size<D, CE_SUM>(scales, [&](auto large) {
        for_chunks<false, READS_AHEAD<D, P, Q>>(
            rows, [](uint32_t, const Packed<P> &, const Packed<Q> &) {},
            [&](uint32_t chunk, Packed<P> &teacher, Packed<Q> &student) {
                leave_out(rows, target, target_chunk, chunk, teacher, student);
                D::template add<decltype(large)::value>(terms, divergence, scales, exponent, teacher, student);
            });
    });
    return terms;
}

// Writes the gradient of a row, whose target has its own. SPECIALISED as by_size has it.
template <class D, bool CE_SUM, class G, bool SPECIALISED = D::SPECIALISED, class P, class Q>
ATKD_DEVICE void write_gradient(const atkd_rows &p, const Rows<P, Q> &rows, uint32_t target, uint32_t target_chunk,
                                const typename D::Scales &scales, float exponent) {
    Row<G> gradient = rows.template gradient<G>(p);
    bool has_target = false;
    by_size<D, CE_SUM, SPECIALISED>(scales, [&](auto large) {
        for_chunks<true, D::SPECIALISED>(
            rows, [](uint32_t, const Packed<P> &, const Packed<Q> &) {},
            [&](uint32_t chunk, const Packed<P> &teacher, const Packed<Q> &student) {
                float g[CHUNK];
                gradient_chunk<D, CE_SUM, decltype(large)::value>(p.divergence, scales, exponent, teacher, student, g);
                store_chunk(gradient, chunk, g);
                has_target |= chunk == target_chunk;
            });
    });
    if (ATKD_RARELY(has_target)) {
        store(gradient.data + target, narrow<G>(scales.target));
    }
}

ATKD_DEVICE void insert_target(uint32_t within, float value, float (&g)[CHUNK]) {
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        g[k] = within == k ? value : g[k];
    }
}

ATKD_DEVICE constexpr uint32_t gradient_type_of(float) { return ATKD_GRADIENT_F32; }
ATKD_DEVICE constexpr uint32_t gradient_type_of(f16) { return ATKD_GRADIENT_F16; }
ATKD_DEVICE constexpr uint32_t gradient_type_of(bf16) { return ATKD_GRADIENT_BF16; }

// Calls f with a value of the gradient's type: that of the student's logits, Q, or float32 beside half precision, or half
// precision beside float32.
template <class Q, class F> ATKD_DEVICE void by_gradient_type(const atkd_rows &p, F f) {
    if (ATKD_RARELY(p.gradient_type != gradient_type_of(Q()))) {
        if constexpr (sizeof(Q) < sizeof(float)) {
            f(float());
        } else if (p.gradient_type == ATKD_GRADIENT_F16) {
            f(f16());
        } else {
            f(bf16());
        }
        return;
    }
    f(Q());
}
