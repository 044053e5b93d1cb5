// prepare_rows: runs between two launches of rows within a call. A repair takes rows that lie side by side, and so what
// kernels read of their tokens is brought side by side as well. A thread takes one of these tokens.
#include "batch.cuh"

ATKD_KERNEL(prepare_rows, atkd_prepare_rows, ATKD_COUNT) {
    if (block_index() == 0) {
        clear_states(p.states);
        if (thread_index() == 0) {
            store(&p.batch.summary->next_ticket, 0u);
        }
    }
    uint32_t i = block_index() * block_threads() + thread_index();
    if (i < p.count) {
        // Read before the temperature is stored there.
        uint32_t token = load(p.mispredicted + i);
        store(p.targets + i, target_of(p.batch, token));
        uint8_t group = load(p.batch.groups + token);
        store(p.groups + i, static_cast<uint8_t>(p.other_group != 0 ? ATKD_EASY + ATKD_HARD - group : group));
        if (p.batch.token_weights != nullptr) {
            store(p.token_weights + i, token_weight(p.batch, token));
        }
        if (p.batch.temperatures != nullptr) {
            store(p.temperatures + i, load(p.batch.temperatures + token));
        }
    }
}
