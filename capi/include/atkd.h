/* The ATKD knowledge-distillation loss. Generated from capi/src by capi/tests/header.rs. */

#ifndef ATKD_H
#define ATKD_H

#include <stddef.h>
#include <stdint.h>

/*
 The adaptive loss of the paper, ATKD_OBJECTIVE_*.
 */
#define ATKD_OBJECTIVE_ATKD 0

/*
 The plain forward KL divergence.
 */
#define ATKD_OBJECTIVE_KL 1

/*
 The target part alone.
 */
#define ATKD_OBJECTIVE_TKD 2

/*
 The diversity part alone.
 */
#define ATKD_OBJECTIVE_DKD 3

/*
 The coefficients in the settings.
 */
#define ATKD_OBJECTIVE_DECOUPLED 4

/*
 The divergence over the whole vocabulary.
 */
#define ATKD_OBJECTIVE_PLAIN 5

/*
 KL(p, q) of the teacher's p and the student's q, ATKD_DIVERGENCE_*.
 */
#define ATKD_DIVERGENCE_FORWARD_KL 0

/*
 KL(q, p).
 */
#define ATKD_DIVERGENCE_REVERSE_KL 1

/*
 beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q; forward KL for 0, reverse for 1.
 */
#define ATKD_DIVERGENCE_JSD 2

/*
 Total variation, half the sum of |p - q|.
 */
#define ATKD_DIVERGENCE_TVD 3

/*
 KL(p, beta p + (1 - beta) q).
 */
#define ATKD_DIVERGENCE_SKEW_KL 4

/*
 KL(q, beta q + (1 - beta) p).
 */
#define ATKD_DIVERGENCE_SKEW_REVERSE_KL 5

/*
 A coefficient that is `value`.
 */
#define ATKD_COEFFICIENT_CONSTANT 0

/*
 A coefficient that is the token's uncertainty.
 */
#define ATKD_COEFFICIENT_UNCERTAINTY 1

/*
 The label of the token.
 */
#define ATKD_TARGET_LABEL 0

/*
 The teacher's arg max.
 */
#define ATKD_TARGET_TEACHER 1

/*
 The mean over the valid tokens.
 */
#define ATKD_REDUCTION_MEAN 0

/*
 The sum over the valid tokens.
 */
#define ATKD_REDUCTION_SUM 1

/*
 That sum over `denominator`.
 */
#define ATKD_REDUCTION_DENOMINATOR 2

/*
 The mean of the easy tokens plus the mean of the hard ones, as the code of ATKD's authors has it: of groups of equal
 size twice ATKD_REDUCTION_MEAN. Cross entropy has its mean over all valid tokens.
 */
#define ATKD_REDUCTION_GROUP_MEAN 3

/*
 The hard_ratio's share of the valid tokens, rounded up, on which the teacher is least certain.
 */
#define ATKD_SELECTION_RULE_TOP_K 0

/*
 The tokens from the lower median on, as the code of ATKD's authors has it.
 */
#define ATKD_SELECTION_RULE_MEDIAN 1

/*
 IEEE 754 binary32.
 */
#define ATKD_F32 0

/*
 IEEE 754 binary16.
 */
#define ATKD_F16 1

/*
 bfloat16.
 */
#define ATKD_BF16 2

/*
 A 64-bit signed integer.
 */
#define ATKD_I64 3

/*
 A 32-bit signed integer.
 */
#define ATKD_I32 4

/*
 A token with the ignore index, in AtkdCall.groups.
 */
#define ATKD_IGNORED 0

/*
 A token that is not hard.
 */
#define ATKD_EASY 1

/*
 A token among those of which the teacher is least certain.
 */
#define ATKD_HARD 2

/*
 The tokens of which a sparse teacher has no log-probability are one class: what is left of the mass, against the
 student's mass on the same tokens. Nothing is assumed of how the teacher spreads it.
 */
#define ATKD_TAIL_BUCKET 0

/*
 They have no probability. The known ones are renormalised.
 */
