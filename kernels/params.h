// What the host hands to the kernels. Rust's side is generated from this file (src/params.rs).
//
// Plain C, fixed-width types, pointers first: no compiler adds padding of its own taste. Every pointer
// is to device memory. N is the number of tokens, V the vocabulary.
#pragma once

#include <stdint.h>

// Values of atkd_batch.target.
#define ATKD_TARGET_LABEL 0u
#define ATKD_TARGET_TEACHER 1u

// What select_hard writes for each token.
#define ATKD_IGNORED 0u
#define ATKD_EASY 1u
#define ATKD_HARD 2u

// The teacher's side of a batch.
typedef struct {
    const void *teacher;       // logits [N, V]
    const void *labels;        // [N], or null for none
    int32_t *targets;          // [N], workspace: the teacher's arg max (ATKD_TARGET_TEACHER only)
    uint64_t *fault;           // the lowest token whose label is out of range, plus nothing; ~0 for none
    int64_t teacher_stride;    // elements from row to row
    int64_t ignore_index;      // tokens with this label are dropped
    uint32_t tokens;           // N
    uint32_t vocab;            // V
    uint32_t label_bytes;      // 4 or 8
    uint32_t target;           // ATKD_TARGET_*
    float inverse_temperature; // 1 / T
    uint32_t reserved;
} atkd_batch;

// teacher_margin: the log-odds against the target, as sortable keys. One block a token.
typedef struct {
    atkd_batch batch;
    uint32_t *keys; // [N]: larger for a larger margin; 1 for NaN, 0 for an ignored token
} atkd_teacher_margin;

// select_hard: which tokens are hard. One block a scope.
typedef struct {
    atkd_batch batch;
    const uint32_t *keys;    // [N], or null: then every token of a scope is in one group
    const int64_t *offsets;  // [scopes + 1]: scope s is tokens offsets[s]..offsets[s + 1]
    uint8_t *modes;          // [N]: ATKD_IGNORED, ATKD_EASY or ATKD_HARD
    uint32_t *thresholds;    // [scopes]: the key of the last hard token; 0 where there is none
    uint32_t *valid;         // tokens that are not ignored, in all scopes; zeroed before
    uint32_t *hard;          // hard tokens in all scopes; zeroed before
    double hard_ratio;       // k of ceil(k * valid)
} atkd_select_hard;

// The weight of a term: value, or the token's uncertainty times it.
typedef struct {
    float value;
    uint32_t times_uncertainty;
} atkd_coefficient;

// What a token's loss is made of; [0] easy, [1] hard.
typedef struct {
    atkd_coefficient tkd[2];
    atkd_coefficient dkd[2];
    float ce_weight;
    float inverse_temperature; // 1 / T
    double scale;              // of the loss, if mean is 0
    uint32_t mean;             // scale is 1 / valid instead
    uint32_t reserved;
} atkd_objective;

// row_stream: terms of each token, and the gradient. One block a token.
typedef struct {
    atkd_batch batch;
    atkd_objective objective;
    const void *student;     // logits [N, V]
    void *gradient;          // [N, V], may be student; null for the loss alone
    const uint8_t *modes;    // [N]
    const uint32_t *valid;
    const float *upstream;   // the gradient of what comes after, or null for 1
    float *margin;           // [N]
    float *uncertainty;      // [N]
    float *tkd;              // [N]
    float *dkd;              // [N]
    double *loss;            // [N], before the reduction
    uint32_t *keys;          // [N], as teacher_margin's, or null
    int64_t student_stride;
    int64_t gradient_stride;
} atkd_row_stream;

// sum_losses: the reduced loss. One block.
typedef struct {
    const double *token_loss; // [N]
    const uint32_t *valid;
    double *loss;
    double scale;
    uint32_t tokens;
    uint32_t mean; // scale is 1 / valid instead
} atkd_sum_losses;
