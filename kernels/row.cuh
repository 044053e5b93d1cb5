// What the kernels over rows have in common: everything but how often they read a row.
#pragma once

#include "batch.cuh"
#include "reduce.cuh"

// One token's row, as a thread of its cluster or team sees it. Chunks are dealt to the threads of all its
// blocks in turn.
template <class P, class Q> struct Rows {
    uint32_t token, first, stride;
    // One thread of them all writes the token's terms.
    bool speaks;
    Row<const P> teacher;
    Row<const Q> student;
    // Chunks that are whole in both, from the teacher's first on.
    uint32_t wholes;

    ATKD_DEVICE Rows(const atkd_rows &p, uint32_t token_)
        : token(token_), first((cluster_rank() + team_rank(p)) * block_threads() + thread_index()),
          stride(cluster_blocks() * team_blocks(p) * block_threads()), speaks(first == 0),
          teacher(teacher_row(p), p.batch.vocab, lead_of(teacher_row(p))),
          student(static_cast<const Q *>(p.student) + int64_t(token) * p.student_stride, p.batch.vocab, teacher.lead),
          wholes(student.wholes == 0 ? 0 : teacher.wholes) {}

    ATKD_DEVICE const P *teacher_row(const atkd_rows &p) const {
        return static_cast<const P *>(p.batch.teacher) + int64_t(token) * p.batch.teacher_stride;
    }

    template <class G> ATKD_DEVICE Row<G> gradient(const atkd_rows &p) const {
        return Row<G>(static_cast<G *>(p.gradient) + int64_t(token) * p.gradient_stride, p.batch.vocab, teacher.lead);
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

    ATKD_DEVICE uint32_t chunk_of(uint32_t target) const { return (target + teacher.lead) / CHUNK; }

    // Where the target lies in a chunk; CHUNK or more if it is in another.
    ATKD_DEVICE uint32_t within(uint32_t target, uint32_t chunk) const {
        return target - (chunk * CHUNK - teacher.lead);
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
    uint32_t count = tokens_to_do(p);
    ATKD_NO_UNROLL
    for (uint32_t i = cluster_index() / team_blocks(p); i < count; i += p.clusters) {
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
    if (rows.speaks) {
        store(p.uncertainty + rows.token, 0.0f);
        store(p.tkd + rows.token, 0.0f);
        store(p.dkd + rows.token, 0.0f);
        store(p.loss + rows.token, 0.0);
        if (p.write_keys != 0) {
            store(p.batch.keys + rows.token, 0u);
        }
    }
}

// Whether a token is hard: by its mode or, before the selection, by a guess of its outcome.
ATKD_DEVICE bool is_hard(const atkd_rows &p, uint8_t mode, const Margins &margins) {
    return p.guess != 0 ? key_of(float(margins.teacher)) >= load(&p.batch.summary->guess) : mode == ATKD_HARD;
}

// What a row's threads share, in shared memory.
#define ATKD_ROW_SHARED(threads)                                                                              \
    ATKD_SHARED(RowState<float>, warps, (threads) / WARP);                                                    \
    ATKD_SHARED(RowState<double>, whole, 1);                                                                  \
    ATKD_SHARED(GradientScales, scales, 1);                                                                   \
    ATKD_SHARED(float, target_logits, 2)

// By one thread, before a gradient in place overwrites them.
template <class P, class Q, class Floats>
ATKD_DEVICE void read_target(const Rows<P, Q> &rows, uint32_t target, Floats &target_logits) {
    target_logits[0] = widen(load(rows.teacher.data + target));
    target_logits[1] = widen(load(rows.student.data + target));
}

// The state of the whole row and what its gradient needs, both in shared memory, from the states of all warps
// of the cluster or team; by one warp, of the cluster or of each block of the team.
template <class Warps, class Whole, class Scales, class Floats>
ATKD_DEVICE void merge_row(const atkd_rows &p, uint8_t mode, const Warps &warps, uint32_t warps_a_block, Whole &whole,
                           Scales &scales, const Floats &target_logits) {
    float exponent = p.batch.inverse_temperature * LOG2_E;
    RowState<double> state = merge_cluster(warps, warps_a_block, exponent);
    if (team_blocks(p) > 1) {
        state = merge_team(state, p, exponent);
    }
    if (thread_index() % WARP == 0) {
        double scale = p.mean != 0 ? p.scale / double(load(&p.batch.summary->counted_valid)) : p.scale;
        scale *= p.upstream == nullptr ? 1.0 : double(load(p.upstream));
        Margins margins = margins_of(p.objective, state, exponent, target_logits[0], target_logits[1]);
        scales[0] = scales_of(p.objective, state, margins, is_hard(p, mode, margins), scale);
        whole[0] = state;
    }
}

// The terms of the token; by one thread.
template <class Whole, class Floats>
ATKD_DEVICE void tell_terms(const atkd_rows &p, uint32_t token, uint8_t mode, const Whole &whole,
                            const Floats &target_logits) {
    // The margins are computed again: kept, they would take registers from every thread.
    RowState<double> state = whole[0];
    Margins margins = margins_of(p.objective, state, p.batch.inverse_temperature * LOG2_E, target_logits[0],
                                 target_logits[1]);
    bool hard = is_hard(p, mode, margins);
    Terms terms = terms_of(p.objective, state, margins, hard);
    store(p.uncertainty + token, float(terms.uncertainty));
    store(p.tkd + token, float(terms.tkd));
    store(p.dkd + token, float(terms.dkd));
    store(p.loss + token, terms.loss);
    if (p.write_keys != 0) {
        store(p.batch.keys + token, key_of(float(margins.teacher)));
    }
    if (p.guess != 0) {
        store(p.batch.modes + token, static_cast<uint8_t>(hard ? ATKD_HARD : ATKD_EASY));
    }
}

// From every thread's part of the row, relative to its warp's references, to what its gradient needs, and the
// token's terms.
template <bool AT_1 = false, class P, class Q, class Warps, class Whole, class Scales, class Floats>
ATKD_DEVICE GradientScales settle_row(const atkd_rows &p, const Rows<P, Q> &rows, uint8_t mode,
                                      const RowState<float> &own, Warps &warps, Whole &whole, Scales &scales,
                                      const Floats &target_logits) {
    post_state<AT_1>(own, warps);
    ATKD_SYNC_CLUSTER();
    if (rows.first < WARP || (team_blocks(p) > 1 && thread_index() < WARP)) {
        merge_row(p, mode, warps, block_threads() / WARP, whole, scales, target_logits);
    }
    ATKD_SYNC_CLUSTER();
    if (rows.speaks) {
        tell_terms(p, rows.token, mode, whole, target_logits);
    }
    return ATKD_REMOTE(scales, 0, 0);
}

// The gradient of a chunk, but for the target.
template <bool AT_1, class P, class Q>
ATKD_DEVICE void gradient_of(const GradientScales &scales, float exponent, const Packed<P> &teacher_chunk,
                             const Packed<Q> &student_chunk, float (&g)[CHUNK]) {
    float a[CHUNK], b[CHUNK];
    unpack(teacher_chunk, a);
    unpack(student_chunk, b);
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        float teacher = exp2_fast(fmaf(a[k], exponent, -scales.teacher_reference));
        float student = exp2_fast(fmaf(b[k], exponent, -scales.student_reference));
        g[k] = fmaf(scales.student, student, -(scales.teacher * teacher));
        if (AT_1) {
            g[k] += scales.student_at_1 * exp2_fast(fmaf(b[k], LOG2_E, -reference_at_1(scales.student_reference, exponent)));
        }
    }
}

ATKD_DEVICE void put_target(uint32_t within, float value, float (&g)[CHUNK]) {
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        g[k] = within == k ? value : g[k];
    }
}