#define ATKD_TAIL_ZERO 1

/*
 The teacher spreads what is left of the mass evenly over them.
 */
#define ATKD_TAIL_UNIFORM 2

/*
 They have no probability. The indices but the label are draws from what the teacher gives all tokens but the label, and
 their log-probabilities are logarithms of weights in any unit, which share what the label leaves: target_log_probs is
 needed. For forward KL, whose gradient then has the expectation of the whole teacher's.
 */
#define ATKD_TAIL_SAMPLED 3

/*
 The version that a program was compiled against; compare it with atkd_abi_version().
 */
#define ATKD_ABI_VERSION 4

/*
 The version of the layouts that ranks exchange, AtkdRowState and AtkdSweepTerms.
 */
#define ATKD_ROW_STATE_VERSION 1

/*
 Threads that a workspace for host memory has at most: to start them takes time that grows with their square.
 */
#define ATKD_MAX_THREADS 1024

/*
 A loss over tokens. Never changes: any number of threads may use one at once.
 */
typedef struct AtkdObjective AtkdObjective;

/*
 A place where calls run. Any number of threads may use one at once.
 */
typedef struct AtkdWorkspace AtkdWorkspace;

/*
 The weight of one term.
 */
typedef struct AtkdCoefficient {
  /*
   ATKD_COEFFICIENT_*.
   */
  int32_t kind;
  /*
   The number of ATKD_COEFFICIENT_CONSTANT.
   */
  double value;
} AtkdCoefficient;

/*
 The weights of both terms for one group of tokens.
 */
typedef struct AtkdCoefficients {
  /*
   The weight of TKD, the target part.
   */
  struct AtkdCoefficient tkd;
  /*
   The weight of DKD, the diversity part.
   */
  struct AtkdCoefficient dkd;
} AtkdCoefficients;

/*
 The loss that is computed. Start from atkd_default_settings().
 */
typedef struct AtkdSettings {
  /*
   ATKD_OBJECTIVE_*.
   */
  int32_t objective;
  /*
   ATKD_TARGET_*: which token splits a distribution.
   */
  int32_t target;
  /*
   ATKD_REDUCTION_*.
   */
  int32_t reduction;
  /*
   Not 0: the distillation terms are multiplied by the temperature's square.
   */
  int32_t temperature_squared;
  /*
   Tokens with this label are dropped.
   */
  int64_t ignore_index;
  /*
   In [0, 1]; of ATKD_OBJECTIVE_ATKD.
   */
  double lambda;
  /*
   The share of the valid tokens that is hard, in [0, 1]; of ATKD_SELECTION_RULE_TOP_K.
   */
  double hard_ratio;
  /*
   Above 0.
   */
  double temperature;
  /*
   The weight of the distillation terms, not negative.
   */
  double kd_weight;
  /*
   The weight of the cross entropy, not negative.
   */
  double ce_weight;
  /*
   Above 0; of ATKD_REDUCTION_DENOMINATOR.
   */
  double denominator;
  /*
   The weights of easy tokens, for ATKD_OBJECTIVE_DECOUPLED.
   */
  struct AtkdCoefficients easy;
  /*
   The weights of hard tokens, for ATKD_OBJECTIVE_DECOUPLED.
   */
  struct AtkdCoefficients hard;
  /*
   ATKD_DIVERGENCE_*; ATKD_OBJECTIVE_KL takes the forward one alone.
   */
  int32_t divergence;
  /*
   In [0, 1], below 1 for the skewed divergences, and no nearer than 1e-9 to an end that it is not; of these and of
   ATKD_DIVERGENCE_JSD.
   */
  double beta;
  /*
   ATKD_SELECTION_RULE_*.
   */
  int32_t selection_rule;
} AtkdSettings;

/*
 One of the codes below.
 */
typedef int32_t AtkdStatus;

/*
 Logits, or a gradient, [tokens, vocab]: each row contiguous, and no element in two rows. Row i starts at element
 i * row_stride or, if `inner` is not 0, where it does in a tensor [outer, inner, vocab]: at
 i / inner * outer_stride + i % inner * row_stride.
 */
