// The state of a row from its parts: across the warp by shuffles, across the block and the cluster through shared
// memory, across a team through global memory. The order is fixed, so the result is the same bits every time. D is a
// divergence, or SecondSweep of one; which fields its state has, RowState::visit says.
#pragma once

#include "math/token.cuh"
#include "reduce.cuh"

// The terms of a second sweep in the place of the sums of the first.
template <class D> struct SecondSweep {
    template <class Real> using State = typename D::template Terms<Real>;
};

// Merges another part of the same row into `state`.
template <bool CE_SUM, class State> ATKD_DEVICE void merge(State &state, State other, float exponent) {
    if constexpr (State::RELATIVE) {
        float teacher = fmaxf(state.teacher_max, other.teacher_max);
        float student = fmaxf(state.student_max, other.student_max);
        float reference = student > state.student_max ? other.teacher_reference : state.teacher_reference;
        state.template rescale<CE_SUM>(teacher, student, reference, exponent);
        other.template rescale<CE_SUM>(teacher, student, reference, exponent);
    }
    State::template visit<CE_SUM>(
        [](auto kind, auto &own, auto &others) {
            if constexpr (decltype(kind)::value == SUM) {
                own += others;
            } else if constexpr (decltype(kind)::value == FLAG) {
                own |= others;
            }
        },
        state, other);
}

// Makes the parts that the lanes have relative to the same maxima.
template <bool CE_SUM, class State> ATKD_DEVICE void share_maxima(State &part, float exponent) {
    if constexpr (State::RELATIVE) {
        float teacher = max_of_warp(part.teacher_max), student = max_of_warp(part.student_max), reference = 0;
        if (State::CROSS_TERM == BY_STUDENT) {
            reference = State::reference_of_warp(part.student_max == student, part.teacher_reference);
        }
        part.template rescale<CE_SUM>(teacher, student, reference, exponent);
    }
}

// The state of a row of which each lane has a part, in every lane; all share their maxima. All fields take each step
// together, so that their shuffles overlap. With fewer LANES, each group of so many has all parts.
template <bool CE_SUM, uint32_t LANES = WARP, class State> ATKD_DEVICE State merge_warp(State state) {
    ATKD_UNROLL
    for (uint32_t mask = LANES / 2; mask > 0; mask /= 2) {
        State::template visit<CE_SUM>(
            [&](auto kind, auto &value) {
                if constexpr (decltype(kind)::value == SUM) {
                    value += shuffle_xor(value, mask);
                }
            },
            state);
    }
    State::template visit<CE_SUM>(
        [](auto kind, auto &value) {
            if constexpr (decltype(kind)::value == FLAG) {
                value = warp_ballot(value != 0);
            }
        },
        state);
    return state;
}

// Stores a warp's state into its place in shared memory; each lane has a part.
template <bool CE_SUM, class State, class Warps> ATKD_DEVICE void store_warp_state(const State &part, Warps &warps) {
    State warp_state = merge_warp<CE_SUM>(part);
    if (thread_index() % WARP == 0) {
        warps[thread_index() / WARP] = warp_state;
    }
}

// The same in double precision.
template <class D, bool CE_SUM> ATKD_DEVICE RowState<D, double> widened(RowState<D, float> narrow) {
    auto state = RowState<D, double>::empty();
    RowState<D, double>::template visit<CE_SUM>([](auto, auto &wide, auto &narrow) { wide = narrow; }, state, narrow);
    return state;
}

// The state of a row from those that the warps of so many blocks of the cluster, from the first on, have stored, in every
// lane of the calling warp.
template <class D, bool CE_SUM, class Warps>
ATKD_DEVICE RowState<D, double> merge_blocks(const Warps &warps, uint32_t warps_per_block, uint32_t blocks,
                                             float exponent) {
    auto of_warp = [&](uint32_t i) {
        RowState<D, float> warp = ATKD_REMOTE(warps, i % warps_per_block, i / warps_per_block);
        return widened<D, CE_SUM>(warp);
    };
    auto part = RowState<D, double>::empty();
    uint32_t i = thread_index() % WARP, all = warps_per_block * blocks;
    if (i < all) {
        part = of_warp(i);
    }
    ATKD_NO_UNROLL
    for (i += WARP; i < all; i += WARP) {
        merge<CE_SUM>(part, of_warp(i), exponent);
    }
    share_maxima<CE_SUM>(part, exponent);
    return merge_warp<CE_SUM>(part);
}

