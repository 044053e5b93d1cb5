// The values that a token has of its own: its target, a token of the vocabulary; its weight and its temperature.
#pragma once

#include "packed.cuh"

constexpr int32_t IGNORED_TARGET = -1;

// The start of a token's row of the teacher.
template <class P> ATKD_DEVICE const P *teacher_row(const atkd_batch &batch, uint32_t token) {
    return row_at(static_cast<const P *>(batch.teacher), batch.teacher_strides, token);
}

// The label of a token as it was given.
ATKD_DEVICE int64_t given_label(const atkd_batch &batch, uint32_t token) {
    return batch.label_bytes == 8 ? load(static_cast<const int64_t *>(batch.labels) + token)
                                  : load(static_cast<const int32_t *>(batch.labels) + token);
}

// The label of a token, or IGNORED_TARGET. A label outside the vocabulary is reported in the summary and
// its token dropped: no kernel reads outside its row.
ATKD_DEVICE int32_t label_of(const atkd_batch &batch, uint32_t token) {
    if (batch.labels == nullptr) {
        return 0;
    }
    int64_t label = given_label(batch, token);
    if (label == batch.ignore_index) {
        return IGNORED_TARGET;
    }
    if (ATKD_RARELY(label < 0 || label >= batch.vocab)) {
        max_atomic(&batch.summary->label_fault, ~(uint64_t(batch.first_token) + token));
        return IGNORED_TARGET;
    }
    return static_cast<int32_t>(label);
}

// The target of a token, or IGNORED_TARGET. The teacher's arg max is teacher_margin's to find.
ATKD_DEVICE int32_t target_of(const atkd_batch &batch, uint32_t token) {
    return batch.target == ATKD_TARGET_TEACHER ? load(batch.targets + token) : label_of(batch, token);
}

// The weight of a token's terms.
ATKD_DEVICE float token_weight(const atkd_batch &batch, uint32_t token) {
    return batch.token_weights == nullptr ? 1 : load(batch.token_weights + token);
}

// 1 / T of a token, NaN for a temperature that the host would have refused.
ATKD_DEVICE float inverse_temperature_of(const atkd_batch &batch, uint32_t token) {
    if (batch.temperatures == nullptr) {
        return batch.inverse_temperature;
    }
    float temperature = load(batch.temperatures + token);
    float inverse = reciprocal_fast(temperature);
    // One step of Newton's: the sums' exponents have 1 / T times differences of logits.
    inverse = fmaf(inverse, fmaf(-temperature, inverse, 1.0f), inverse);
    return temperature >= 1e-30f && temperature <= 1e30f ? inverse : nanf("");
}

// Clears the slots in which the blocks of row_pipelined exchange states, so that they hold no epoch. To be called by
// one block, before that kernel's launch.
ATKD_DEVICE void clear_states(void *states) {
    for (uint32_t i = thread_index(); i < 2 * ATKD_PIPELINED_GRID * (ATKD_EXCHANGE_BYTES / 16); i += block_threads()) {
        store16(static_cast<Bytes16 *>(states) + i, {{0, 0, 0, 0}});
    }
}