typedef struct AtkdMatrix {
  /*
   The first element, aligned to its size.
   */
  void *data;
  /*
   Elements from the start of one row to the start of the next; at least vocab if `inner` is 0.
   */
  int64_t row_stride;
  /*
   ATKD_F32, ATKD_F16 or ATKD_BF16.
   */
  int32_t dtype;
  /*
   Rows of one outer index, of which tokens is a multiple, such as the length of a sequence; 0 if all rows
   are row_stride elements apart.
   */
  int64_t inner;
  /*
   Elements from one outer index to the next, which may be fewer than row_stride; of an inner that is not 0.
   */
  int64_t outer_stride;
} AtkdMatrix;

/*
 One label a token, without gaps.
 */
typedef struct AtkdLabels {
  /*
   Null where there are none: the target must be ATKD_TARGET_TEACHER then.
   */
  const void *data;
  /*
   ATKD_I64 or ATKD_I32.
   */
  int32_t dtype;
} AtkdLabels;

/*
 One batch. Every pointer but `stream` is to host memory, or for a CUDA workspace to its device's.
 */
typedef struct AtkdCall {
  /*
   Rows, ignored ones included.
   */
  int64_t tokens;
  /*
   Logits in a row that count, at least 1. A model whose vocabulary is padded has more: its row_stride is larger.
   */
  int64_t vocab;
  /*
   The teacher's logits, which are never written to.
   */
  struct AtkdMatrix teacher;
  /*
   The student's logits, which are written to only if `gradient` names the same.
   */
  struct AtkdMatrix student;
  /*
   The labels.
   */
  struct AtkdLabels labels;
  /*
   The place where the gradient is written.
   */
  struct AtkdMatrix gradient;
  /*
   Columns of the gradient after the first `vocab`, which become 0: where the student's vocabulary is padded. Else 0.
   */
  int64_t gradient_padding;
  /*
   One number that the gradient is multiplied by; null for 1. If it is infinite or NaN, the gradient of every
   valid token is NaN.
   */
  const float *upstream;
  /*
   Hard tokens are selected within each of this many sequences, at most 2^31 - 1, or within the whole batch, which
   is this call's tokens, if it is 0. With gradient accumulation, or ranks that share a batch, that is a part of the
   batch, and the parts' gradients are 7 to 26% off the whole batch's (README.md): select by atkd_select_hard over
   the margins of all parts, and give each call its share as `hard`.
   */
  int64_t sequences;
  /*
   [sequences + 1]: sequence i is tokens offsets[i] to offsets[i + 1] - 1.
   */
  const int64_t *sequence_offsets;
  /*
   [tokens]: hard tokens are selected by these margins instead of the teacher's own. Null for none.
   */
  const float *margins;
  /*
   [tokens]: not 0 for a hard token. Nothing is selected then; the hard ratio, sequences and margins are not
   used, and ignored tokens stay ignored. Null for none.
   */
  const uint8_t *hard;
  /*
   [tokens]: each token's terms, cross entropy's too, are multiplied by its weight. A mean divides by the number of
   valid tokens nevertheless. The loss and the gradient of a token whose weight is infinite or NaN are NaN. Null for 1.
   */
  const float *token_weights;
  /*
   [tokens]: divides each token's logits, of both models, instead of the settings' temperature; tokens are selected by
   their margins at these. A valid token's outside [1e-30, 1e30] is an error; on a CUDA workspace the token has the loss
   NaN. Null for none.
   */
  const float *temperatures;
  /*
   One number: the reduced loss. Null if not wanted; so are the others.
   */
  float *loss;
  /*
   [tokens]: 1 - p(target) of the teacher.
   */
  float *uncertainty;
  /*
   [tokens]: the target part.
   */
  float *tkd;
  /*
   [tokens]: the diversity part.
   */
  float *dkd;
  /*
   [tokens]: the teacher's margin, log((1 - p) / p) of the target's p, by which hard tokens are selected;
   -infinity for an ignored token.
   */
  float *margin;
  /*
   [tokens]: the token's loss before the reduction, its weight included.
   */
  float *token_loss;
  /*
   [tokens]: ATKD_IGNORED, ATKD_EASY or ATKD_HARD.
   */
  uint8_t *groups;
  /*
   The CUstream to work on, for a CUDA workspace; the default stream if null.
   */
  void *stream;
} AtkdCall;

