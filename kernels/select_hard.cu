// select_hard: the hard tokens of a scope are the ceil(k * valid) with the largest keys, the lower index first among
// equals; or, by the median, all with keys from the lower median on. One cluster per scope, each block of it with a share
// of the tokens. A radix select finds the threshold, the key of the last hard token, digit by digit from the most
// significant: the histogram of a digit shows where the count is reached.
#include "batch.cuh"
#include "math/groups.cuh"
#include "math/keys.cuh"
#include "reduce.cuh"

namespace {

constexpr uint32_t DIGIT_BITS = 8;
constexpr uint32_t DIGITS = 1u << DIGIT_BITS;

// The next digit of the threshold and what was found with it, for all threads of the block.
enum Found { DIGIT, REMAINING, EQUALS, VALID, WANTED, FOUND_FIELDS };

ATKD_DEVICE uint32_t lanemask_lt() { return (1u << thread_index() % WARP) - 1; }

// The key of a token when it is read first; where the caller gave margins, it is made from them.
ATKD_DEVICE uint32_t first_key(const atkd_select_hard &p, uint32_t token) {
    if (p.margins == nullptr) {
        return load(p.batch.keys + token);
    }
    bool valid = p.valid != nullptr ? load(p.valid + token) != 0 : target_of(p.batch, token) != IGNORED_TARGET;
    uint32_t key = valid ? key_of(load(p.margins + token)) : 0;
    store(p.batch.keys + token, key);
    return key;
}

// Finds the digit at which the `remaining` largest are reached, by one warp. Keys with larger digits are hard.
template <class Counts, class Fields>
ATKD_DEVICE void find_digit(const Counts &merged, uint32_t remaining, Fields &found) {
    constexpr uint32_t PER = DIGITS / WARP;
    uint32_t lane = thread_index() % WARP, own = 0;
    for (uint32_t k = 0; k < PER; k++) {
        own += merged[lane * PER + k];
    }
    // The count of the keys with this lane's digits or larger ones.
    uint32_t at_or_above = own;
    for (uint32_t step = 1; step < WARP; step *= 2) {
        uint32_t other = shuffle_from(at_or_above, lane + step);
        at_or_above += lane + step < WARP ? other : 0;
    }
    uint32_t above = at_or_above - own;
    if (above < remaining && remaining <= at_or_above) {
        uint32_t digit = lane * PER + PER - 1;
        while (above + merged[digit] < remaining) {
            above += merged[digit];
            digit -= 1;
        }
        found[DIGIT] = digit;
        found[REMAINING] = remaining - above;
        found[EQUALS] = merged[digit];
    }
}

} // namespace

