// A teacher of which up to K log-probabilities are known for each token: how its values are read.
#pragma once

#include "batch.cuh"

// The column of index k of a token; NO_COLUMN for -1, which is none, and for what is no token of the vocabulary.
constexpr uint32_t NO_COLUMN = 0xffffffffu;

ATKD_DEVICE int64_t given_index(const atkd_sparse &p, uint32_t token, uint32_t k) {
    uint64_t at = uint64_t(token) * p.top_k + k;
    return p.index_bytes == 8 ? load(static_cast<const int64_t *>(p.indices) + at)
                              : load(static_cast<const int32_t *>(p.indices) + at);
}

ATKD_DEVICE uint32_t column_of_index(const atkd_sparse &p, int64_t index) {
    return index < 0 || index >= p.rows.batch.vocab ? NO_COLUMN : static_cast<uint32_t>(index);
}

ATKD_DEVICE float log_prob_of(const atkd_sparse &p, uint32_t token, uint32_t k) {
    uint64_t at = uint64_t(token) * p.top_k + k;
    return p.log_prob_type == ATKD_GRADIENT_F32   ? load(static_cast<const float *>(p.log_probs) + at)
           : p.log_prob_type == ATKD_GRADIENT_F16 ? widen(load(static_cast<const f16 *>(p.log_probs) + at))
                                                  : widen(load(static_cast<const bf16 *>(p.log_probs) + at));
}

// Reports a token whose values are no distribution's.
ATKD_DEVICE void report_teacher(const atkd_sparse &p, uint32_t token) {
    const atkd_batch &batch = p.rows.batch;
    max_atomic(&batch.summary->teacher_fault, ~(uint64_t(batch.first_token) + token));
}

// A token's teacher, in logarithms of probabilities.
struct SparseRow {
    float reference; // that of the likeliest of the K off the target; NaN where the values are no distribution's
    float target;    // relative to the reference
    double rest;     // of all tokens that are not known together, likewise
};
