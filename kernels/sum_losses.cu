// The reduced loss, from the tokens' losses; one block, in fixed order. The last kernel of a call: it
// closes the summary and leaves its counters at 0 for the next.
#include "reduce.cuh"

ATKD_KERNEL(sum_losses, atkd_sum_losses, 1024, 1) {
    ATKD_SHARED(double, sums, MAX_WARPS);
    double own = 0;
    for (uint32_t token = thread_index(); token < p.tokens; token += block_threads()) {
        own += load(p.token_loss + token);
    }
    double sum;
    ATKD_REDUCE_BLOCK(sum, own, Sum(), sums);
    if (thread_index() == 0) {
        uint32_t valid = load(&p.summary->counted_valid);
        // Without a valid token the loss is 0, whatever the reduction.
        double loss = valid == 0 ? 0.0 : sum * p.scale / (p.mean != 0 ? double(valid) : 1.0);
        store(&p.summary->loss, loss);
        bool fault = load(&p.summary->label_fault) != ATKD_NO_FAULT || load(&p.summary->offset_fault) != ATKD_NO_FAULT;
        store(&p.summary->loss_f32, fault ? nanf("") : float(loss));
        store(&p.summary->valid, valid);
        store(&p.summary->hard, load(&p.summary->counted_hard));
        store(&p.summary->counted_valid, 0u);
        store(&p.summary->counted_hard, 0u);
        store(&p.summary->counted_wrong, 0u);
        store(&p.summary->drawn, 0u);
    }
}