ATKD_KERNEL(select_hard, atkd_select_hard, ATKD_SELECT) {
    // Two, used alternately: one may be read by other blocks while the next digit is counted in the other.
    ATKD_SHARED(uint32_t, histograms, 2 * DIGITS);
    ATKD_SHARED(uint32_t, merged, DIGITS);
    ATKD_SHARED(uint32_t, counts, MAX_WARPS);
    ATKD_SHARED(uint32_t, found, FOUND_FIELDS);

    if (block_index() == 0) {
        clear_states(p.states);
    }
    uint32_t blocks = cluster_blocks(), rank = cluster_rank(), scope = block_index() / blocks;
    uint32_t start = 0, end = p.batch.tokens;
    if (p.offsets != nullptr) {
        int64_t from = load(p.offsets + scope), to = load(p.offsets + scope + 1), tokens = p.batch.tokens;
        // The first starts at 0 and the last ends at N; each starts where the one before it ends.
        if (from < 0 || from > to || to > tokens || (scope == 0 && from != 0) ||
            (scope == p.scopes - 1 && to != tokens)) {
            max_atomic(&p.batch.summary->offset_fault, ~uint64_t(scope));
            from = to = 0;
        }
        start = static_cast<uint32_t>(from);
        end = static_cast<uint32_t>(to);
    }
    // This block's share.
    uint32_t share = (end - start + blocks - 1) / blocks;
    start = rank * share < end - start ? start + rank * share : end;
    end = share < end - start ? start + share : end;

    // The first of a thread's tokens has a register for its key: mostly there is no other.
    uint32_t own = start + thread_index(), own_key = own < end ? first_key(p, own) : 0;
    // The key of the last hard token, and how many of those with this very key are hard.
    uint32_t threshold = 0, remaining = 0, equals = 0, equals_before = 0;
    // Hard tokens beside those that were wanted: they equal the median.
    uint32_t more = 0;
    for (uint32_t low = 32 - DIGIT_BITS, histogram = 0;; low -= DIGIT_BITS, histogram ^= DIGITS) {
        bool first = low + DIGIT_BITS == 32;
        for (uint32_t digit = thread_index(); digit < DIGITS; digit += block_threads()) {
            histograms[histogram + digit] = 0;
        }
        ATKD_SYNC_BLOCK();
        for (uint32_t tile = start; tile < end; tile += block_threads()) {
            uint32_t token = tile + thread_index(), digit = DIGITS;
            if (token < end) {
                uint32_t key = token == own ? own_key : first ? first_key(p, token) : load(p.batch.keys + token);
                // Only keys that share the digits found so far.
                if (key != 0 && (first || key >> (low + DIGIT_BITS) == threshold >> (low + DIGIT_BITS))) {
                    digit = key >> low & (DIGITS - 1);
                }
            }
            // Margins agree in most of their first digits: one lane counts for all with the same.
            uint32_t peers = warp_match(digit);
            if (digit != DIGITS && (peers & lanemask_lt()) == 0) {
                ATKD_ADD_SHARED(histograms, histogram + digit, count_bits(peers));
            }
        }
        ATKD_SYNC_CLUSTER();
        for (uint32_t digit = thread_index(); digit < DIGITS; digit += block_threads()) {
            uint32_t sum = 0;
            for (uint32_t block = 0; block < blocks; block++) {
                sum += ATKD_REMOTE(histograms, histogram + digit, block);
            }
            merged[digit] = sum;
        }
        ATKD_SYNC_BLOCK();
        if (thread_index() < WARP) {
            if (first) {
                uint32_t own = 0;
                for (uint32_t digit = thread_index(); digit < DIGITS; digit += WARP) {
                    own += merged[digit];
                }
                uint32_t valid = reduce_warp(own, Sum());
                // The lower median is the key number valid / 2 + 1 from above.
                uint32_t to_median = valid == 0 ? 0 : valid / 2 + 1;
                remaining = p.rule == ATKD_MEDIAN ? to_median : hard_count(p.hard_ratio, valid);
                if (thread_index() == 0) {
                    found[VALID] = valid;
                    found[WANTED] = remaining;
                }
            }
            if (remaining > 0) {
                find_digit(merged, remaining, found);
            }
        }
        ATKD_SYNC_BLOCK();
        if (found[WANTED] == 0) {
            break;
        }
        threshold |= found[DIGIT] << low;
        remaining = found[REMAINING];
        equals = found[EQUALS];
        if (low == 0) {
            if (p.rule == ATKD_MEDIAN) {
                more = equals - remaining;
                remaining = equals;
            }
            // Only if it will be used: a read that nobody uses could outlast the block that is read.
            for (uint32_t block = 0; remaining < equals && start < end && block < rank; block++) {
                equals_before += ATKD_REMOTE(histograms, histogram + (threshold & (DIGITS - 1)), block);
            }
            break;
        }
    }

    for (uint32_t tile = start; tile < end; tile += block_threads()) {
        uint32_t token = tile + thread_index();
        uint32_t key = token >= end ? 0 : token == own ? own_key : load(p.batch.keys + token);
        bool hard = threshold != 0 && key >= threshold;
        // Seldom are there more equal keys than hard tokens among them: then their order counts.
        if (remaining < equals) {
            bool equal = hard && key == threshold;
            uint32_t votes = warp_ballot(equal);
            ATKD_SYNC_BLOCK();
            if (thread_index() % WARP == 0) {
                counts[thread_index() / WARP] = count_bits(votes);
            }
            ATKD_SYNC_BLOCK();
            uint32_t place = equals_before + count_bits(votes & lanemask_lt());
            for (uint32_t warp = 0; warp < block_threads() / WARP; warp++) {
                place += warp < thread_index() / WARP ? counts[warp] : 0;
                equals_before += counts[warp];
            }
            hard = hard && !(equal && place >= remaining);
        }
        uint8_t group = static_cast<uint8_t>(key == 0 ? ATKD_IGNORED : hard ? ATKD_HARD : ATKD_EASY);
        bool other = p.mispredicted != nullptr && token < end && load(p.batch.groups + token) != group;
        uint32_t votes = warp_ballot(other), place = 0;
        if (thread_index() % WARP == 0 && votes != 0) {
            place = add_atomic(&p.batch.summary->counted_mispredicted, count_bits(votes));
        }
        place = shuffle_from(place, 0) + count_bits(votes & lanemask_lt());
        // Scopes out of order may overlap, and list a token more than once.
        if (other && place < p.batch.tokens) {
            store(p.mispredicted + place, token);
        }
        if (token < end) {
            store(p.batch.groups + token, group);
            if (p.hard_to != nullptr) {
                store(p.hard_to + token, static_cast<uint8_t>(group == ATKD_HARD));
            }
        }
    }
    if (rank == 0 && thread_index() == 0 && p.kept_threshold != nullptr) {
        if (scope == 0) {
            store(p.kept_threshold, threshold);
            // For the repair pass.
            store(&p.batch.summary->next_ticket, 0u);
        }
        add_atomic(&p.batch.summary->counted_hard, uint32_t(found[WANTED]) + more);
        if (p.count != 0) {
            add_atomic(&p.batch.summary->counted_valid, uint32_t(found[VALID]));
        }
    }
    // No block ends while another may read its histogram.
    ATKD_SYNC_CLUSTER();
}