/*
 A teacher of which a few log-probabilities per token are known, in the place of AtkdCall.teacher: natural logarithms at
 the call's temperature, which divides the student's logits alone. Every pointer is to host memory, or for a CUDA workspace
 to its device's; the arrays have no gaps.
 */
typedef struct AtkdSparseTeacher {
  /*
   Places in a row, from 1 to 1024.
   */
  int64_t top_k;
  /*
   [tokens, top_k]: tokens of the vocabulary, none twice in a row, in any order; -1 for none.
   */
  struct AtkdLabels indices;
  /*
   [tokens, top_k]: their log-probabilities.
   */
  const void *log_probs;
  /*
   ATKD_F32, ATKD_F16 or ATKD_BF16: that of log_probs.
   */
  int32_t dtype;
  /*
   ATKD_TAIL_BUCKET, ATKD_TAIL_ZERO, ATKD_TAIL_UNIFORM or ATKD_TAIL_SAMPLED.
   */
  int32_t tail;
  /*
   [tokens]: the log-probabilities of the labels, which then need not be among the indices. Null for none; not used by
   ATKD_TARGET_TEACHER, whose target is the likeliest of the indices.
   */
  const float *target_log_probs;
} AtkdSparseTeacher;

/*
 The entropies of one model's distributions. Every pointer but `stream` is to host memory, or for a CUDA workspace to its
 device's.
 */
typedef struct AtkdEntropies {
  /*
   Rows.
   */
  int64_t tokens;
  /*
   Logits in a row.
   */
  int64_t vocab;
  /*
   [tokens, vocab]: a model's logits.
   */
  struct AtkdMatrix logits;
  /*
   Divides the logits; in [1e-30, 1e30].
   */
  double temperature;
  /*
   [tokens]: becomes -sum p log p, in nats. NaN where the logits have a NaN or +inf, or are all -inf.
   */
  float *entropies;
  /*
   The CUstream to work on, for a CUDA workspace; the default stream if null.
   */
  void *stream;
} AtkdEntropies;

/*
 A selection of hard tokens by itself, over the tokens of as many calls as there are. Every pointer but `stream` is to
 host memory, or for a CUDA workspace to its device's.
 */
typedef struct AtkdSelection {
  /*
   Margins.
   */
  int64_t tokens;
  /*
   [tokens]: the larger, the harder; NaN ranks below every number, and among equals the lower index is harder.
   */
  const float *margins;
  /*
   [tokens]: not 0 for a token that counts. Null for all.
   */
  const uint8_t *valid;
  /*
   The share of the valid tokens that is hard, in [0, 1], rounded up to whole tokens.
   */
  double hard_ratio;
  /*
   ATKD_SELECTION_RULE_TOP_K, or ATKD_SELECTION_RULE_MEDIAN, which has no ratio.
   */
  int32_t rule;
  /*
   The same as AtkdCall.sequences.
   */
  int64_t sequences;
  /*
   [sequences + 1]: as AtkdCall.sequence_offsets.
   */
  const int64_t *sequence_offsets;
  /*
   [tokens]: becomes 1 for a hard token, else 0.
   */
  uint8_t *hard;
  /*
   The CUstream to work on, for a CUDA workspace; the default stream if null.
   */
  void *stream;
} AtkdSelection;

/*
 A row's sums, or those of the part that a shard has, with the target left out: 40 bytes that ranks exchange. With the
 exponents x_j = z_j log2(e) / T of the teacher's logits and y_j of the student's, X is the integer nearest to the exponent
 of teacher_max, and Y to that of student_max; where that is 2^18 or more in size, the exponent itself.
 */
