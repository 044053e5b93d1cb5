// The reduction of all threads' values: across the warp by shuffles, across the block through shared memory. The order
// is fixed, so the result is the same bits every time.
#pragma once

#include "machine.cuh"

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
// value per warp and may be used again after the next barrier.
#define ATKD_REDUCE_BLOCK(result, value, op, scratch)                                                                  \
    do {                                                                                                               \
        auto reduced_ = reduce_warp(value, op);                                                                        \
        ATKD_SYNC_BLOCK();                                                                                             \
        if (thread_index() % WARP == 0) {                                                                              \
            scratch[thread_index() / WARP] = reduced_;                                                                 \
        }                                                                                                              \
        ATKD_SYNC_BLOCK();                                                                                             \
        reduced_ = scratch[0];                                                                                         \
        for (uint32_t warp_ = 1; warp_ < block_threads() / WARP; warp_++) {                                            \
            decltype(reduced_) other_ = scratch[warp_];                                                                \
            reduced_ = op(reduced_, other_);                                                                           \
        }                                                                                                              \
        result = reduced_;                                                                                             \
    } while (0)
