// The teacher's margin of every token, as a sortable key, and as a number where the caller wants it; one read of the
// teacher's logits, but for what is read again at once. Where the target is the teacher's arg max, it is found first; the
// row's second read should hit the cache.
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

// Chunks that a thread has on their way, and goes through in a turn: as many as it takes to keep the memory busy.
template <class T> constexpr uint32_t AHEAD = 2 / Packed<T>::PARTS;

// Nothing outside the row.
template <class T> ATKD_DEVICE Packed<T> load_or_nothing(const Row<const T> &row, uint32_t chunk) {
    if (chunk >= row.chunks()) {
        return nothing<T>();
    }
    return load_packed(row, chunk);
}

// What a thread's chunks of a row come to: sum 2^(z * exponent - reference), target left out. The reference is a large
// element's; others may exceed it by up to 5.
template <class T> struct ThreadSum {
    Row<const T> row;
    uint32_t target, target_chunk;
    float exponent, max, reference, sum;

    // With the largest of the warp's first chunks for a reference, so that few others exceed it.
    ATKD_DEVICE ThreadSum(const Row<const T> &row_, uint32_t target_, float exponent_, Packed<T> first)
        : row(row_), target(target_), target_chunk(row_.chunk_of(target_)), exponent(exponent_), sum(0) {
        take_target_out(thread_index(), first);
        max = fmaxf(max_of_warp(max_of(first)), LOWEST);
        reference = reference_of(max, exponent);
    }

    ATKD_DEVICE void take_target_out(uint32_t chunk, Packed<T> &packed) const {
        if (ATKD_RARELY(chunk == target_chunk)) {
            take_out(row.within(target, chunk), packed);
        }
    }

    ATKD_DEVICE void add(const Packed<T> &packed, float &to) const {
        float x[CHUNK];
        unpack(packed, x);
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            to += exp2_fast(fmaf(x[k], exponent, -reference));
        }
    }
    // Of chunk `start` and those that follow it, which are in `next`; loads those of the next turn.
    template <class Load>
    ATKD_DEVICE void turn(uint32_t start, uint32_t stride, Packed<T> (&next)[AHEAD<T>], Load load) {
        float with_turn = sum;
        bool as_it_is = true;
        ATKD_UNROLL
        for (uint32_t i = 0; i < AHEAD<T>; i++) {
            Packed<T> packed = next[i];
            next[i] = load(i);
            add(packed, with_turn);
            as_it_is &= start + i * stride != target_chunk;
        }
        if (ATKD_RARELY(!as_it_is || !(with_turn - sum < AHEAD<T> * HEADROOM))) {
            with_turn = once_more(start, stride);
        }
        sum = with_turn;
    }

    // The same from the cache, without the target and with a reference that none exceeds.
    ATKD_DEVICE float once_more(uint32_t start, uint32_t stride) {
        auto for_turn = [&](auto f) {
            uint32_t end = start + AHEAD<T> * stride < row.chunks() ? start + AHEAD<T> * stride : row.chunks();
            ATKD_NO_UNROLL
            for (uint32_t chunk = start; chunk < end; chunk += stride) {
                Packed<T> packed = load_packed(row, chunk);
                take_target_out(chunk, packed);
                f(packed);
            }
        };
        for_turn([&](const Packed<T> &packed) { max = fmaxf(max, max_of(packed)); });
        float before = reference;
        reference = reference_of(max, exponent);
        float with_turn = sum * exp2_fast(before - reference);
        for_turn([&](const Packed<T> &packed) { add(packed, with_turn); });
        return with_turn;
    }
};

// What a warp's chunks of a token's row come to, relative to the reference of `max`.
struct alignas(16) WarpSum {
    float max, sum;
    uint32_t token, target;
};

constexpr uint32_t MOST_WARPS = ATKD_MARGIN_THREADS / WARP;
// Before the first: of odd parity, and the barrier's phase before its first counts as over; and no warp's to merge.
constexpr uint32_t NO_ROW = 0xffffffffu;