typedef struct AtkdRowState {
  /*
   sum 2^(x_j - X)
   */
  float teacher_sum;
  /*
   sum 2^(y_j - Y)
   */
  float student_sum;
  /*
   This is student_sum at T = 1, if cross entropy needs it beside the other; else 0.
   */
  float student_sum_at_1;
  /*
   Forward KL: sum 2^(x_j - X) (x_j - X - y_j + Y) / 2^64, or infinity where the student rules out (-infinity) a token
   that the teacher does not. Reverse KL, with r the token of student_max: sum 2^(y_j - Y) (x_j - x_r - y_j + y_r) / 2^64,
   or -infinity where the teacher rules out what the student does not. Other divergences: 0.
   */
  float cross_term;
  /*
   The largest logit, or a little less; finite.
   */
  float teacher_max;
  /*
   Likewise.
   */
  float student_max;
  /*
   Reverse KL: the teacher's logit of token r; finite.
   */
  float teacher_reference;
  /*
   The logits of the target, where this part has it.
   */
  float teacher_target;
  /*
   Likewise.
   */
  float student_target;
  /*
   A token of the whole vocabulary, or -1: it is in another part, or the token is ignored.
   */
  int32_t target;
} AtkdRowState;

/*
 The sums of the second sweep over a part of a row. With p_j and q_j renormalised without the target, or plain over the
 whole vocabulary, and the mixture m of the divergence:
 */
typedef struct AtkdSweepTerms {
  /*
   A mixture: sum p_j log2(p_j / m_j). Total variation: sum |p_j - q_j|.
   */
  float teacher;
  /*
   A mixture: sum q_j log2(q_j / m_j). Total variation: sum q_j sign(q_j - p_j).
   */
  float student;
  /*
   A mixture whose KL divergences are skewed: sum q_j (p_j - q_j) / m_j; else 0.
   */
  float slope;
} AtkdSweepTerms;

/*
 One rank's shard of the vocabulary, and what the ranks have exchanged. Every pointer is to host memory, or for a CUDA
 workspace to its device's, but for those to this struct and to the call.
 */
typedef struct AtkdShard {
  /*
   The shard's columns of the tokens: `vocab` is how many, which may be 0, and the labels are tokens of the whole
   vocabulary. Nothing is selected: `hard` is needed where the objective depends on it, and sequences and margins are not
   used.
   */
  const struct AtkdCall *call;
  /*
   Tokens of the whole vocabulary.
   */
  int64_t whole_vocab;
  /*
   The token of the vocabulary that the first column is about.
   */
  int64_t first_column;
  /*
   Two numbers: the valid and the hard tokens of all ranks that the reduction is over; null for those of the call.
   */
  const uint32_t *counts;
  /*
   [ranks, tokens]: the states of all ranks, in the order of their columns, after they were exchanged.
   */
  const struct AtkdRowState *states;
  /*
   [ranks, tokens]: the second sweep's terms of all ranks, after they were exchanged; null if the divergence has none:
   ATKD_DIVERGENCE_FORWARD_KL and ATKD_DIVERGENCE_REVERSE_KL.
   */
  const struct AtkdSweepTerms *terms;
  /*
   Ranks of the vocabulary.
   */
  int64_t ranks;
} AtkdShard;

/*
 Done.
 */
#define ATKD_OK 0

/*
 An argument is wrong; the message says which, with its numbers.
 */
#define ATKD_INVALID_ARGUMENT 1

/*
 This build, or this machine, cannot do it.
 */
#define ATKD_NOT_SUPPORTED 2

/*
 The CUDA driver reported an error.
 */
#define ATKD_CUDA_ERROR 3

/*
 A bug in the library. What was written is undefined, the library remains usable.
 */
#define ATKD_PANIC 4

