// The parameters that the host hands to the kernels. Rust's side is generated from this file (src/params.rs).
//
// Plain C, fixed-width types, widest first: no compiler adds padding of its own taste. Every pointer
// is to device memory. N is the number of tokens, V the vocabulary.
#pragma once

#include <stdint.h>

// Values of atkd_batch.target.
#define ATKD_TARGET_LABEL 0u
#define ATKD_TARGET_TEACHER 1u

// Values of atkd_rows.gradient_type.
#define ATKD_GRADIENT_F32 0u
#define ATKD_GRADIENT_F16 1u
#define ATKD_GRADIENT_BF16 2u

// The groups of tokens, which select_hard writes.
#define ATKD_IGNORED 0u
#define ATKD_EASY 1u
#define ATKD_HARD 2u

// How the losses of the tokens become one number.
#define ATKD_SUM 0u
#define ATKD_MEAN 1u       // over the valid tokens
#define ATKD_GROUP_MEAN 2u // the mean of the easy tokens' distillation terms plus that of the hard ones'

// The rules by which select_hard takes tokens for hard.
#define ATKD_TOP_K 0u  // the ceil(k * valid) of the largest keys, the lower index first among equals
#define ATKD_MEDIAN 1u // those with keys from the lower median on

// The distribution that a sparse teacher is taken for outside of the tokens that it knows.
#define ATKD_TAIL_ZERO 0u
#define ATKD_TAIL_UNIFORM 1u
#define ATKD_TAIL_BUCKET 2u
#define ATKD_TAIL_SAMPLED 3u

// Threads per warp.
#define ATKD_WARP 32u
// Consecutive logits that a thread handles at once.
#define ATKD_CHUNK 8u
// Bytes of a line of the L2 cache.
#define ATKD_LINE 128u
// Terms of the polynomial in atkd_divergence.
#define ATKD_TAYLOR 5u

// Launch bounds of each kernel: threads per block at most, and blocks that a multiprocessor must hold at once. Those of
// count_valid are prepare_rows' too, and those of row_stream row_states', row_terms' and row_gradient's.
#define ATKD_MARGIN_THREADS 256u
#define ATKD_MARGIN_BLOCKS 5u
#define ATKD_COUNT_THREADS 256u
#define ATKD_COUNT_BLOCKS 6u
#define ATKD_SELECT_THREADS 1024u
#define ATKD_SELECT_BLOCKS 1u
#define ATKD_RESIDENT_THREADS 256u
#define ATKD_RESIDENT_BLOCKS 2u
#define ATKD_STREAM_THREADS 384u
#define ATKD_STREAM_BLOCKS 2u
#define ATKD_SPARSE_MARGIN_THREADS 256u
#define ATKD_SPARSE_MARGIN_BLOCKS 2u
#define ATKD_SPARSE_THREADS 256u
#define ATKD_SPARSE_BLOCKS 3u
#define ATKD_MERGE_THREADS 256u
#define ATKD_MERGE_BLOCKS 2u
// row_pipelined's consumer warps, and the producer warp.
#define ATKD_PIPELINED_THREADS (128u + ATKD_WARP)
#define ATKD_PIPELINED_BLOCKS 6u
#define ATKD_PIPELINED_WIDE_THREADS (256u + ATKD_WARP)
#define ATKD_PIPELINED_WIDE_BLOCKS 3u
#define ATKD_TERMS_THREADS 256u
#define ATKD_TERMS_BLOCKS 2u
#define ATKD_SCALE_THREADS 256u
#define ATKD_SCALE_BLOCKS 6u
#define ATKD_ENTROPY_THREADS 256u
#define ATKD_ENTROPY_BLOCKS 4u
#define ATKD_UNFUSED_THREADS 512u
#define ATKD_UNFUSED_BLOCKS 2u
#define ATKD_UNFUSED_TOKENS_THREADS 256u
#define ATKD_UNFUSED_TOKENS_BLOCKS 2u