// That of all blocks of the cluster.
template <class D, bool CE_SUM, class Warps>
ATKD_DEVICE RowState<D, double> merge_cluster(const Warps &warps, uint32_t warps_per_block, float exponent) {
    return merge_blocks<D, CE_SUM>(warps, warps_per_block, cluster_blocks(), exponent);
}

// A team: co-resident blocks that share a row, and meet through global memory; in row_stream, a power of two of them.
ATKD_DEVICE uint32_t team_rank(const atkd_rows &p) { return block_index() & (team_blocks(p) - 1); }

// The state of a row from those of a team's blocks, of which each calls this by one warp; the same bits in all. A
// block's state lies in one of two slots, used alternately: a slot is overwritten only after the team has met once
// more, and a block comes to that meeting only when it has read all slots.
template <class D, bool CE_SUM>
ATKD_DEVICE RowState<D, double> merge_team(const RowState<D, double> &own, const atkd_rows &p, float exponent) {
    static_assert(sizeof own <= ATKD_TEAM_STATE, "the host makes room for so many bytes");
    uint32_t lane = thread_index() % WARP, rank = team_rank(p);
    uint32_t *arrived = p.batch.summary->arrived + block_index() / team_blocks(p);
    // Read by one lane for all: it arrives only after every lane has the value.
    uint32_t before = shuffle_from(load_acquire(arrived), 0);
    auto *states = static_cast<RowState<D, double> *>(p.states) + block_index();
    states += (before >> 31) * ATKD_TEAM_BLOCKS;
    if (lane == 0) {
        store(states, own);
        // The blocks' increments add up to 2^31: bit 31, the barrier's sense, flips when the last has arrived.
        add_release(arrived, rank == 0 ? (1u << 31) - (team_blocks(p) - 1) : 1);
    }
    ATKD_WAIT_FOR_SENSE(arrived, before);
    auto part = lane < team_blocks(p) ? load(states - rank + lane) : RowState<D, double>::empty();
    share_maxima<CE_SUM>(part, exponent);
    return merge_warp<CE_SUM>(part);
}

// A state in single precision as blocks exchange it: its floats, then its flag if it has one.
template <class D, bool CE_SUM> struct alignas(8) PackedState {
    static constexpr uint32_t FLOATS = RowState<D, float>::template FLOATS<CE_SUM>, FLAGS = RowState<D, float>::FLAGS;
    static constexpr uint32_t WORDS = FLOATS + FLAGS;
    uint32_t word[WORDS];

    static ATKD_DEVICE PackedState of(const RowState<D, float> &state) {
        PackedState packed = {};
        uint32_t i = 0;
        RowState<D, float>::template visit<CE_SUM>(
            [&](auto kind, auto &value) {
                if constexpr (decltype(kind)::value == FLAG) {
                    packed.word[i++] = value;
                } else {
                    packed.word[i++] = to_bits(value);
                }
            },
            state);
        return packed;
    }
    ATKD_DEVICE uint32_t flag() const { return FLAGS == 0 ? 0 : word[WORDS - 1]; }
    ATKD_DEVICE void set_flag(uint32_t flag) {
        if (FLAGS != 0) {
            word[WORDS - 1] = flag;
        }
    }

    template <class Real> ATKD_DEVICE RowState<D, Real> state() const {
        auto state = RowState<D, Real>::empty();
        uint32_t i = 0;
        RowState<D, Real>::template visit<CE_SUM>(
            [&](auto kind, auto &value) {
                if constexpr (decltype(kind)::value == FLAG) {
                    value = word[i++];
                } else {
                    value = from_bits<float>(word[i++]);
                }
            },
            state);
        return state;
    }
};

// The words of a packed state as those of another, which has no fewer or no more.
template <class To, class From> ATKD_DEVICE To repacked(const From &from) {
    To to = {};
    ATKD_UNROLL
    for (uint32_t i = 0; i < To::WORDS && i < From::WORDS; i++) {
        to.word[i] = from.word[i];
    }
    return to;
}
