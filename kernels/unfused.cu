// A model of what the loss and its gradient cost in an eager framework: one kernel a step, each with a full-size
// float32 result. For benchmarks of time only, and no baseline of accuracy: the 1e-8 in every logarithm and quotient,
// by which the zeros at the target stay finite, is in no public implementation, and an error of percents at real
// vocabularies. The order of the steps is the host's (src/unfused/device.rs).
#include "batch.cuh"
#include "reduce.cuh"

namespace {

// out[i, j] = f(a[i, j], b[i, j], row[i], c); `b` and `row` may be null. One block a row.
template <class A, class Out, class F> ATKD_DEVICE void map(const atkd_unfused &p, F f) {
    uint32_t token = block_index();
    int64_t start = int64_t(token) * p.vocab;
    float row = p.row == nullptr ? 0.0f : load(p.row + token);
    for (uint32_t j = thread_index(); j < p.vocab; j += block_threads()) {
        float a = p.a == nullptr ? 0.0f : widen(load(static_cast<const A *>(p.a) + start + j));
        float b = p.b == nullptr ? 0.0f : load(p.b + start + j);
        store(static_cast<Out *>(p.out) + start + j, narrow<Out>(f(a, b, row, p.constant)));
    }
}

// out[i] = the reduction of row i of a.
template <class Op> ATKD_DEVICE void reduce(const atkd_unfused &p, float start_value, Op op) {
    ATKD_SHARED(float, scratch, MAX_WARPS);
    const float *a = static_cast<const float *>(p.a) + int64_t(block_index()) * p.vocab;
    float own = start_value;
    for (uint32_t j = thread_index(); j < p.vocab; j += block_threads()) {
        own = op(own, load(a + j));
    }
    float result;
    ATKD_REDUCE_BLOCK(result, own, op, scratch);
    if (thread_index() == 0) {
        store(static_cast<float *>(p.out) + block_index(), result);
    }
}

} // namespace

#define ATKD_UNFUSED_MAP(name, A, Out, expression)                                                                     \
    ATKD_KERNEL(unfused_##name, atkd_unfused, ATKD_UNFUSED) {                                                          \
        map<A, Out>(p, [](float a, float b, float row, float c) {                                                      \
            (void)a, (void)b, (void)row, (void)c;                                                                      \
            return expression;                                                                                         \
        });                                                                                                            \
    }

ATKD_UNFUSED_MAP(copy_f32, float, float, a)
ATKD_UNFUSED_MAP(widen_f16, f16, float, a)
ATKD_UNFUSED_MAP(widen_bf16, bf16, float, a)
ATKD_UNFUSED_MAP(narrow_f16, float, f16, a)
ATKD_UNFUSED_MAP(narrow_bf16, float, bf16, a)
ATKD_UNFUSED_MAP(fill, float, float, c)
ATKD_UNFUSED_MAP(exp_minus_row, float, float, expf(a - row))
ATKD_UNFUSED_MAP(over_row, float, float, a / (row + c))
ATKD_UNFUSED_MAP(times_row, float, float, a * row)
ATKD_UNFUSED_MAP(times, float, float, a * b)
ATKD_UNFUSED_MAP(minus, float, float, a - b)
ATKD_UNFUSED_MAP(over, float, float, a / (b + c))
ATKD_UNFUSED_MAP(log, float, float, logf(a + c))
// The derivative of b / (row + c) with respect to the row's number, times a.
ATKD_UNFUSED_MAP(over_row_slope, float, float, -a * b / ((row + c) * (row + c)))
ATKD_UNFUSED_MAP(times_minus_row, float, float, a * (b - row))

ATKD_KERNEL(unfused_max, atkd_unfused, ATKD_UNFUSED) { reduce(p, NEG_INF, Max()); }
ATKD_KERNEL(unfused_sum, atkd_unfused, ATKD_UNFUSED) { reduce(p, 0.0f, Sum()); }

// The few numbers of each token, with a thread each: what the target says.
ATKD_KERNEL(unfused_targets, atkd_unfused_tokens, ATKD_UNFUSED_TOKENS) {
    uint32_t token = block_index() * block_threads() + thread_index();
    if (token >= p.tokens) {
        return;
    }
    int64_t at = int64_t(token) * p.vocab + load(p.labels + token);
    float p_target = load(p.p + at), q_target = load(p.q + at);
    store(p.p_target + token, p_target);
    store(p.q_target + token, q_target);
    store(p.uncertainty + token, 1.0f - p_target);
    store(p.rest + token, 1.0f - q_target);
    store(p.mask + at, 0.0f);
}

// Losses, and the factor of DKD's gradient.
ATKD_KERNEL(unfused_losses, atkd_unfused_tokens, ATKD_UNFUSED_TOKENS) {
    uint32_t token = block_index() * block_threads() + thread_index();
    if (token >= p.tokens) {
        return;
    }
    bool hard = load(p.groups + token) == ATKD_HARD;
    float p_target = load(p.p_target + token), q_target = load(p.q_target + token), c = p.epsilon;
    float uncertainty = load(p.uncertainty + token), rest = load(p.rest + token);
    float tkd =
        p_target * (logf(p_target + c) - logf(q_target + c)) + uncertainty * (logf(uncertainty + c) - logf(rest + c));
    float c_tkd = hard ? p.hard : 0.0f, c_dkd = hard ? p.hard : p.easy;
    store(p.loss + token, (c_tkd * tkd + c_dkd * load(p.dkd + token)) * p.scale);
    store(p.factor + token, -c_dkd * p.scale);
}

// The target's part of the gradient with respect to q.
ATKD_KERNEL(unfused_target_gradient, atkd_unfused_tokens, ATKD_UNFUSED_TOKENS) {
    uint32_t token = block_index() * block_threads() + thread_index();
    if (token >= p.tokens) {
        return;
    }
    float c_tkd = load(p.groups + token) == ATKD_HARD ? p.hard : 0.0f;
    float slope = load(p.p_target + token) / (load(p.q_target + token) + p.epsilon) -
                  load(p.uncertainty + token) / (load(p.rest + token) + p.epsilon);
    int64_t at = int64_t(token) * p.vocab + load(p.labels + token);
    store(p.d_q + at, load(p.d_q + at) - c_tkd * p.scale * slope - load(p.d_rest + token));
}