// Bytes of each model's row that a thread of row_resident holds in registers.
#define ATKD_HELD_BYTES 128u
// Tokens that a sparse teacher knows by index at most, and the bytes of static shared memory of a block of row_sparse,
// beside the row, at most.
#define ATKD_MAX_TOP_K 1024u
#define ATKD_SPARSE_STATIC_BYTES 10240u
// Bytes of static shared memory of a block of row_pipelined at most, beside the row's slices.
#define ATKD_PIPELINED_STATIC_BYTES 640u
#define ATKD_PIPELINED_AT_1_STATIC_BYTES 768u // with cross entropy's own sum

// Blocks that a launch in teams has at most, and the bytes of a row's state that each tells its team.
#define ATKD_TEAM_BLOCKS 512u
#define ATKD_TEAM_STATE 48u
// Blocks that a launch of row_pipelined has at most, and the bytes of a row's state that each tells its team.
#define ATKD_PIPELINED_GRID 1024u
#define ATKD_EXCHANGE_BYTES 48u

// Blocks that token_terms has at most: each leaves a sum where the states of rows were.
#define ATKD_TERMS_GRID 1024u

// The layout of a matrix [N, V]: where its rows start, in elements from the first. Row i starts at i * stride, and at
// `skip` more for every whole number of rows of one outer index in i: i * inverse, over 2^32, over 2^shift.
typedef struct {
    int64_t stride;
    int64_t skip;
    uint32_t inverse; // 0 where all rows are evenly spaced
    uint32_t shift;
} atkd_strides;

// The version of the two layouts that ranks exchange: atkd_row_state and atkd_sweep_terms.
#define ATKD_ROW_STATE_VERSION 1u

// The sums of one token's row with the target left out, or of the part of the row that a shard of the vocabulary has: the
// states of all parts merge into that of the row. With the exponents x_j = z_j log2(e) / T of the teacher's logits and y_j
// of the student's, X is the integer nearest to the exponent of teacher_max, and Y to that of student_max; where that is
// 2^18 or more in size, the exponent itself.
typedef struct {
    float teacher_sum;      // sum 2^(x_j - X)
    float student_sum;      // sum 2^(y_j - Y)
    float student_sum_at_1; // the same at T = 1, if cross entropy needs it beside student_sum; else 0
    // Forward KL: sum 2^(x_j - X) (x_j - X - y_j + Y) / 2^64, or inf where the student rules out (-inf) a token that the
    // teacher does not. Reverse KL, with r the token of student_max: sum 2^(y_j - Y) (x_j - x_r - y_j + y_r) / 2^64, or
    // -inf where the teacher rules out what the student does not. Other divergences: 0.
    float cross_term;
    float teacher_max; // the largest logit, or a little less; finite
    float student_max;
    float teacher_reference; // reverse KL: the teacher's logit of token r; finite
    float teacher_target;    // the logits of the target, where this part has it
    float student_target;
    int32_t target; // a token of the whole vocabulary, or -1: it is in another part, or the token is ignored
} atkd_row_state;

// The sums of the second sweep over a part of a row, for divergences of two sweeps. With p_j and q_j renormalised without
// the target, or plain over the whole vocabulary, and the mixture m of the divergence:
typedef struct {
    float teacher; // a mixture: sum p_j log2(p_j / m_j); total variation: sum |p_j - q_j|
    float student; // a mixture: sum q_j log2(q_j / m_j); total variation: sum q_j sign(q_j - p_j)
    float slope;   // a mixture whose KL divergences are skewed: sum q_j (p_j - q_j) / m_j; else 0
} atkd_sweep_terms;

