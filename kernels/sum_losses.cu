// The reduced loss, from the tokens' losses; one block, in fixed order.
#include "reduce.cuh"

ATKD_KERNEL(sum_losses, atkd_sum_losses) {
    ATKD_SHARED(double, sums, MAX_WARPS);
    double own = 0;
    for (uint32_t token = thread_index(); token < p.tokens; token += block_threads()) {
        own += load(p.token_loss + token);
    }
    double sum;
    ATKD_REDUCE_BLOCK(sum, own, Sum(), sums);
    if (thread_index() == 0) {
        uint32_t valid = load(p.valid);
        // Without a valid token the loss is 0, whatever the reduction.
        store(p.loss, valid == 0 ? 0.0 : p.mean ? sum / double(valid) : sum * p.scale);
    }
}
