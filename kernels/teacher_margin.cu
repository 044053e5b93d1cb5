// teacher_margin: the teacher's margin of every token, as a sortable key, and as a number where the caller wants it. A
// persistent kernel: a block takes a row at a time, and reads the logits once, but for chunks that it must recompute at
// once. Where the target is the teacher's arg max, a pass before finds it; the second read should hit the cache.
//
// A row, per thread: the sum of its chunks' exponentials relative to a shift (ThreadSum), PREFETCH chunks loaded ahead;
// the last loads bring the next row's first chunks. Per warp: one sum, by shuffles. Per block: the warps' sums, by a
// merge that no warp waits for (DeferredMerge):
//
//   warp 0   | row 0's sum | post | row 1's sum | wait for all posts of row 0, merge them | post | row 2's sum | ..
//   warp 1   | row 0's sum | post | row 1's sum | wait for all posts of row 0             | post | row 2's sum | ..
//
// A block's barrier per row would make all warps wait for the slowest. Here a warp posts its sum of a row and goes
// on; one row later it waits until all have posted that row, which they mostly have, and one of them, another for
// each row, merges it.
#include "batch.cuh"
#include "math/keys.cuh"
#include "math/online.cuh"
#include "reduce.cuh"

namespace {

constexpr uint32_t MARGIN_WARPS = ATKD_MARGIN_THREADS / WARP;

// The chunks that a thread loads ahead, and goes through per iteration: as many as it takes to keep the memory busy.
template <class T> constexpr uint32_t PREFETCH = 2 / Packed<T>::PARTS;

// The sum of a warp's chunks of a token's row, relative to the shift of `max`.
struct alignas(16) WarpSum {
    float max, sum;
    uint32_t token, target;
};

template <class T> struct ThreadSum;
template <class T, class Sums, class Barriers> struct DeferredMerge;
template <class T> ATKD_DEVICE Row<const T> row_of(const atkd_batch &batch, uint32_t token);
template <class T> ATKD_DEVICE Packed<T> load_or_neg_inf(const Row<const T> &row, uint32_t chunk);
template <class T, class Maxima, class Indices>
ATKD_DEVICE uint32_t arg_max(const Row<const T> &row, Maxima &maxima, Indices &indices);
ATKD_DEVICE void store_ignored(const atkd_teacher_margin &p, uint32_t token);

template <class T> ATKD_DEVICE void teacher_margin(const atkd_teacher_margin &p) {
    ATKD_SHARED(float, maxima, MARGIN_WARPS);
    ATKD_SHARED(uint32_t, indices, MARGIN_WARPS);
    ATKD_SHARED(WarpSum, sums, 2 * MARGIN_WARPS);
    ATKD_SHARED(Barrier, posted, 1);

    uint32_t stride = block_threads();
    DeferredMerge<T, decltype(sums), decltype(posted)> merge(p, sums, posted);
    Packed<T> next[PREFETCH<T>];
    // A token's label, and the first chunks of its row unless it is ignored, come during the row before.
    auto fetch_label = [&](uint32_t token) {
        return token < p.batch.tokens ? label_of(p.batch, token) : IGNORED_TARGET;
    };
    auto fetch_row = [&](uint32_t token, int32_t label) {
        if (label != IGNORED_TARGET) {
            Row<const T> row = row_of<T>(p.batch, token);
            ATKD_UNROLL
            for (uint32_t i = 0; i < PREFETCH<T>; i++) {
                next[i] = load_or_neg_inf(row, thread_index() + i * stride);
            }
        }
    };
    if (thread_index() == 0) {
        // region: one warp per block
        ATKD_INIT_BARRIER(posted, 0, stride);
        // end region
    }
    ATKD_SYNC_BLOCK();
    uint32_t token = block_index();
    int32_t label = fetch_label(token);
    fetch_row(token, label);
    ATKD_NO_UNROLL
    while (token < p.batch.tokens) {
        uint32_t next_token = token + p.blocks;
        int32_t next_label = fetch_label(next_token);
        if (ATKD_RARELY(label == IGNORED_TARGET)) {
            if (thread_index() == 0) {
                store_ignored(p, token);
            }
            fetch_row(next_token, next_label);
        } else {
            Row<const T> row = row_of<T>(p.batch, token);
            uint32_t target = uint32_t(label);
            if (ATKD_RARELY(p.batch.target == ATKD_TARGET_TEACHER)) {
                target = arg_max(row, maxima, indices);
                if (thread_index() == 0) {
                    store(p.batch.targets + token, static_cast<int32_t>(target));
                }
            }
            ThreadSum<T> own(row, target, inverse_temperature_of(p.batch, token) * LOG2_E, next[0]);
            uint32_t start = thread_index(), full_end = row.first_full + row.full_count;
            // Iterations after which a whole iteration of full chunks follows.
            ATKD_NO_UNROLL
            for (; start + (2 * PREFETCH<T> - 1) * stride < full_end; start += PREFETCH<T> * stride) {
                auto load = [&](uint32_t i) { return load_full(row, start + (PREFETCH<T> + i) * stride); };
                own.iterate(start, stride, next, load);
            }
            // The last iteration loads the first chunks of the next row.
            uint32_t next_start;
            ATKD_NO_UNROLL
            do {
                next_start = start + PREFETCH<T> * stride;
                bool row_ends = next_start >= row.chunks() && next_label != IGNORED_TARGET;
                Row<const T> from = row_of<T>(p.batch, row_ends ? next_token : token);
                uint32_t first = row_ends ? thread_index() : next_start;
                auto load = [&](uint32_t i) { return load_or_neg_inf(from, first + i * stride); };
                own.iterate(start, stride, next, load);
                start = next_start;
            } while (start < row.chunks());
            merge.post(own.warp_sum(p.batch, token));
        }
        token = next_token;
        label = next_label;
    }
    merge.merge_posted();
}

// The index of the largest logit, the lowest among equals; 0 if there is nothing but NaN and -inf.
template <class T, class Maxima, class Indices>
ATKD_DEVICE uint32_t arg_max(const Row<const T> &row, Maxima &maxima, Indices &indices) {
    float best = NEG_INF;
    uint32_t index = 0xffffffffu;
    for (uint32_t chunk = thread_index(); chunk < row.chunks(); chunk += block_threads()) {
        float x[CHUNK];
        load_chunk(row, chunk, x);
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            if (x[k] > best) {
                best = x[k];
                index = chunk * CHUNK - row.head + k;
            }
        }
    }
    float max;
    ATKD_REDUCE_BLOCK(max, best, Max(), maxima);
    uint32_t first;
    ATKD_REDUCE_BLOCK(first, best == max ? index : 0xffffffffu, Min(), indices);
    return first == 0xffffffffu ? 0 : first;
}

