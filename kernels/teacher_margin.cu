// The teacher's margin of every token, as a sortable key; one read of the teacher's logits. Where the
// target is the teacher's arg max, it is found first, and the row's second read should hit the cache.
#include "batch.cuh"
#include "reduce.cuh"

namespace {

// The index of the largest logit, the lowest among equals; 0 if there is nothing but NaN and -inf.
template <class T, class Maxima, class Indices>
ATKD_DEVICE uint32_t arg_max(const Row<const T> &row, Maxima &maxima, Indices &indices) {
    float best = OUTSIDE;
    uint32_t index = 0xffffffffu;
    for (uint32_t chunk = thread_index(); chunk < row.chunks(); chunk += block_threads()) {
        float x[CHUNK];
        load_chunk(row, chunk, x);
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            if (x[k] > best) {
                best = x[k];
                index = chunk * CHUNK - row.lead + k;
            }
        }
    }
    float max;
    ATKD_REDUCE_BLOCK(max, best, Max(), maxima);
    uint32_t first;
    ATKD_REDUCE_BLOCK(first, best == max ? index : 0xffffffffu, Min(), indices);
    return first == 0xffffffffu ? 0 : first;
}

template <class T> ATKD_DEVICE void teacher_margin(const atkd_teacher_margin &p) {
    ATKD_SHARED(float, maxima, MAX_WARPS);
    ATKD_SHARED(double, sums, MAX_WARPS);
    ATKD_SHARED(uint32_t, indices, MAX_WARPS);

    // Chunks that a thread has on their way: as many as it takes to keep the memory busy.
    constexpr uint32_t AHEAD = 2 / Packed<T>::PARTS;
    Packed<T> next[AHEAD];
    uint32_t stride = block_threads();
    float exponent = p.batch.inverse_temperature * LOG2_E;
    auto row_of = [&](uint32_t token) {
        const T *data = static_cast<const T *>(p.batch.teacher) + int64_t(token) * p.batch.teacher_stride;
        return Row<const T>(data, p.batch.vocab, lead_of(data));
    };
    auto load_or_nothing = [](const Row<const T> &row, uint32_t chunk) {
        if (chunk >= row.chunks()) {
            return nothing<T>();
        }
        return load_packed(row, chunk);
    };
    // A token's label, and the first chunks of its row unless it is ignored, come while the one before is at work.
    auto label_or_none = [&](uint32_t token) {
        return token < p.batch.tokens ? label_of(p.batch, token) : IGNORED_TARGET;
    };
    auto begin = [&](uint32_t token, int32_t label) {
        if (label != IGNORED_TARGET) {
            Row<const T> row = row_of(token);
            ATKD_UNROLL
            for (uint32_t i = 0; i < AHEAD; i++) {
                next[i] = load_or_nothing(row, thread_index() + i * stride);
            }
        }
    };
    uint32_t token = block_index();
    int32_t label = label_or_none(token);
    begin(token, label);
    ATKD_NO_UNROLL
    while (token < p.batch.tokens) {
        uint32_t token_after = token + p.blocks;
        int32_t label_after = label_or_none(token_after);
        if (ATKD_RARELY(label == IGNORED_TARGET)) {
            if (thread_index() == 0) {
                store(p.batch.keys + token, 0u);
                if (p.batch.target == ATKD_TARGET_TEACHER) {
                    store(p.batch.targets + token, IGNORED_TARGET);
                }
            }
            begin(token_after, label_after);
        } else {
            Row<const T> row = row_of(token);
            uint32_t target = uint32_t(label);
            if (ATKD_RARELY(p.batch.target == ATKD_TARGET_TEACHER)) {
                target = arg_max(row, maxima, indices);
            }
            uint32_t chunks = row.chunks(), target_chunk = (target + row.lead) / CHUNK;
            auto without_target = [&](uint32_t chunk, Packed<T> &packed) {
                if (ATKD_RARELY(chunk == target_chunk)) {
                    take_out(target - (chunk * CHUNK - row.lead), packed);
                }
            };
            // A guess at the maximum, so that few chunks exceed it.
            Packed<T> guess = next[0];
            without_target(thread_index(), guess);
            float own_max = max_of_warp(max_of(guess)), own_reference = reference_of(own_max, exponent), own_sum = 0;
            ATKD_NO_UNROLL
            for (uint32_t start = thread_index(); start < chunks; start += AHEAD * stride) {
                ATKD_UNROLL
                for (uint32_t i = 0; i < AHEAD; i++) {
                    uint32_t chunk = start + i * stride;
                    Packed<T> packed = next[i];
                    next[i] = load_or_nothing(row, chunk + AHEAD * stride);
                    without_target(chunk, packed);
                    float x[CHUNK];
                    unpack(packed, x);
                    float sum = own_sum;
                    ATKD_UNROLL
                    for (uint32_t k = 0; k < CHUNK; k++) {
                        sum += exp2_fast(fmaf(x[k], exponent, -own_reference));
                    }
                    if (ATKD_RARELY(!(sum - own_sum < HEADROOM))) {
                        own_max = fmaxf(own_max, max_of(packed));
                        float reference = reference_of(own_max, exponent);
                        sum = own_sum * exp2_fast(own_reference - reference);
                        own_reference = reference;
                        ATKD_UNROLL
                        for (uint32_t k = 0; k < CHUNK; k++) {
                            sum += exp2_fast(fmaf(x[k], exponent, -reference));
                        }
                    }
                    own_sum = sum;
                }
            }
            begin(token_after, label_after);
            float max;
            ATKD_REDUCE_BLOCK(max, own_max, Max(), maxima);
            float reference = reference_of(max, exponent);
            double sum;
            ATKD_REDUCE_BLOCK(sum, double(own_sum) * double(exp2_fast(own_reference - reference)), Sum(), sums);
            if (thread_index() == 0) {
                float target_logit = widen(load(row.data + target));
                double log_sum = log(sum + correction_of(max, exponent));
                store(p.batch.keys + token, key_of(float(margin_of(log_sum, reference, target_logit, exponent))));
                if (p.batch.target == ATKD_TARGET_TEACHER) {
                    store(p.batch.targets + token, static_cast<int32_t>(target));
                }
            }
        }
        token = token_after;
        label = label_after;
    }
}

} // namespace

ATKD_KERNEL(teacher_margin_f32, atkd_teacher_margin, 256, 5) { teacher_margin<float>(p); }
ATKD_KERNEL(teacher_margin_f16, atkd_teacher_margin, 256, 5) { teacher_margin<f16>(p); }
ATKD_KERNEL(teacher_margin_bf16, atkd_teacher_margin, 256, 5) { teacher_margin<bf16>(p); }