// One per workspace: results, and counters of the call in progress. All 0 before the first call; between calls the
// counters are 0, but for the top bits of `arrived`.
typedef struct {
    double loss;
    uint64_t label_fault;   // ~the lowest token whose label is out of range, since the host last looked; 0 for none
    uint64_t offset_fault;  // ~the lowest sequence whose offsets are out of order, likewise
    uint64_t teacher_fault; // ~the lowest token whose sparse teacher is no distribution, likewise
    float loss_f32;         // NaN if there is a fault that the host has not seen
    uint32_t valid;         // tokens that are not ignored
    uint32_t hard;
    uint32_t counted_valid; // of the call in progress
    uint32_t counted_hard;
    uint32_t counted_mispredicted; // tokens whose group was predicted wrong
    uint32_t predicted_threshold;  // the last call's, by which this one predicts
    uint32_t next_ticket;          // head of row_pipelined's work queue; the first two rows of each team are its own
    uint32_t summed;               // blocks of token_terms that have left their sums
    uint32_t reserved;
    uint32_t arrived[ATKD_TEAM_BLOCKS / 2]; // by team, whose blocks have met when the top bit flips
} atkd_summary;

// Teacher and labels of a call, and what its kernels share.
typedef struct {
    const void *teacher;        // logits [N, V]
    const void *labels;         // [N], or null for none
    int32_t *targets;           // [N]: the teacher's arg max (ATKD_TARGET_TEACHER only)
    uint32_t *keys;             // [N]: larger for a larger margin; 1 for NaN, 0 for an ignored token
    uint8_t *groups;            // [N]: ATKD_IGNORED, ATKD_EASY or ATKD_HARD
    const float *token_weights; // [N]: of each token's terms; null for 1
    const float *temperatures;  // [N]: each token's T; null for one of all
    atkd_summary *summary;
    atkd_strides teacher_strides;
    int64_t ignore_index;      // tokens with this label are dropped
    uint32_t tokens;           // N
    uint32_t first_token;      // of the call's, where these are a range of them: for reports of faults
    uint32_t vocab;            // V
    uint32_t label_bytes;      // 4 or 8
    uint32_t target;           // ATKD_TARGET_*
    float inverse_temperature; // 1 / T
} atkd_batch;

// teacher_margin: keys and, if the target is the teacher's, targets. A block takes a token in turn.
typedef struct {
    atkd_batch batch;
    float *margins;  // [N], where the caller wants them: -inf for an ignored token, NaN for a bad label; or null
    uint32_t blocks; // of the launch
    uint32_t reserved;
} atkd_teacher_margin;

// count_valid: groups and the count of valid tokens, where no token's loss depends on the selection, or the caller has
// made it.
typedef struct {
    atkd_batch batch;
    const uint8_t *hard;            // [N]: not 0 for a hard token, instead of valid_group; or null
    void *states;                   // of row_pipelined, whose numbers become 0
    const uint32_t *kept_threshold; // the last call's: becomes the summary's predicted one; any value is right
    const uint32_t *counts;         // [2]: valid and hard tokens of all ranks, instead of those counted here; or null
    uint32_t valid_group;           // ATKD_EASY or ATKD_HARD
    uint32_t count_hard;            // not 0: no select_hard comes after, which would count the hard tokens
} atkd_count_valid;

// select_hard: which tokens are hard. One cluster a scope.
typedef struct {
    atkd_batch batch;
    const float *margins;     // [N], instead of the keys, which are then written; null for none
    const uint8_t *valid;     // [N]: 0 for a token that does not compete, beside margins instead of labels; or null
    const int64_t *offsets;   // [scopes + 1]: scope s is tokens offsets[s]..offsets[s + 1]; null for one scope
    uint32_t *mispredicted;   // [N]: tokens whose groups, predicted before, turn out other; null if none were
    void *states;             // of row_pipelined, whose numbers become 0
    uint32_t *kept_threshold; // where the first scope's threshold is left for the next call; null where this is no part
                              // of a call, and leaves the summary's counters alone
    uint8_t *hard_to;         // [N]: 1 for a hard token, else 0, where the caller wants it; or null
    double hard_ratio;        // k of ceil(k * valid)
    uint32_t scopes;
    uint32_t count; // add the valid tokens to the summary's
    uint32_t rule;  // ATKD_TOP_K or ATKD_MEDIAN
    uint32_t reserved;
} atkd_select_hard;

