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
    ATKD_SHARED(int32_t, shared_target, 1);

    uint32_t token = block_index();
    const T *data = static_cast<const T *>(p.batch.teacher) + int64_t(token) * p.batch.teacher_stride;
    Row<const T> row(data, p.batch.vocab, lead_of(data));
    if (thread_index() == 0) {
        shared_target[0] = label_of(p.batch, token);
    }
    ATKD_SYNC_BLOCK();
    int32_t target = shared_target[0];
    if (ATKD_RARELY(target == IGNORED_TARGET)) {
        if (thread_index() == 0) {
            store(p.batch.keys + token, 0u);
            if (p.batch.target == ATKD_TARGET_TEACHER) {
                store(p.batch.targets + token, IGNORED_TARGET);
            }
        }
        return;
    }
    if (ATKD_RARELY(p.batch.target == ATKD_TARGET_TEACHER)) {
        target = static_cast<int32_t>(arg_max(row, maxima, indices));
    }

    float exponent = p.batch.inverse_temperature * LOG2_E;
    uint32_t chunk = thread_index(), chunks = row.chunks(), target_chunk = (uint32_t(target) + row.lead) / CHUNK;
    auto without_target = [&](Packed<T> &packed) {
        if (ATKD_RARELY(chunk == target_chunk)) {
            take_out(uint32_t(target) - (chunk * CHUNK - row.lead), packed);
        }
    };
    Packed<T> next = nothing<T>();
    if (chunk < chunks) {
        next = load_packed(row, chunk);
    }
    // A guess at the maximum, so that few chunks exceed it.
    Packed<T> guess = next;
    without_target(guess);
    float own_max = max_of_warp(max_of(guess)), own_reference = reference_of(own_max, exponent), own_sum = 0;
    for (; chunk < chunks; chunk += block_threads()) {
        Packed<T> packed = next;
        // The next chunk is on its way while this one is added.
        if (chunk + block_threads() < chunks) {
            next = load_packed(row, chunk + block_threads());
        }
        without_target(packed);
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
    float max;
    ATKD_REDUCE_BLOCK(max, own_max, Max(), maxima);
    float reference = reference_of(max, exponent);
    double sum;
    ATKD_REDUCE_BLOCK(sum, double(own_sum) * double(exp2_fast(own_reference - reference)), Sum(), sums);
    if (thread_index() == 0) {
        float target_logit = widen(load(data + target));
        float margin = float(margin_of(log(sum + correction_of(max, exponent)), reference, target_logit, exponent));
        store(p.batch.keys + token, key_of(margin));
        if (p.batch.target == ATKD_TARGET_TEACHER) {
            store(p.batch.targets + token, target);
        }
    }
}

} // namespace

ATKD_KERNEL(teacher_margin_f32, atkd_teacher_margin, 384, 3) { teacher_margin<float>(p); }
ATKD_KERNEL(teacher_margin_f16, atkd_teacher_margin, 384, 3) { teacher_margin<f16>(p); }
ATKD_KERNEL(teacher_margin_bf16, atkd_teacher_margin, 384, 3) { teacher_margin<bf16>(p); }
