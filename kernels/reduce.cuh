// A value from all threads' parts: across the warp by shuffles, across the block through shared memory,
// across the cluster through each other's shared memory, across a team through global memory. The order is
// fixed, so the result is the same bits every time.
#pragma once

#include "row_math.cuh"

constexpr uint32_t MAX_WARPS = 32;

template <class T, class Op> ATKD_DEVICE T reduce_warp(T value, Op op) {
    ATKD_NO_UNROLL
    for (uint32_t mask = WARP / 2; mask > 0; mask /= 2) {
        value = op(value, shuffle_xor(value, mask));
    }
    return value;
}

struct Max {
    ATKD_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
    ATKD_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a < b ? a : b; }
};
struct Sum {
    template <class T> ATKD_DEVICE T operator()(T a, T b) const { return a + b; }
};

// Combines the values of all threads of the block; every thread gets the result. `scratch` holds one
// value a warp and may be used again after the next barrier.
#define ATKD_REDUCE_BLOCK(result, value, op, scratch)                                                         \
    do {                                                                                                      \
        auto reduced_ = reduce_warp(value, op);                                                               \
        ATKD_SYNC_BLOCK();                                                                                    \
        if (thread_index() % WARP == 0) {                                                                     \
            scratch[thread_index() / WARP] = reduced_;                                                        \
        }                                                                                                     \
        ATKD_SYNC_BLOCK();                                                                                    \
        reduced_ = scratch[0];                                                                                \
        for (uint32_t warp_ = 1; warp_ < block_threads() / WARP; warp_++) {                                   \
            decltype(reduced_) other_ = scratch[warp_];                                                       \
            reduced_ = op(reduced_, other_);                                                                  \
        }                                                                                                     \
        result = reduced_;                                                                                    \
    } while (0)

// Relative to the same maxima in all lanes.
template <bool AT_1, class Real> ATKD_DEVICE void share_maxima(RowState<Real> &part, float exponent) {
    part.template rebase<AT_1>(max_of_warp(part.teacher_max), max_of_warp(part.student_max), exponent);
}

// The state of a row of which each lane has a part, in every lane; all share their maxima. All
// fields take each step together, so that their shuffles overlap. With fewer LANES, each group of so many has all
// parts.
template <bool AT_1, uint32_t LANES = WARP, class Real> ATKD_DEVICE RowState<Real> merge_warp(RowState<Real> state) {
    ATKD_UNROLL
    for (uint32_t mask = LANES / 2; mask > 0; mask /= 2) {
        state.teacher_sum += shuffle_xor(state.teacher_sum, mask);
        state.weighted_gap += shuffle_xor(state.weighted_gap, mask);
        state.student_sum += shuffle_xor(state.student_sum, mask);
        if (AT_1) {
            state.student_sum_at_1 += shuffle_xor(state.student_sum_at_1, mask);
        }
    }
    state.ruled_out = warp_ballot(state.ruled_out != 0);
    return state;
}

// Into shared memory, the state of a row of which the warp has a part.
template <bool AT_1, class Warps> ATKD_DEVICE void post_state(const RowState<float> &part, Warps &warps) {
    RowState<float> of_warp = merge_warp<AT_1>(part);
    if (thread_index() % WARP == 0) {
        warps[thread_index() / WARP] = of_warp;
    }
}

// The state of a row from those that the warps of the cluster have posted, in every lane of the calling warp.
template <bool AT_1, class Warps>
ATKD_DEVICE RowState<double> merge_cluster(const Warps &warps, uint32_t warps_a_block, float exponent) {
    auto posted = [&](uint32_t i) {
        RowState<float> warp = ATKD_REMOTE(warps, i % warps_a_block, i / warps_a_block);
        return RowState<double>{warp.teacher_sum, warp.weighted_gap, warp.student_sum, warp.student_sum_at_1,
                                warp.teacher_max, warp.student_max,  warp.ruled_out};
    };
    RowState<double> part = RowState<double>::empty();
    uint32_t i = thread_index() % WARP, all = warps_a_block * cluster_blocks();
    if (i < all) {
        part = posted(i);
    }
    ATKD_NO_UNROLL
    for (i += WARP; i < all; i += WARP) {
        part.merge<AT_1>(posted(i), exponent);
    }
    share_maxima<AT_1>(part, exponent);
    return merge_warp<AT_1>(part);
}

// A power of two.
ATKD_DEVICE uint32_t team_rank(const atkd_rows &p) { return block_index() & (team_blocks(p) - 1); }

// The same from the states that the blocks of a team have; by one warp of each, and of the same bits in all.
// A state lies in one of two places in turn: it is overwritten after the team has met once more, to where each
// block comes only when it has read it.
template <bool AT_1>
ATKD_DEVICE RowState<double> merge_team(const RowState<double> &own, const atkd_rows &p, float exponent) {
    static_assert(sizeof own == ATKD_TEAM_STATE, "the layout is a contract");
    uint32_t lane = thread_index() % WARP, rank = team_rank(p);
    uint32_t *arrived = p.batch.summary->arrived + block_index() / team_blocks(p);
    // Of one lane, which goes on only when all have looked.
    uint32_t before = shuffle_from(load_acquire(arrived), 0);
    auto *states = static_cast<RowState<double> *>(p.states) + block_index();
    states += (before >> 31) * ATKD_TEAM_BLOCKS;
    if (lane == 0) {
        store(states, own);
        // The team's come to 2^31.
        add_release(arrived, rank == 0 ? (1u << 31) - (team_blocks(p) - 1) : 1);
    }
    ATKD_WAIT_FOR_FLIP(arrived, before);
    RowState<double> part = lane < team_blocks(p) ? load(states - rank + lane) : RowState<double>::empty();
    share_maxima<AT_1>(part, exponent);
    return merge_warp<AT_1>(part);
}
