// A row's state from its threads' parts: across the warp by shuffles, across the block through shared
// memory. The order is fixed, so the result is the same bits every time.
#pragma once

#include "row_math.cuh"

constexpr uint32_t MAX_WARPS = 32;

template <class T, class Op> ATKD_DEVICE T reduce_warp(T value, Op op) {
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
struct Or {
    ATKD_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
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

// One warp's part of a row, in double: sums over thousands of float32 parts keep their digits.
struct WarpState {
    float teacher_max, student_max;
    double teacher_sum, weighted_gap, student_sum, student_sum_at_1;
    uint32_t ruled_out;
};

// The warp's state, in every lane.
ATKD_DEVICE RowState<double> reduce_warp_state(const RowState<float> &own, float exponent, bool at_1) {
    float teacher_max = reduce_warp(own.teacher_max, Max());
    float student_max = reduce_warp(own.student_max, Max());
    RowState<float> part = own;
    part.rebase(teacher_max, student_max, exponent);
    RowState<double> state;
    state.teacher_max = teacher_max;
    state.student_max = student_max;
    state.teacher_sum = reduce_warp(double(part.teacher_sum), Sum());
    state.weighted_gap = reduce_warp(double(part.weighted_gap), Sum());
    state.student_sum = reduce_warp(double(part.student_sum), Sum());
    state.student_sum_at_1 = at_1 ? reduce_warp(double(part.student_sum_at_1), Sum()) : 0.0;
    state.ruled_out = reduce_warp(part.ruled_out, Or());
    return state;
}

// The block's state from its warps' in shared memory, in fixed order, by one thread.
template <class Warps> ATKD_DEVICE RowState<double> merge_warps(const Warps &warps, uint32_t count, float exponent) {
    RowState<double> state;
    WarpState first = warps[0];
    state.teacher_max = first.teacher_max;
    state.student_max = first.student_max;
    for (uint32_t i = 1; i < count; i++) {
        WarpState other = warps[i];
        state.teacher_max = fmaxf(state.teacher_max, other.teacher_max);
        state.student_max = fmaxf(state.student_max, other.student_max);
    }
    for (uint32_t i = 0; i < count; i++) {
        WarpState other = warps[i];
        RowState<double> part;
        part.teacher_max = other.teacher_max;
        part.student_max = other.student_max;
        part.teacher_sum = other.teacher_sum;
        part.weighted_gap = other.weighted_gap;
        part.student_sum = other.student_sum;
        part.student_sum_at_1 = other.student_sum_at_1;
        part.rebase(state.teacher_max, state.student_max, exponent);
        state.teacher_sum += part.teacher_sum;
        state.weighted_gap += part.weighted_gap;
        state.student_sum += part.student_sum;
        state.student_sum_at_1 += part.student_sum_at_1;
        state.ruled_out |= other.ruled_out;
    }
    return state;
}