// In chunks of which the first starts where a line does, so that a warp reads whole lines; it may end before the row.
template <class T> ATKD_DEVICE Row<const T> row_of(const atkd_batch &batch, uint32_t token) {
    // As row_at, but without its branch, which takes registers beyond those of five blocks a multiprocessor.
    const atkd_strides &strides = batch.teacher_strides;
    uint32_t outer = uint32_t(uint64_t(token) * strides.inverse >> 32) >> strides.shift;
    int64_t start = int64_t(token) * strides.stride + int64_t(outer) * strides.skip;
    const T *data = static_cast<const T *>(batch.teacher) + start;
    return Row<const T>(data, batch.vocab, lead_of(data, LINE));
}

// The lane's share of what its warp's chunks of a row come to, relative to a maximum that none of them exceeds. Rows with
// a LARGE reference need it: so seldom that it goes by single elements, which take few registers.
template <class T>
ATKD_DEVICE float sum_from(const atkd_batch &batch, uint32_t token, uint32_t target, float max) {
    const T *data = teacher_row<T>(batch, token);
    float exponent = batch.inverse_temperature * LOG2_E, sum = 0;
    Base base = Base::of(max, exponent);
    uint32_t lane = thread_index() % WARP, lead = lead_of(data, LINE);
    ATKD_NO_UNROLL
    for (uint32_t start = (thread_index() - lane) * CHUNK; start < batch.vocab + lead;
         start += block_threads() * CHUNK) {
        ATKD_NO_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            // Before the row it is larger than any.
            uint32_t element = start + k * WARP + lane - lead;
            if (element < batch.vocab && element != target) {
                sum += exp2_fast(base.exponent_of(widen(load(data + element)), exponent));
            }
        }
    }
    return sum;
}

// From the sums of all warps to the token's key, by one of them.
template <class T, class WarpSums>
ATKD_DEVICE void merge(const atkd_teacher_margin &p, const WarpSums &sums, uint32_t at) {
    const atkd_batch &batch = p.batch;
    uint32_t lane = thread_index() % WARP, warps = block_threads() / WARP;
    float exponent = batch.inverse_temperature * LOG2_E;
    WarpSum part = sums[at + (lane < warps ? lane : 0)];
    float max = max_of_warp(part.max);
    double own = double(part.sum) * double(exp2_of_distance(distance(part.max, max, exponent)));
    double sum = reduce_warp(lane < warps ? own : 0, Sum());
    if (lane == 0) {
        float target = widen(load(teacher_row<T>(batch, part.token) + part.target));
        // Before the logarithm, which takes the most registers.
        double after = forget(to_margin(max, target, exponent));
        double margin = log(forget(sum + correction_of(max, exponent))) + after;
        store(batch.keys + part.token, key_of(float(margin)));
        if (p.margins != nullptr) {
            store(p.margins + part.token, float(margin));
        }
    }
}