// The results for an ignored token, or for one whose label is out of range.
ATKD_DEVICE void store_ignored(const atkd_teacher_margin &p, uint32_t token) {
    store(p.batch.keys + token, 0u);
    if (p.margins != nullptr) {
        bool ignored = given_label(p.batch, token) == p.batch.ignore_index;
        store(p.margins + token, ignored ? NEG_INF : nanf(""));
    }
    if (p.batch.target == ATKD_TARGET_TEACHER) {
        store(p.batch.targets + token, IGNORED_TARGET);
    }
}

// Loads a chunk, -inf outside the row and after its last chunk.
template <class T> ATKD_DEVICE Packed<T> load_or_neg_inf(const Row<const T> &row, uint32_t chunk) {
    if (chunk >= row.chunks()) {
        return all_neg_inf<T>();
    }
    return load_packed(row, chunk);
}

// The teacher's row, in chunks of which the first starts at a multiple of 128 bytes, so that a warp reads whole
// lines; it may end before the row.
template <class T> ATKD_DEVICE Row<const T> row_of(const atkd_batch &batch, uint32_t token) {
    // This is row_at without its branch, which takes registers beyond those of five blocks per multiprocessor.
    const atkd_strides &strides = batch.teacher_strides;
    uint32_t outer = uint32_t(uint64_t(token) * strides.inverse >> 32) >> strides.shift;
    int64_t start = int64_t(token) * strides.stride + int64_t(outer) * strides.skip;
    const T *data = static_cast<const T *>(batch.teacher) + start;
    return Row<const T>(data, batch.vocab, head_of(data, LINE));
}

