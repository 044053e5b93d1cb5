// The terms of every token, from its row's margins and DKD, and the loss. One thread per token: beside the rows they
// would take a whole warp's time for one lane's work. The block that ends last adds up the sums of all, in fixed
// order, and ends the call: it closes the summary and leaves its counters at 0 for the next.
#include "math/divergences.cuh"
#include "reduce.cuh"

namespace {

template <class T> ATKD_DEVICE void store_if_wanted(T *to, uint32_t index, T value) {
    if (to != nullptr) {
        store(to + index, value);
    }
}

// The sum of the tokens' losses, of which group means are taken token by token.
ATKD_DEVICE void end_call(const atkd_token_terms &p, double sum) {
    atkd_summary *summary = p.batch.summary;
    uint32_t valid = load(&summary->counted_valid);
    // Without a valid token the loss is 0, whatever the reduction.
    double loss = valid == 0 ? 0.0 : sum * p.scale / (p.reduction == ATKD_MEAN ? double(valid) : 1.0);
    bool fault =
        load(&summary->label_fault) != 0 || load(&summary->offset_fault) != 0 || load(&summary->teacher_fault) != 0;
    float rounded = fault ? nanf("") : float(loss);
    store(&summary->loss, loss);
    store(&summary->loss_f32, rounded);
    store_if_wanted(p.reduced_loss_to, 0, rounded);
    store(&summary->valid, valid);
    store(&summary->hard, load(&summary->counted_hard));
    store(&summary->counted_valid, 0u);
    store(&summary->counted_hard, 0u);
    store(&summary->counted_mispredicted, 0u);
    store(&summary->next_ticket, 0u);
    store(&summary->summed, 0u);
}

template <class D> ATKD_DEVICE void token_terms(const atkd_token_terms &p) {
    ATKD_SHARED(double, sums, MAX_WARPS);
    double own = 0;
    // Counted by an earlier kernel; the last block clears them when all have read them.
    auto scales = ReductionScales::of(p.reduction, 1.0, load(&p.batch.summary->counted_valid),
                                      load(&p.batch.summary->counted_hard));
    ATKD_NO_UNROLL
    for (uint32_t token = block_index() * block_threads() + thread_index(); token < p.batch.tokens;
         token += p.blocks * block_threads()) {
        uint8_t group = load(p.batch.groups + token);
        // An ignored token has anything here, which is not used.
        float u = load(p.uncertainty + token);
        double w = double(load(p.tkd + token)) * GAP_UNIT, dkd = double(load(p.dkd + token)) * GAP_UNIT;
        double at_1 = p.objective.ce_weight != 0 ? load(p.loss + token) : 0;
        Terms terms = {0, 0, 0, 0, 0, 0};
        if (group != ATKD_IGNORED) {
            // A weight that is not finite becomes NaN: an infinite one would leave terms infinite that are to be NaN.
            float weight = token_weight(p.batch, token);
            double square = 1;
            if (p.objective.times_square != 0) {
                double temperature = load(p.batch.temperatures + token);
                square = temperature * temperature;
            }
            terms = terms_of<D>(p.objective, p.divergence, u, w, at_1, dkd, group == ATKD_HARD,
                                weight + (weight - weight), square);
        }
        store(p.uncertainty + token, float(terms.uncertainty));
        store(p.tkd + token, float(terms.tkd));
        store(p.dkd + token, float(terms.dkd));
        store(p.loss + token, terms.loss);
        store_if_wanted(p.uncertainty_to, token, float(terms.uncertainty));
        store_if_wanted(p.tkd_to, token, float(terms.tkd));
        store_if_wanted(p.dkd_to, token, float(terms.dkd));
        store_if_wanted(p.token_loss_to, token, float(terms.loss));
        store_if_wanted(p.margin_to, token, group == ATKD_IGNORED ? NEG_INF : u);
        store_if_wanted(p.groups_to, token, group);
        double of_group = group == ATKD_HARD ? scales.hard : scales.easy;
        own += p.reduction != ATKD_GROUP_MEAN ? terms.loss : terms.distillation * of_group + terms.ce * scales.ce;
    }
    double of_block;
    ATKD_REDUCE_BLOCK(of_block, own, Sum(), sums);
    if (thread_index() >= WARP) {
        return;
    }
    uint32_t lane = thread_index(), summed = 0;
    if (lane == 0) {
        store(p.sums + block_index(), of_block);
        summed = add_acquire_release(&p.batch.summary->summed, 1) + 1;
    }
    if (shuffle_from(summed, 0) < p.blocks) {
        return;
    }
    sync_warp();
    double sum = 0;
    for (uint32_t block = lane; block < p.blocks; block += WARP) {
        sum += load(p.sums + block);
    }
    sum = reduce_warp(sum, Sum());
    if (lane == 0) {
        end_call(p, sum);
    }
}

} // namespace

#define ATKD_TOKEN_TERMS(D, suffix, ...)                                                                               \
    ATKD_KERNEL(token_terms##suffix, atkd_token_terms, ATKD_TERMS) { token_terms<D>(p); }
ATKD_DIVERGENCES(ATKD_TOKEN_TERMS)
