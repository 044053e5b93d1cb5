// The terms of every token, from what its row came to. A thread a token: beside the rows they would take a whole
// warp's time for one lane's work.
#include "batch.cuh"
#include "row_math.cuh"

ATKD_KERNEL(token_terms, atkd_token_terms, 256, 2) {
    uint32_t token = block_index() * block_threads() + thread_index();
    if (token >= p.batch.tokens) {
        return;
    }
    uint8_t mode = load(p.batch.modes + token);
    Terms terms = {0, 0, 0, 0};
    if (mode != ATKD_IGNORED && target_of(p.batch, token) != IGNORED_TARGET) {
        double at_1 = p.objective.ce_weight != 0 ? load(p.loss + token) : 0;
        terms = terms_of(p.objective, load(p.uncertainty + token), load(p.tkd + token), at_1, load(p.dkd + token),
                         mode == ATKD_HARD);
    }
    store(p.uncertainty + token, float(terms.uncertainty));
    store(p.tkd + token, float(terms.tkd));
    store(p.dkd + token, float(terms.dkd));
    store(p.loss + token, terms.loss);
}
