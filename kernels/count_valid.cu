// count_valid: counts the valid tokens, where no token's loss depends on the selection, or the caller has made it.
#include "batch.cuh"

ATKD_KERNEL(count_valid, atkd_count_valid, ATKD_COUNT) {
    uint32_t token = block_index() * block_threads() + thread_index();
    bool valid = token < p.batch.tokens && target_of(p.batch, token) != IGNORED_TARGET;
    bool hard = valid && (p.hard != nullptr ? load(p.hard + token) != 0 : p.valid_group == ATKD_HARD);
    if (token < p.batch.tokens) {
        store(p.batch.groups + token, static_cast<uint8_t>(!valid ? ATKD_IGNORED : hard ? ATKD_HARD : ATKD_EASY));
    }
    if (block_index() == 0) {
        clear_states(p.states);
        // Another stream's call may leave another one there before this call has ended.
        if (thread_index() == 0) {
            store(&p.batch.summary->predicted_threshold, load(p.kept_threshold));
        }
    }
    if (p.counts != nullptr) {
        if (block_index() == 0 && thread_index() == 0) {
            store(&p.batch.summary->counted_valid, load(p.counts));
            store(&p.batch.summary->counted_hard, load(p.counts + 1));
        }
        return;
    }
    uint32_t votes = warp_ballot(valid);
    if (thread_index() % WARP == 0 && votes != 0) {
        add_atomic(&p.batch.summary->counted_valid, count_bits(votes));
    }
    if (p.count_hard != 0) {
        uint32_t hard_votes = warp_ballot(hard);
        if (thread_index() % WARP == 0 && hard_votes != 0) {
            add_atomic(&p.batch.summary->counted_hard, count_bits(hard_votes));
        }
    }
}