template <class T> ATKD_DEVICE void teacher_margin(const atkd_teacher_margin &p) {
    ATKD_SHARED(float, maxima, MOST_WARPS);
    ATKD_SHARED(uint32_t, indices, MOST_WARPS);
    // Of two rows. A third is posted when all warps have posted the second; the first was merged before that.
    ATKD_SHARED(WarpSum, sums, 2 * MOST_WARPS);
    ATKD_SHARED(Barrier, posted, 1);

    uint32_t stride = block_threads(), warps = stride / WARP, warp = thread_index() / WARP;
    Packed<T> next[AHEAD<T>];
    // A token's label, and the first chunks of its row unless it is ignored, come while the one before is at work.
    auto label_or_none = [&](uint32_t token) {
        return token < p.batch.tokens ? label_of(p.batch, token) : IGNORED_TARGET;
    };
    auto begin = [&](uint32_t token, int32_t label) {
        if (label != IGNORED_TARGET) {
            Row<const T> row = row_of<T>(p.batch, token);
            ATKD_UNROLL
            for (uint32_t i = 0; i < AHEAD<T>; i++) {
                next[i] = load_or_nothing(row, thread_index() + i * stride);
            }
        }
    };
    // A row's sums are merged when the warps are through with the next row, by each warp in turn: none waits but for
    // one that is a row behind. Rows are counted modulo twice the warps.
    uint32_t posted_row = NO_ROW;
    auto merge_posted = [&] {
        ATKD_WAIT(posted, 0, posted_row % 2);
        uint32_t merger = posted_row < warps ? posted_row : posted_row - warps;
        if (warp == merger) {
            // region: one warp per block
            merge<T>(p, sums, posted_row % 2 * MOST_WARPS);
            // end region
        }
    };
    if (thread_index() == 0) {
        // region: one warp per block
        ATKD_INIT_BARRIER(posted, 0, stride);
        // end region
    }
    ATKD_SYNC_BLOCK();
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
                if (p.margins != nullptr) {
                    bool ignored = given_label(p.batch, token) == p.batch.ignore_index;
                    store(p.margins + token, ignored ? OUTSIDE : nanf(""));
                }
                if (p.batch.target == ATKD_TARGET_TEACHER) {
                    store(p.batch.targets + token, IGNORED_TARGET);
                }
            }
            begin(token_after, label_after);
        } else {
            Row<const T> row = row_of<T>(p.batch, token);
            uint32_t target = uint32_t(label);
            if (ATKD_RARELY(p.batch.target == ATKD_TARGET_TEACHER)) {
                target = arg_max(row, maxima, indices);
                if (thread_index() == 0) {
                    store(p.batch.targets + token, static_cast<int32_t>(target));
                }
            }
            ThreadSum<T> own(row, target, p.batch.inverse_temperature * LOG2_E, next[0]);
            uint32_t start = thread_index(), whole_end = row.first_whole + row.wholes;
            // As long as all of the next turn is whole.
            ATKD_NO_UNROLL
            for (; start + (2 * AHEAD<T> - 1) * stride < whole_end; start += AHEAD<T> * stride) {
                auto load = [&](uint32_t i) { return load_whole(row, start + (AHEAD<T> + i) * stride); };
                own.turn(start, stride, next, load);
            }
            // The last turn brings the first chunks of the next row.
            uint32_t start_after;
            ATKD_NO_UNROLL
            do {
                start_after = start + AHEAD<T> * stride;
                bool begins = start_after >= row.chunks() && label_after != IGNORED_TARGET;
                Row<const T> from = row_of<T>(p.batch, begins ? token_after : token);
                uint32_t first = begins ? thread_index() : start_after;
                auto load = [&](uint32_t i) { return load_or_nothing(from, first + i * stride); };
                own.turn(start, stride, next, load);
                start = start_after;
            } while (start < row.chunks());
            float max = max_of_warp(own.max);
            float sum = reduce_warp(own.sum * exp2_fast(own.reference - reference_of(max, own.exponent)), Sum());
            // A reference was LARGE, or the row has a NaN.
            if (ATKD_RARELY(sum != sum)) {
                sum = reduce_warp(sum_from<T>(p.batch, forget(token), target, max), Sum());
            }
            merge_posted();
            posted_row = posted_row + 1 == 2 * warps ? 0 : posted_row + 1;
            if (thread_index() % WARP == 0) {
                sums[posted_row % 2 * MOST_WARPS + warp] = WarpSum{max, sum, token, target};
            }
            // All lanes: each has read what it merged.
            ATKD_ARRIVE(posted, 0);
        }
        token = token_after;
        label = label_after;
    }
    merge_posted();
}

} // namespace

ATKD_KERNEL(teacher_margin_f32, atkd_teacher_margin, ATKD_MARGIN) { teacher_margin<float>(p); }
ATKD_KERNEL(teacher_margin_f16, atkd_teacher_margin, ATKD_MARGIN) { teacher_margin<f16>(p); }
ATKD_KERNEL(teacher_margin_bf16, atkd_teacher_margin, ATKD_MARGIN) { teacher_margin<bf16>(p); }