// prepare_rows: a further launch of rows within a call. Clears what the one before it left, and gathers target and group
// of the tokens to repair, whose rows the caller has brought side by side.
typedef struct {
    atkd_batch batch;
    const uint32_t *mispredicted; // [count]
    int32_t *targets;             // [count], of these tokens
    uint8_t *groups;              // [count], likewise
    float *token_weights;         // [count], likewise, if tokens have any
    float *temperatures;          // [count], likewise
    void *states;                 // of row_pipelined, whose numbers become 0
    uint32_t count;
    uint32_t other_group; // not 0: the groups are those of the group that each token is not in
} atkd_prepare_rows;

// The weight of a term: value, or the token's uncertainty times it.
typedef struct {
    double value;
    uint64_t times_uncertainty;
} atkd_coefficient;

// The weights of the terms of a token's loss; [0] easy, [1] hard.
typedef struct {
    atkd_coefficient tkd[2];
    atkd_coefficient dkd[2];
    double ce_weight;
    double inverse_temperature; // 1 / T; 1 where tokens have their own
    uint64_t times_square;      // of each token's own temperature, in tkd and dkd
} atkd_objective;

// The numbers of a divergence. Those of a mixture m = share p + rest q are all 0 for others.
typedef struct {
    float share;
    float rest;          // 1 - share
    float of_teacher;    // the weight of KL(p, m), times ln 2
    float of_student;    // the weight of KL(q, m), times ln 2
    float of_difference; // the slope's weight of (p - q) / m: 0 for JSD
    // log2(q / m) over r, as a polynomial in r = log2(p / q) near 0, the lowest power first.
    float taylor[ATKD_TAYLOR];
    uint32_t plain; // over the whole vocabulary, by the weights of DKD; never of forward KL, whose parts are enough
} atkd_divergence;

// row_resident, row_pipelined, row_stream: what the terms of each token follow from, and the gradient. A block,
// cluster or team takes one token at a time.
typedef struct {
    atkd_batch batch;
    atkd_objective objective;
    const void *student;          // logits [N, V]
    void *gradient;               // [N, V], may be student; null for the loss alone
    const float *upstream;        // the gradient of what comes after, or null for 1
    float *teacher_margin;        // [N]
    float *student_margin;        // [N], over 2^64: float32 holds any logit's
    float *dkd;                   // [N], over 2^64; or the plain divergence of two sweeps
    double *student_margin_at_1;  // [N], if cross entropy has a weight: the student's at temperature 1
    void *states;                 // [2][ATKD_TEAM_BLOCKS] of ATKD_TEAM_STATE bytes; or, of row_pipelined,
                                  // [2][ATKD_PIPELINED_GRID] of ATKD_EXCHANGE_BYTES
    const uint32_t *mispredicted; // the tokens to do, counted in the summary; null for all
    atkd_strides student_strides;
    atkd_strides gradient_strides;
    double scale;        // of the gradient
    double hard_ratio;   // for ATKD_GROUP_MEAN: k, of which ceil(k * valid) tokens are or will be hard; below 0 where
                         // the summary has counted them
    uint32_t reduction;  // ATKD_SUM, ATKD_MEAN or ATKD_GROUP_MEAN
    uint32_t write_keys; // they are not there yet
    uint32_t predicts;   // which tokens are hard, by the summary's predicted threshold, and write groups
    uint32_t clusters;   // of the launch, or teams
    uint32_t team;       // blocks of a team, up to 32; of row_stream a power of two, and 1 where there are clusters
    uint32_t slice;      // row_pipelined, row_sparse: chunks of a row that a block has room for
    uint32_t gradient_type; // row_pipelined: the student's, float32, or any if the student's is float32
    atkd_divergence divergence;
} atkd_rows;

// row_states, row_terms, row_gradient, merge_states: the stages of a call on one rank's shard of the vocabulary, which has
// some columns of each row. The states of all ranks are merged where they are used, in rank order.
typedef struct {
    atkd_rows rows;                // rows.batch.vocab: this shard's columns
    atkd_row_state *own_states;    // [N]: row_states writes them
    atkd_sweep_terms *own_terms;   // [N]: row_terms writes them
    const atkd_row_state *states;  // [ranks, N]
    const atkd_sweep_terms *terms; // [ranks, N], for the divergences of two sweeps; null where they are not known yet
    float *margins;                // [N]: merge_states, the teacher's where the caller wants them; or null
    uint32_t ranks;
    uint32_t first_column;
    uint32_t whole_vocab;
    uint32_t blocks; // of the launch
} atkd_shard;