// A lane's share of the sum of its warp's chunks of a row, relative to a maximum that none of them exceeds. Rows with a
// LARGE shift need it: so seldom that it goes by single elements, which take few registers.
template <class T>
ATKD_DEVICE float guarded_sum(const atkd_batch &batch, uint32_t token, uint32_t target, float max) {
    const T *data = teacher_row<T>(batch, token);
    float exponent = inverse_temperature_of(batch, token) * LOG2_E, sum = 0;
    Shift shift = Shift::of(max, exponent);
    uint32_t lane = thread_index() % WARP, head = head_of(data, LINE);
    ATKD_NO_UNROLL
    for (uint32_t start = (thread_index() - lane) * CHUNK; start < batch.vocab + head;
         start += block_threads() * CHUNK) {
        ATKD_NO_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            // Before the row it wraps, and is larger than any element's index.
            uint32_t element = start + k * WARP + lane - head;
            if (element < batch.vocab && element != target) {
                sum += exp2_fast(shift.exponent_of(widen(load(data + element)), exponent));
            }
        }
    }
    return sum;
}

// The sum over a thread's chunks of a row: sum 2^(z * exponent - shift), target left out. The shift is that of a large
// element; others may exceed it by up to 5.
template <class T> struct ThreadSum {
    Row<const T> row;
    uint32_t target;
    float exponent, max, shift, sum;

    // The shift is that of the largest of the warp's first chunks, so that few others exceed it.
    ATKD_DEVICE ThreadSum(const Row<const T> &row_, uint32_t target_, float exponent_, Packed<T> first)
        : row(row_), target(target_), exponent(exponent_), sum(0) {
        mask_target(thread_index(), first);
        max = fmaxf(max_of_warp(max_of(first)), LOWEST);
        shift = shift_of(max, exponent);
    }

    ATKD_DEVICE void mask_target(uint32_t chunk, Packed<T> &packed) const {
        if (ATKD_RARELY(chunk == row.chunk_of(target))) {
            mask_out(row.within(target, chunk), packed);
        }
    }

    ATKD_DEVICE void add(const Packed<T> &packed, float &to) const {
        float x[CHUNK];
        unpack(packed, x);
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            to += exp2_fast(fmaf(x[k], exponent, -shift));
        }
    }
    // Adds chunk `start` and those that follow it, which are in `next`, and loads those of the next iteration.
    template <class Load>
    ATKD_DEVICE void iterate(uint32_t start, uint32_t stride, Packed<T> (&next)[PREFETCH<T>], Load load) {
        float new_sum = sum;
        bool has_no_target = true;
        ATKD_UNROLL
        for (uint32_t i = 0; i < PREFETCH<T>; i++) {
            Packed<T> packed = next[i];
            next[i] = load(i);
            add(packed, new_sum);
            // The target's chunk is computed anew, which takes no register from iteration to iteration.
            has_no_target &= start + i * stride != row.chunk_of(opaque(target));
        }
        if (ATKD_RARELY(!has_no_target || !(new_sum - sum < PREFETCH<T> * HEADROOM))) {
            new_sum = recompute(start, stride);
        }
        sum = new_sum;
    }

    // Computes the iteration's sum again, from the cache, without the target and with a shift that none exceeds.
    ATKD_DEVICE float recompute(uint32_t start, uint32_t stride) {
        auto for_chunks = [&](auto f) {
            uint32_t end = start + PREFETCH<T> * stride < row.chunks() ? start + PREFETCH<T> * stride : row.chunks();
            ATKD_NO_UNROLL
            for (uint32_t chunk = start; chunk < end; chunk += stride) {
                Packed<T> packed = load_packed(row, chunk);
                mask_target(chunk, packed);
                f(packed);
            }
        };
        for_chunks([&](const Packed<T> &packed) { max = fmaxf(max, max_of(packed)); });
        float before = shift;
        shift = shift_of(max, exponent);
        float new_sum = sum * exp2_fast(before - shift);
        for_chunks([&](const Packed<T> &packed) { add(packed, new_sum); });
        return new_sum;
    }

    ATKD_DEVICE WarpSum warp_sum(const atkd_batch &batch, uint32_t token) const {
        float warp_max = max_of_warp(max);
        float all = reduce_warp(sum * exp2_fast(shift - shift_of(warp_max, exponent)), Sum());
        // A shift was LARGE, or the row has a NaN.
        if (ATKD_RARELY(all != all)) {
            all = reduce_warp(guarded_sum<T>(batch, opaque(token), target, warp_max), Sum());
        }
        return {warp_max, all, token, target};
    }
};

