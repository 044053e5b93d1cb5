// token_entropies: the entropy of one model's distribution for each token, whose logits are read once.
//
// Relative to the row's largest logit, of exponent 0, the others have exponents x_j <= 0. With the sums over those others
//
//     rest = sum 2^(x_j)        weighted = sum 2^(x_j) x_j
//
// the entropy is log(1 + rest) - log(2) weighted / (1 + rest). Neither term is below 0, so that nothing cancels however
// sure the model is.
#include "math/online.cuh"
#include "reduce.cuh"

namespace {

// Chunks that a thread loads at once.
template <class T> constexpr uint32_t UNROLL = 4 / Packed<T>::PARTS;

// A part of a row: its largest logit, and the sums over the others.
struct Part {
    float max, rest, weighted;

    // Without the largest logit either, which is then one of whatever it is merged with.
    static ATKD_DEVICE Part empty() { return {LOWEST, -1, 0}; }

    // The sums relative to a larger logit, that of this part among them.
    ATKD_DEVICE Part relative_to(float larger, float exponent) const {
        float x = exponent_of(max, larger, exponent), power = exp2_fast(x);
        return {larger, power * (rest + 1), power * fmaf(x, rest + 1, weighted)};
    }

    ATKD_DEVICE Part merged_with(const Part &other, float exponent) const {
        float larger = fmaxf(max, other.max);
        // The part with the larger logit keeps its own rest, without that logit; the other's has its largest in it.
        Part a = relative_to(larger, exponent), b = other.relative_to(larger, exponent);
        return {larger, max == larger ? rest + b.rest : a.rest + other.rest, a.weighted + b.weighted};
    }

    // The exponent of a logit, at least one of which the power is 0, so that its product with that is 0 for -inf.
    static ATKD_DEVICE float exponent_of(float z, float max, float exponent) {
        return fmaxf((z - max) * exponent, -200.0f);
    }

    ATKD_DEVICE void add(float z, float exponent) {
        float x = (z - max) * exponent, power = exp2_fast(x);
        rest += power;
        weighted = fmaf(power, fmaxf(x, -200.0f), weighted);
    }

    template <class T> ATKD_DEVICE void add(const Packed<T> &packed, float exponent) {
        float z[CHUNK];
        unpack(packed, z);
        float chunk_max = max_of(packed);
        bool skips_max = false;
        if (ATKD_RARELY(chunk_max > max)) {
            *this = relative_to(chunk_max, exponent);
            skips_max = true;
        }
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            if (skips_max && z[k] == max) {
                skips_max = false;
            } else {
                add(z[k], exponent);
            }
        }
    }

    // NaN for a row with a NaN or +inf, and for one of -inf alone.
    ATKD_DEVICE float entropy() const {
        double all = 1 + double(rest);
        bool is_distribution = max < -NEG_INF && all > 0;
        return is_distribution ? float(log1p(double(rest)) - LN_2 * double(weighted) / all) : nanf("");
    }
};

template <class T> ATKD_DEVICE void token_entropies(const atkd_token_entropies &p) {
    ATKD_SHARED(Part, parts, ATKD_ENTROPY_THREADS / WARP);
    float exponent = p.inverse_temperature * LOG2_E;
    uint32_t lane = thread_index() % WARP, warps = block_threads() / WARP;
    ATKD_NO_UNROLL
    for (uint32_t token = block_index(); token < p.tokens; token += p.blocks) {
        const T *data = row_at(static_cast<const T *>(p.logits), p.strides, token);
        Row<const T> row(data, p.vocab, head_of(data, LINE));
        auto own = Part::empty();
        ATKD_NO_UNROLL
        for (uint32_t first = thread_index(); first < row.chunks(); first += UNROLL<T> * block_threads()) {
            Packed<T> packed[UNROLL<T>];
            ATKD_UNROLL
            for (uint32_t i = 0; i < UNROLL<T>; i++) {
                uint32_t chunk = first + i * block_threads();
                packed[i] = chunk < row.chunks() ? load_packed(row, chunk) : all_neg_inf<T>();
            }
            ATKD_UNROLL
            for (uint32_t i = 0; i < UNROLL<T>; i++) {
                own.add(packed[i], exponent);
            }
        }
        auto merge_warp = [&] {
            ATKD_NO_UNROLL
            for (uint32_t mask = WARP / 2; mask > 0; mask /= 2) {
                Part other = {shuffle_xor(own.max, mask), shuffle_xor(own.rest, mask), shuffle_xor(own.weighted, mask)};
                own = own.merged_with(other, exponent);
            }
        };
        merge_warp();
        // By now the first warp has read the parts of the row before.
        ATKD_SYNC_BLOCK();
        if (lane == 0) {
            parts[thread_index() / WARP] = own;
        }
        ATKD_SYNC_BLOCK();
        if (thread_index() < WARP) {
            own = lane < warps ? parts[lane] : Part::empty();
            merge_warp();
            if (lane == 0) {
                store(p.entropies + token, own.entropy());
            }
        }
    }
}

} // namespace

ATKD_KERNEL(token_entropies_f32, atkd_token_entropies, ATKD_ENTROPY) { token_entropies<float>(p); }
ATKD_KERNEL(token_entropies_f16, atkd_token_entropies, ATKD_ENTROPY) { token_entropies<f16>(p); }
ATKD_KERNEL(token_entropies_bf16, atkd_token_entropies, ATKD_ENTROPY) { token_entropies<bf16>(p); }