// sparse_margin, row_sparse: a call whose teacher is K log-probabilities for each token, and that of the target.
typedef struct {
    atkd_rows rows;                // without a teacher
    const void *indices;           // [N, K], -1 for none
    const void *log_probs;         // [N, K]
    const float *target_log_probs; // [N], or null
    // [N], which sparse_margin leaves for row_sparse, in logarithms of probabilities.
    float *references;      // that of the likeliest of the K off the target; NaN where the values are no distribution's
    float *targets;         // the target's, relative to the reference
    double *rests;          // that of all tokens that are not known together, likewise; -inf for none
    float *margins;         // [N]: sparse_margin, the teacher's
    double tolerance;       // by which the sum of the probabilities may exceed 1
    uint32_t top_k;         // K
    uint32_t index_bytes;   // 4 or 8
    uint32_t log_prob_type; // ATKD_GRADIENT_*
    uint32_t tail;          // ATKD_TAIL_*
} atkd_sparse;

// token_terms: the terms of each token, over what they follow from, and the reduced loss; ends the call. A thread takes
// a token in turn.
typedef struct {
    atkd_batch batch;
    atkd_objective objective;
    float *uncertainty; // [N], over the teacher's margin
    float *tkd;         // [N], over the student's
    float *dkd;         // [N]
    double *loss;       // [N], before the reduction; over the student's margin at temperature 1
    double *sums;       // [blocks] of the losses
    // The caller's memory for these and the groups; each may be null.
    float *reduced_loss_to; // [1]
    float *uncertainty_to;
    float *tkd_to;
    float *dkd_to;
    float *margin_to;     // the teacher's; -inf for an ignored token
    float *token_loss_to; // before the reduction
    uint8_t *groups_to;
    double scale;       // of the loss
    uint32_t reduction; // ATKD_SUM, ATKD_MEAN or ATKD_GROUP_MEAN
    uint32_t blocks;    // of the launch
    atkd_divergence divergence;
} atkd_token_terms;

// scale_gradient: times a number, in place; nothing if that is 1. A block takes a part of a row in turn.
typedef struct {
    void *gradient; // [N, V]
    const float *factor;
    atkd_strides strides;
    uint32_t tokens;
    uint32_t vocab;
    uint32_t blocks; // of the launch, whole rows' parts
    uint32_t parts;  // of a row, a block each
} atkd_scale_gradient;

// token_entropies: of one model's distribution for each token. A block takes a row in turn.
typedef struct {
    const void *logits; // [N, V]
    float *entropies;   // [N]
    atkd_strides strides;
    uint32_t tokens;
    uint32_t vocab;
    float inverse_temperature; // 1 / T
    uint32_t blocks;           // of the launch
} atkd_token_entropies;

// unfused_*: one step of the loss as an eager framework runs it, over float32 [N, V] or [N].
typedef struct {
    const void *a;
    const float *b;
    const float *row; // [N]: one number a row
    void *out;
    uint32_t tokens;
    uint32_t vocab;
    float constant;
    uint32_t reserved;
} atkd_unfused;

// unfused_targets, _losses and _target_gradient: the steps over tokens between those over rows.
typedef struct {
    const float *p; // softmax of the teacher [N, V]
    const float *q; // softmax of the student [N, V]
    const int64_t *labels;
    const uint8_t *groups;
    const float *dkd;
    const float *d_rest;
    float *mask; // [N, V]
    float *d_q;  // [N, V]
    float *p_target;
    float *q_target;
    float *uncertainty;
    float *rest;
    float *factor;
    float *loss; // times the scale
    uint32_t tokens;
    uint32_t vocab;
    float easy; // the easy tokens' weight of DKD
    float hard; // the hard tokens' weight of both
    float scale;
    float epsilon;
} atkd_unfused_tokens;
