// Which tokens are hard: the ceil(k * valid) of a scope with the largest keys, the lower index among
// equals. One block a scope. The key of the last hard token is found digit by digit, from the most
// significant: a histogram of the digit tells where the count is reached.
#include "batch.cuh"
#include "reduce.cuh"

namespace {

constexpr uint32_t DIGIT_BITS = 8;
constexpr uint32_t DIGITS = 1u << DIGIT_BITS;

// The block's sum, as seen by every thread.
template <class Counts> ATKD_DEVICE uint32_t block_sum(uint32_t value, Counts &counts) {
    uint32_t sum;
    ATKD_REDUCE_BLOCK(sum, value, Sum(), counts);
    return sum;
}

} // namespace

ATKD_KERNEL(select_hard, atkd_select_hard) {
    ATKD_SHARED(uint32_t, histogram, DIGITS);
    ATKD_SHARED(uint32_t, counts, MAX_WARPS);
    ATKD_SHARED(uint32_t, found, 2);

    uint32_t scope = block_index();
    int64_t start = load(p.offsets + scope), end = load(p.offsets + scope + 1);

    uint32_t own_valid = 0;
    for (int64_t token = start + thread_index(); token < end; token += block_threads()) {
        bool valid = p.keys != nullptr ? load(p.keys + token) != 0
                                       : target_of(p.batch, static_cast<uint32_t>(token)) != IGNORED_TARGET;
        own_valid += valid ? 1 : 0;
    }
    uint32_t valid = block_sum(own_valid, counts);
    double wanted_exactly = ceil(p.hard_ratio * double(valid));
    uint32_t wanted = wanted_exactly < double(valid) ? static_cast<uint32_t>(wanted_exactly) : valid;

    // The key of the last hard token, and how many of those with this very key are hard.
    uint32_t threshold = 0, of_equals = 0;
    if (p.keys != nullptr && wanted > 0) {
        uint32_t remaining = wanted;
        for (uint32_t shift = 32; shift > 0; shift -= DIGIT_BITS) {
            uint32_t low = shift - DIGIT_BITS;
            for (uint32_t digit = thread_index(); digit < DIGITS; digit += block_threads()) {
                histogram[digit] = 0;
            }
            ATKD_SYNC_BLOCK();
            for (int64_t token = start + thread_index(); token < end; token += block_threads()) {
                uint32_t key = load(p.keys + token);
                // Only keys that share the digits found so far.
                if (shift == 32 || key >> shift == threshold >> shift) {
                    ATKD_ADD_SHARED(histogram, key >> low & (DIGITS - 1), 1u);
                }
            }
            ATKD_SYNC_BLOCK();
            if (thread_index() == 0) {
                uint32_t digit = DIGITS - 1, above = 0;
                while (above + histogram[digit] < remaining) {
                    above += histogram[digit];
                    digit -= 1;
                }
                found[0] = digit;
                found[1] = remaining - above;
            }
            ATKD_SYNC_BLOCK();
            threshold |= found[0] << low;
            remaining = found[1];
            ATKD_SYNC_BLOCK();
        }
        of_equals = remaining;
    }

    // Tile by tile, so that equal keys are counted in the order of the tokens.
    uint32_t equals_before = 0;
    for (int64_t tile = start; tile < end; tile += block_threads()) {
        int64_t token = tile + thread_index();
        uint32_t key = 0;
        bool is_valid = false;
        if (token < end) {
            key = p.keys != nullptr ? load(p.keys + token) : 0;
            is_valid = p.keys != nullptr
                           ? key != 0
                           : target_of(p.batch, static_cast<uint32_t>(token)) != IGNORED_TARGET;
        }
        // Without keys the tokens of a scope are all equal, and the first of them are hard.
        bool equal = is_valid && key == threshold;
        uint32_t votes = warp_ballot(equal);
        ATKD_SYNC_BLOCK();
        if (thread_index() % WARP == 0) {
            counts[thread_index() / WARP] = count_bits(votes);
        }
        ATKD_SYNC_BLOCK();
        uint32_t rank = equals_before + count_bits(votes & ((1u << thread_index() % WARP) - 1));
        for (uint32_t warp = 0; warp < block_threads() / WARP; warp++) {
            rank += warp < thread_index() / WARP ? counts[warp] : 0;
            equals_before += counts[warp];
        }
        if (token < end) {
            uint32_t limit = p.keys != nullptr ? of_equals : wanted;
            bool is_hard = is_valid && (equal ? rank < limit : key > threshold) && wanted > 0;
            store(p.modes + token, static_cast<uint8_t>(!is_valid ? ATKD_IGNORED : is_hard ? ATKD_HARD : ATKD_EASY));
        }
    }
    if (thread_index() == 0) {
        store(p.thresholds + scope, threshold);
        add_atomic(p.valid, valid);
        add_atomic(p.hard, wanted);
    }
}