#ifdef __cplusplus
extern "C" {
#endif /* __cplusplus */

/*
 ATKD_ABI_VERSION of the library that is loaded. Other numbers mean another layout of the structs.
 */
uint32_t atkd_abi_version(void);

/*
 The error of this thread's last call that did not return ATKD_OK, with the numbers that
 explain it; empty if there was none. Valid until this thread's next failing call.
 */
const char *atkd_error_message(void);

/*
 The version of the library, such as "0.1.0".
 */
const char *atkd_version(void);

/*
 The paper's ATKD: lambda 0.2, hard ratio 0.5, temperature 1, labels as targets, ignore index -100,
 the mean over valid tokens, no cross entropy.
 */
struct AtkdSettings atkd_default_settings(void);

/*
 Checks the settings and makes an objective of them, to be destroyed by atkd_objective_destroy. On an error
 *objective is null.

 # Safety
 `settings` is null or points to settings, `objective` is null or has room for a pointer.
 */
AtkdStatus atkd_objective_create(const struct AtkdSettings *settings,
                                 struct AtkdObjective **objective);

/*
 Null is nothing to destroy.

 # Safety
 `objective` is null, or from atkd_objective_create and not yet destroyed, and no call uses it.
 */
void atkd_objective_destroy(struct AtkdObjective *objective);

/*
 A workspace for host memory, to be destroyed by atkd_workspace_destroy. A call is worked on by
 `threads` threads, at most ATKD_MAX_THREADS: the one that makes it, and others that the workspace's calls
 share. If `threads` is 0, by one a core, and all of the process shares the others. No call waits for a thread
 that is busy with something else. On an error *workspace is null.

 In the child of a fork a workspace for host memory can be used as in its parent, whatever the parent's
 threads were doing: atkd starts other threads there.

 # Safety
 `workspace` is null or has room for a pointer.
 */
AtkdStatus atkd_workspace_create(size_t threads,
                                 struct AtkdWorkspace **workspace);

/*
 A workspace for the memory of a CUDA device, in its primary context, to be destroyed by
 atkd_workspace_destroy once its calls are done. Calls may have up to `max_tokens` tokens, in up to as
 many sequences; they are put on a stream and not waited for. Calls that share a workspace must run one
 after the other: on one stream, or on streams that wait for each other.

 A label that names no token of the vocabulary is met by a kernel, which drops its token; the
 loss that the call leaves is NaN, and so are those of later calls until atkd_workspace_synchronize has
 returned the error.

 On an error of this function *workspace is null.

 # Safety
 `workspace` is null or has room for a pointer.
 */
AtkdStatus atkd_workspace_create_cuda(int32_t device,
                                      size_t max_tokens,
                                      struct AtkdWorkspace **workspace);

/*
 Waits for what is on the CUstream, and returns the error of a kernel, if there was one since the last
 time, or that the last call failed on its way and left no results. Nothing to wait for in host memory.

 # Safety
 `workspace` is null or a workspace, `stream` is null or a stream of its device, on which the last call
 was.
 */
AtkdStatus atkd_workspace_synchronize(struct AtkdWorkspace *workspace,
                                      void *stream);

/*
 Null is nothing to destroy.

 # Safety
 `workspace` is null, or from a function above and not yet destroyed, and no call uses it.
 */
void atkd_workspace_destroy(struct AtkdWorkspace *workspace);

/*
 The loss and each token's terms, without a gradient: call->gradient.data must be null.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_forward(const struct AtkdObjective *objective,
                        struct AtkdWorkspace *workspace,
                        const struct AtkdCall *call);

/*
 The loss, each token's terms, and the gradient with respect to the student's logits. It goes to
 call->gradient, of the student's dtype or float32, or of any dtype if the student's is float32, and over the
 student's logits if that names the very same matrix. On an error that is not ATKD_PANIC nothing was written.

 # Safety
 Each pointer is null or valid for what it is described to hold; until the call returns nobody else
 writes to what it reads, nor touches what it writes.
 */
AtkdStatus atkd_forward_backward(const struct AtkdObjective *objective,
                                 struct AtkdWorkspace *workspace,
                                 const struct AtkdCall *call);

/*
 The loss and each token's terms with a sparse teacher, without a gradient: call->teacher.data and call->gradient.data
 must be null. The margins, for atkd_select_hard, are call->margin. A CUDA workspace has no ATKD_TAIL_UNIFORM, and returns
 ATKD_NOT_SUPPORTED; its kernels find a teacher's values that are no distribution, as they do wrong labels: see
 atkd_workspace_create_cuda.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_sparse_forward(const struct AtkdObjective *objective,
                               struct AtkdWorkspace *workspace,
                               const struct AtkdCall *call,
                               const struct AtkdSparseTeacher *teacher);

/*
 The loss and each token's terms as atkd_sparse_forward has them, and the gradient as atkd_forward_backward writes it.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_sparse_forward_backward(const struct AtkdObjective *objective,
                                        struct AtkdWorkspace *workspace,
                                        const struct AtkdCall *call,
                                        const struct AtkdSparseTeacher *teacher);

/*
 The teacher's margins alone, to call->margin. Of the call, tokens, vocab, teacher, labels, temperatures and stream are
 read, and nothing else; of the objective its temperature, target and ignore index. On a device a token whose label is out
 of range gets NaN, beside the error of atkd_workspace_synchronize, and so does one whose temperature is.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_teacher_margins(const struct AtkdObjective *objective,
                                struct AtkdWorkspace *workspace,
                                const struct AtkdCall *call);

/*
 The entropy of one model's distribution for each token, to entropies->entropies: for selections and weights by how sure
 a model is. The workspace says where.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_token_entropies(struct AtkdWorkspace *workspace,
                                const struct AtkdEntropies *entropies);

/*
 Selects hard tokens by their margins, exactly as a call over all of these tokens would. On a device, sequences whose
 offsets are out of order get no hard tokens, beside the error of atkd_workspace_synchronize.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_select_hard(struct AtkdWorkspace *workspace,
                            const struct AtkdSelection *selection);

/*
 The states of the shard's part of each row, to `states`, [tokens]. A call on a shard of the vocabulary is: this; an exchange
 by the caller, to shard->states, the same on every rank; atkd_shard_margins and atkd_select_hard, over the tokens of all
 ranks if they are split, too; for a divergence of two sweeps atkd_shard_terms and a second exchange;
 atkd_shard_forward and atkd_shard_gradient. By ATKD_TARGET_TEACHER each rank leaves out its own arg max.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_shard_states(const struct AtkdObjective *objective,
                             struct AtkdWorkspace *workspace,
                             const struct AtkdShard *shard,
                             struct AtkdRowState *states);

/*
 The teacher's margins, to `margins`, [tokens], from the states of all ranks: the same bits on each.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_shard_margins(const struct AtkdObjective *objective,
                              struct AtkdWorkspace *workspace,
                              const struct AtkdShard *shard,
                              float *margins);

/*
 The terms of the second sweep over the shard's part of each row, to `terms`, [tokens]. It is an error for a divergence of
 one sweep.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_shard_terms(const struct AtkdObjective *objective,
                            struct AtkdWorkspace *workspace,
                            const struct AtkdShard *shard,
                            struct AtkdSweepTerms *terms);

/*
 The gradient of the shard's columns, to the call's gradient; over the student's logits if it is the same.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_shard_gradient(const struct AtkdObjective *objective,
                               struct AtkdWorkspace *workspace,
                               const struct AtkdShard *shard);

/*
 The loss of the tokens and the terms of each, to the call's outputs: the same bits on every rank of the vocabulary. With
 counts, the losses of the ranks of tokens add up.

 # Safety
 The contract of atkd_forward_backward holds.
 */
AtkdStatus atkd_shard_forward(const struct AtkdObjective *objective,
                              struct AtkdWorkspace *workspace,
                              const struct AtkdShard *shard);

#ifdef __cplusplus
}  /* extern "C" */
#endif  /* __cplusplus */

#endif  /* ATKD_H */