// The merge of the warps' sums of a row, one row later. `sums` has two slots per warp, used alternately; a phase of
// the mbarrier `posted`, at which all threads arrive, completes when all warps have posted a row. Row r's slots are
// written again for row r + 2, after the wait for row r + 1: its phase completes when the merger of row r has arrived
// for it, and so has read them. Rows are counted modulo twice the warps: their parity is their phase's and their
// slots', and row r is merged by warp r modulo the warps.
template <class T, class Sums, class Barriers> struct DeferredMerge {
    // Before the first row: no warp merges it, and to wait for its odd parity is to wait for the phase before the
    // barrier's first, which counts as completed.
    static constexpr uint32_t NO_ROW = 0xffffffffu;

    const atkd_teacher_margin &p;
    Sums &sums;
    Barriers &posted;
    uint32_t warps, warp, row; // row: the last that this warp has posted

    ATKD_DEVICE DeferredMerge(const atkd_teacher_margin &p_, Sums &sums_, Barriers &posted_)
        : p(p_), sums(sums_), posted(posted_), warps(block_threads() / WARP), warp(thread_index() / WARP), row(NO_ROW) {
    }

    ATKD_DEVICE void post(const WarpSum &sum) {
        merge_posted();
        row = row + 1 == 2 * warps ? 0 : row + 1;
        if (thread_index() % WARP == 0) {
            sums[row % 2 * MARGIN_WARPS + warp] = sum;
        }
        // By all lanes: each has read the sums that it merged.
        ATKD_ARRIVE(posted, 0);
    }

    // Waits until all warps have posted the last row, and merges it if it is this warp's turn.
    ATKD_DEVICE void merge_posted() {
        ATKD_WAIT(posted, 0, row % 2);
        uint32_t merger = row < warps ? row : row - warps;
        if (warp == merger) {
            // region: one warp per block
            merge(row % 2 * MARGIN_WARPS);
            // end region
        }
    }

    // From the sums of all warps to the token's key, by one of them.
    ATKD_DEVICE void merge(uint32_t at) {
        const atkd_batch &batch = p.batch;
        uint32_t lane = thread_index() % WARP;
        WarpSum part = sums[at + (lane < warps ? lane : 0)];
        float exponent = inverse_temperature_of(batch, part.token) * LOG2_E;
        float max = max_of_warp(part.max);
        double own = double(part.sum) * double(exp2_of_distance(distance(part.max, max, exponent)));
        double sum = reduce_warp(lane < warps ? own : 0, Sum());
        if (lane == 0) {
            float target = widen(load(teacher_row<T>(batch, part.token) + part.target));
            // Before the logarithm, which takes the most registers.
            double after = opaque(to_margin(max, target, exponent));
            double margin = log(opaque(sum + correction_of(max, exponent))) + after;
            store(batch.keys + part.token, key_of(float(margin)));
            if (p.margins != nullptr) {
                store(p.margins + part.token, float(margin));
            }
        }
    }
};

} // namespace

ATKD_KERNEL(teacher_margin_f32, atkd_teacher_margin, ATKD_MARGIN) { teacher_margin<float>(p); }
ATKD_KERNEL(teacher_margin_f16, atkd_teacher_margin, ATKD_MARGIN) { teacher_margin<f16>(p); }
ATKD_KERNEL(teacher_margin_bf16, atkd_teacher_margin, ATKD_MARGIN) { teacher_margin<bf16>(p); }
