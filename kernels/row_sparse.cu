// row_sparse: loss and gradient by a teacher of which up to K log-probabilities are known for each token (sparse.cuh). A
// cluster takes one token at a time, and its shared memory holds the student's row: each logit is read once, but for those
// of a row that is longer than a cluster has room for, and the gradient is written once.
//
// To the teacher all tokens that it does not know are one class: by ATKD_TAIL_BUCKET that is the definition, and by
// ATKD_TAIL_ZERO and ATKD_TAIL_SAMPLED no divergence tells tokens without a probability from each other. So a row has
// K + 2 classes, the known tokens, the target and the rest, whose logit is the log-sum-exp of the rest's, and the
// mathematics of any other row is the first block's. The gradient of a token of the rest is the class's times the token's
// share of it.
//
//   all blocks   | the row without the known tokens | sums of the rest |             | gradient of the rest, of the known
//   first block  | the logits of the classes        |                  | the classes |
#include "math/divergences.cuh"
#include "row.cuh"
#include "sparse.cuh"

namespace {

// The state of the rest, of which the student's sums are used alone.
struct OfRest {
    static constexpr CrossTerm CROSS = NO_CROSS_TERM;
    template <class Real> using State = RowSums<Real, CROSS>;
};

// Chunks of a row that are in shared memory. Known tokens are -inf there.
template <class Q> struct SparseTile {
    Row<const Q> row;
    StagedMemory memory;
    uint32_t first, end;

    // The byte at which an element of the row lies, if it is in one of the chunks.
    ATKD_DEVICE uint32_t offset_of(uint32_t element) const {
        return (element + row.head - first * CHUNK) * static_cast<uint32_t>(sizeof(Q));
    }
    ATKD_DEVICE bool has(uint32_t element) const {
        return element != NO_COLUMN && row.chunk_of(element) - first < end - first;
    }
    ATKD_DEVICE Packed<Q> load(uint32_t chunk) const {
        Packed<Q> packed = {};
        ATKD_UNROLL
        for (uint32_t i = 0; i < Packed<Q>::PARTS; i++) {
            packed.part[i] = load_staged(memory, ((chunk - first) * Packed<Q>::PARTS + i) * 16);
        }
        return packed;
    }

    // Begins to bring the chunks, 16 bytes by a thread in turn.
    ATKD_DEVICE void begin() const {
        constexpr uint32_t PER = Packed<Q>::PER, PARTS = Packed<Q>::PARTS;
        ATKD_NO_UNROLL
        for (uint32_t i = thread_index(); i < (end - first) * PARTS; i += block_threads()) {
            if (ATKD_RARELY(!row.full(first + i / PARTS))) {
                ATKD_NO_UNROLL
                for (uint32_t k = 0; k < PER; k++) {
                    uint32_t j = first * CHUNK + i * PER + k - row.head;
                    Q z = j < row.vocab ? ::load(row.data + j) : narrow<Q>(NEG_INF);
                    store_staged_element<Q>(memory, i * 16 + k * static_cast<uint32_t>(sizeof(Q)), z);
                }
            } else {
                copy_async(memory, i * 16, row.at(first) + i * PER);
            }
        }
    }

    // Calls f(place, token) for the known tokens in it, of which `columns` has so many.
    template <class Columns, class F> ATKD_DEVICE void for_known(const Columns &columns, uint32_t count, F f) const {
        ATKD_NO_UNROLL
        for (uint32_t k = thread_index(); k < count; k += block_threads()) {
            uint32_t column = columns[k];
            if (has(column)) {
                f(k, column);
            }
        }
    }

    // Ends what begin() began, and makes known tokens -inf. Returns whether one that the thread has is known twice.
    template <class Columns> ATKD_DEVICE bool end_without(const Columns &columns, uint32_t count) const {
        wait_for_copies();
        ATKD_SYNC_BLOCK();
        // Each puts its number there: of two that know the same token, one will not find its own.
        for_known(columns, count, [&](uint32_t k, uint32_t column) {
            store_staged_element(memory, offset_of(column), from_bits<Q>(k));
        });
        ATKD_SYNC_BLOCK();
        bool twice = false;
        for_known(columns, count, [&](uint32_t k, uint32_t column) {
            twice |= to_bits(load_staged_element<Q>(memory, offset_of(column))) != k;
        });
        ATKD_SYNC_BLOCK();
        for_known(columns, count, [&](uint32_t, uint32_t column) {
            store_staged_element(memory, offset_of(column), narrow<Q>(NEG_INF));
        });
        ATKD_SYNC_BLOCK();
        return twice;
    }
};

// The part of a row that is a block's, in tiles of so many chunks as there is room for.
template <class Q> struct SparseSlice {
    Row<const Q> row;
    StagedMemory memory;
    uint32_t first, end;

    ATKD_DEVICE SparseSlice(const atkd_rows &p, uint32_t token, StagedMemory staged)
        : row(student_row<Q>(p, token), p.batch.vocab, head_of(student_row<Q>(p, token))), memory(staged) {
        uint32_t chunks = row.chunks(), of_block = (chunks + cluster_blocks() - 1) / cluster_blocks();
        first = cluster_rank() * of_block;
        first = first < chunks ? first : chunks;
        end = first + of_block < chunks ? first + of_block : chunks;
    }
    ATKD_DEVICE SparseTile<Q> whole() const { return {row, memory, first, end}; }
    ATKD_DEVICE SparseTile<Q> tile(const atkd_rows &p, uint32_t i) const {
        uint32_t start = first + i * p.slice;
        return {row, memory, start, start + p.slice < end ? start + p.slice : end};
    }
    // One at least.
    ATKD_DEVICE uint32_t tiles(const atkd_rows &p) const {
        return first == end ? 1 : (end - first + p.slice - 1) / p.slice;
    }
};

// What a warp of the first block has seen of the known tokens off the target.
struct KnownLogits {
    float highest, lowest; // finite logits, or -inf and +inf for none
    uint32_t count;
};

// The frame of the classes: their logits are relative to one near the largest off the target, lest that of the rest be
// rounded to the digits of large ones. It is base + above; those of cross entropy are relative to `top`.
struct alignas(16) ClassFrame {
    double above;
    // Of the rest: sums that are not corrected for the maximum, the first relative to its shift, the second to `top`.
    double sum, sum_at_1, correction_at_1;
    double moved_at_1; // what an exponential at temperature 1 relative to its shift is times, to be so to `top`
    float base, top, max;
    float teacher, student; // its logits as a class
    float target;           // the student's logit of the target, as it is given
    float reference;        // the teacher's log-probability that its logits are relative to
    TargetLogits targets;   // in the frame
    uint32_t tokens;

    ATKD_DEVICE float logit(float z) const { return float((double(z) - double(base)) - above); }
    ATKD_DEVICE float power_at_1(float z) const { return exp2_fast((z - top) * LOG2_E); }
};

ATKD_DEVICE ClassFrame frame_of(const RowState<OfRest, double> &rest, const KnownLogits &known, float target,
                                float exponent) {
    ClassFrame frame = {};
    frame.target = target;
    frame.max = rest.student_max;
    frame.sum = rest.student_sum;
    double sum = rest.student_sum == 0 ? 0 : rest.student_sum + correction_of(rest.student_max, exponent);
    Shift shift = Shift::of(rest.student_max, exponent);
    // How much larger the logit of the class is than that of its likeliest token.
    double above = (double(shift.logit_shift) - double(rest.student_max)) +
                   (log(sum) / LN_2 + double(shift.exponent_shift)) / double(exponent);
    bool is_top = above > double(known.highest) - double(rest.student_max);
    frame.base = is_top ? rest.student_max : known.highest == NEG_INF ? 0 : known.highest;
    frame.above = is_top ? above : 0;
    float lowest = fminf(known.lowest, sum == 0 ? -NEG_INF : rest.student_max);
    lowest = fminf(lowest, target == NEG_INF ? -NEG_INF : target);
    double from = double(frame.base) + frame.above;
    // Differences that are not finite would be those of tokens that are ruled out.
    if (double(lowest) - from < double(LOWEST) || double(target) - from > -double(LOWEST)) {
        frame.base = 0;
        frame.above = 0;
    }
    frame.student = sum == 0 ? NEG_INF : float((double(rest.student_max) - double(frame.base)) + (above - frame.above));

    frame.top = fmaxf(fmaxf(known.highest, rest.student_sum_at_1 == 0 ? NEG_INF : rest.student_max), LOWEST);
    Shift at_1 = Shift::of(rest.student_max, LOG2_E);
    frame.moved_at_1 =
        exp2((double(at_1.logit_shift) - double(frame.top)) * double(LOG2_E) + double(at_1.exponent_shift));
    frame.sum_at_1 = rest.student_sum_at_1 * frame.moved_at_1;
    frame.correction_at_1 = rest.student_sum_at_1 == 0 ? 0 : correction_of(rest.student_max, LOG2_E) * frame.moved_at_1;
    return frame;
}

// What the gradient of an element of the rest follows from.
struct alignas(16) RestScales {
    float max; // of the rest
    float student, student_at_1;
    float constant; // of a rest of one token that the student rules out
};

// The gradient of a chunk of the rest.
template <bool CE, class Q>
ATKD_DEVICE void rest_gradient(const RestScales &scales, float exponent, const Packed<Q> &student, float (&g)[CHUNK]) {
    float b[CHUNK];
    unpack(student, b);
    Shift shift = Shift::of(scales.max, exponent), at_1 = Shift::of(scales.max, LOG2_E);
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        g[k] = fmaf(scales.student, exp2_fast(shift.exponent_of(b[k], exponent)), scales.constant);
        if (CE) {
            g[k] = fmaf(scales.student_at_1, exp2_fast(at_1.exponent_of(b[k], LOG2_E)), g[k]);
        }
    }
}

// The shared memory of a block beside the row.
template <class D> struct SparseShared {
    static constexpr uint32_t WARPS = ATKD_SPARSE_THREADS / WARP;
    using WarpState = RowState<D, float>;
    using RowScales = typename D::Scales;
    using RestState = RowState<OfRest, float>;

    ATKD_SHARED_MEMBER(WarpState, warps, WARPS);
    ATKD_SHARED_MEMBER(RowScales, scales, 1);
    ATKD_SHARED_MEMBER(RestState, rest_warps, WARPS);
    ATKD_SHARED_MEMBER(RestScales, rest_scales, 1);
    ATKD_SHARED_MEMBER(KnownLogits, known_warps, WARPS);
    ATKD_SHARED_MEMBER(ClassFrame, frames, 1);
    ATKD_SHARED_MEMBER(float, warps_at_1, WARPS);
    // The known tokens of the vocabulary, the target behind them.
    ATKD_SHARED_MEMBER(uint32_t, columns, ATKD_MAX_TOP_K + 1);
    // The first block's: the student's logits, and then the gradients, the target's behind them.
    ATKD_SHARED_MEMBER(float, values, ATKD_MAX_TOP_K + 1);
};

// The logits of a thread's chunk of the classes, of which the last is the rest.
template <class S> ATKD_DEVICE void load_classes(const atkd_sparse &p, uint32_t token, float exponent, const S &shared,
                                                 Packed<float> &a, Packed<float> &b) {
    ClassFrame frame = shared.frames[0];
    double to_logit = 1 / LN_2 / double(exponent);
    a = b = all_neg_inf<float>();
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        uint32_t place = thread_index() * CHUNK + k;
        if (place < p.top_k && shared.columns[place] != NO_COLUMN) {
            double log_prob = log_prob_of(p, token, place);
            set_element<float>(a.part[k / 4], k % 4, float(to_logit * (log_prob - double(frame.reference))));
            set_element<float>(b.part[k / 4], k % 4, frame.logit(shared.values[place]));
        }
        if (place == p.top_k) {
            set_element<float>(a.part[k / 4], k % 4, frame.teacher);
            set_element<float>(b.part[k / 4], k % 4, frame.student);
        }
    }
}

// The first phase: the known tokens, of which the first block reads the student's logits, and each warp's sums of the rest.
template <bool CE, class Q, class S>
ATKD_DEVICE void sum_rest(const atkd_sparse &p, const SparseSlice<Q> &slice, uint32_t token, uint32_t target,
                          S &shared) {
    SparseTile<Q> tile = slice.tile(p.rows, 0);
    tile.begin();
    uint32_t count = p.top_k + 1;
    KnownLogits known = {NEG_INF, -NEG_INF, 0};
    ATKD_NO_UNROLL
    for (uint32_t k = thread_index(); k < count; k += block_threads()) {
        uint32_t column = target;
        if (k < p.top_k) {
            column = column_of_index(p, given_index(p, token, k));
            column = column == target ? NO_COLUMN : column;
            if (cluster_rank() == 0 && column != NO_COLUMN) {
                float b = widen(load(slice.row.data + column));
                shared.values[k] = b;
                known.highest = fmaxf(known.highest, b);
                known.lowest = b > NEG_INF ? fminf(known.lowest, b) : known.lowest;
                known.count += 1;
            }
        }
        shared.columns[k] = column;
    }
    known = {max_of_warp(known.highest), -max_of_warp(-known.lowest), reduce_warp(known.count, Sum())};
    if (thread_index() % WARP == 0) {
        shared.known_warps[thread_index() / WARP] = known;
    }
    ATKD_SYNC_BLOCK();

    float exponent = inverse_temperature_of(p.rows.batch, token) * LOG2_E;
    auto own = S::RestState::empty();
    bool twice = tile.end_without(shared.columns, count);
    for (uint32_t i = 0;;) {
        Largest<Q> largest;
        for (uint32_t chunk = tile.first + thread_index(); chunk < tile.end; chunk += block_threads()) {
            largest.add(tile.load(chunk));
        }
        own.template rescale<CE>(LOWEST, fmaxf(own.student_max, max_of_warp(largest.value())), LOWEST, exponent);
        Shift shift = Shift::of(own.student_max, exponent), at_1 = Shift::of(own.student_max, LOG2_E);
        for (uint32_t chunk = tile.first + thread_index(); chunk < tile.end; chunk += block_threads()) {
            float b[CHUNK], sum = 0, sum_at_1 = 0;
            unpack(tile.load(chunk), b);
            ATKD_UNROLL
            for (uint32_t k = 0; k < CHUNK; k++) {
                sum += exp2_fast(shift.exponent_of(b[k], exponent));
                sum_at_1 += CE ? exp2_fast(at_1.exponent_of(b[k], LOG2_E)) : 0;
            }
            own.student_sum += sum;
            own.student_sum_at_1 += sum_at_1;
        }
        if (++i == slice.tiles(p.rows)) {
            break;
        }
        ATKD_SYNC_BLOCK();
        tile = slice.tile(p.rows, i);
        tile.begin();
        twice |= tile.end_without(shared.columns, count);
    }
    if (ATKD_RARELY(twice)) {
        report_teacher(p, token);
        own.student_sum = nanf("");
    }
    store_warp_state<CE>(own, shared.rest_warps);
}

// The second phase, of the first block: the row of the classes, from what all blocks know of the rest to the gradients.
template <class D, bool CE, class Q, class S>
ATKD_DEVICE void row_of_classes(const atkd_sparse &p, uint32_t token, uint8_t group, uint32_t target, S &shared) {
    using RowScales = typename S::RowScales;
    float exponent = inverse_temperature_of(p.rows.batch, token) * LOG2_E;
    uint32_t warps_per_block = block_threads() / WARP, lane = thread_index() % WARP;
    if (thread_index() < WARP) {
        auto rest = merge_cluster<OfRest, CE>(shared.rest_warps, warps_per_block, exponent);
        KnownLogits all = {NEG_INF, -NEG_INF, 0};
        if (lane < warps_per_block) {
            all = shared.known_warps[lane];
        }
        all = {max_of_warp(all.highest), -max_of_warp(-all.lowest), reduce_warp(all.count, Sum())};
        float target_logit = widen(load(student_row<Q>(p.rows, token) + target));
        ClassFrame frame = frame_of(rest, all, target_logit, exponent);
        double to_logit = 1 / LN_2 / double(exponent);
        // Read once: the row's terms are written over them.
        frame.reference = load(p.references + token);
        frame.teacher = float(to_logit * load(p.rests + token));
        float target_teacher = float(to_logit * double(load(p.targets + token)));
        // The others may be as far below as float32 goes; rounding puts that beyond it. A NaN stays.
        target_teacher = target_teacher > -LOWEST ? -LOWEST : target_teacher;
        frame.targets = {target_teacher, frame.logit(target_logit)};
        frame.tokens = p.rows.batch.vocab - all.count - 1;
        if (thread_index() == 0) {
            shared.frames[0] = frame;
        }
    }
    ATKD_SYNC_BLOCK();
    // The logits of the classes are found anew for each sweep: kept, they would take the registers of what is between.
    {
        Packed<float> a, b;
        load_classes(p, token, exponent, shared, a, b);
        Maxima<D::CROSS, float> maxima;
        maxima.add(a, b);
        auto of_thread = maxima.template state<typename S::WarpState>();
        fold_chunk<false, true>(of_thread, {0, 0, 0}, a, b, exponent);
        store_warp_state<false>(of_thread, shared.warps);
    }
    if (CE) {
        ClassFrame frame = shared.frames[0];
        float at_1 = 0;
        ATKD_NO_UNROLL
        for (uint32_t k = thread_index(); k < p.top_k; k += block_threads()) {
            at_1 += shared.columns[k] == NO_COLUMN ? 0 : frame.power_at_1(shared.values[k]);
        }
        at_1 = reduce_warp(at_1, Sum());
        if (lane == 0) {
            shared.warps_at_1[thread_index() / WARP] = at_1;
        }
    }
    ATKD_SYNC_BLOCK();

    if (thread_index() < WARP) {
        auto state = merge_blocks<D, false>(shared.warps, warps_per_block, 1, exponent);
        ClassFrame frame = shared.frames[0];
        Weights weights = Weights::of(p.rows);
        float ce = weights.ce;
        // One that is not finite makes the whole gradient NaN.
        weights.ce = CE && ce == ce ? 0 : ce;
        RowScales found = scales_of<D, false>(p.rows, weights, token, group, state, frame.targets, false);
        store_margins<D, false>(p.rows, token, state, frame.targets);
        if (D::CROSS == BY_STUDENT && lane == STUDENT) {
            // Reverse KL is infinite however little the student has where the teacher has nothing: more than nothing.
            bool rest = state.cross_term == double(NEG_INF);
            bool of_target = frame.targets.teacher == NEG_INF && frame.targets.student > NEG_INF;
            float margin = load(p.rows.student_margin + token), most = 700 / GAP_UNIT;
            margin = rest ? fmaxf(margin, -most) : margin;
            store(p.rows.student_margin + token, of_target ? fminf(margin, most) : margin);
        }
        if (CE) {
            double sum = frame.sum_at_1;
            for (uint32_t warp = 0; warp < warps_per_block; warp++) {
                sum += double(shared.warps_at_1[warp]);
            }
            double above = (double(frame.target) - double(frame.top)) * double(LOG2_E) * LN_2;
            double margin = log(sum + frame.correction_at_1) - above;
            float gamma = ce == 0 ? 0 : token_weight(p.rows.batch, token) * ce * float(sigmoid(margin));
            found.target -= gamma;
            found.student_at_1 = sum == 0 ? 0 : float(gamma / sum);
            // The lane that has stored that of the temperature.
            if (lane == STUDENT) {
                store(p.rows.student_margin_at_1 + token, margin);
            }
        }
        if (thread_index() == 0) {
            shared.scales[0] = found;
        }
    }
    ATKD_SYNC_BLOCK();
    if constexpr (D::SWEEPS == 2) {
        ATKD_SECOND_SWEEP_SHARED(D, ATKD_SPARSE_THREADS);
        auto terms = D::template Terms<float>::empty();
        Packed<float> a, b;
        load_classes(p, token, exponent, shared, a, b);
        D::template add<true>(terms, p.rows.divergence, shared.scales[0], exponent, a, b);
        store_warp_state<false>(terms, warp_terms);
        ATKD_SYNC_BLOCK();
        if (thread_index() < WARP) {
            auto all = merge_blocks<SecondSweep<D>, false>(warp_terms, warps_per_block, 1, 0);
            RowScales complete;
            double dkd = D::finish(p.rows.divergence, shared.scales[0], all, complete);
            sync_warp();
            // The others are as they were. Copied from the complete ones, all would lie in local memory.
            if (thread_index() == 0) {
                RowScales found = shared.scales[0];
                found.student = complete.student;
                found.target = complete.target;
                shared.scales[0] = found;
            }
            store_dkd(p.rows, token, dkd);
        }
        ATKD_SYNC_BLOCK();
    }
    if (p.rows.gradient != nullptr) {
        Packed<float> a, b;
        load_classes(p, token, exponent, shared, a, b);
        RowScales found = shared.scales[0];
        ClassFrame frame = shared.frames[0];
        float g[CHUNK];
        gradient_chunk<D, false, true>(p.rows.divergence, found, exponent, a, b, g);
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            uint32_t place = thread_index() * CHUNK + k;
            if (place < p.top_k && shared.columns[place] != NO_COLUMN) {
                float of_ce = CE ? found.student_at_1 * frame.power_at_1(shared.values[place]) : 0;
                shared.values[place] = g[k] + of_ce;
            }
            if (place == p.top_k) {
                // The target has the place of the rest, which none but this thread needs.
                shared.values[place] = found.target;
                bool is_number = g[k] == g[k];
                float share = frame.sum == 0 ? 0 : float(double(g[k]) / frame.sum);
                float at_1 = CE ? found.student_at_1 * float(frame.moved_at_1) : 0;
                bool is_constant = !is_number || (frame.sum == 0 && frame.tokens == 1);
                shared.rest_scales[0] = {frame.max, is_number ? share : nanf(""), at_1, is_constant ? g[k] : 0.0f};
            }
        }
    }
}

// The third phase: the gradients of the rest, and over what that has written in their places those of the known tokens.
template <bool CE, class G, class Q, class S>
ATKD_DEVICE void write_sparse_gradient(const atkd_sparse &p, const SparseSlice<Q> &slice, uint32_t token,
                                       const RestScales &scales, S &shared) {
    float exponent = inverse_temperature_of(p.rows.batch, token) * LOG2_E;
    Row<G> gradient(row_at(static_cast<G *>(p.rows.gradient), p.rows.gradient_strides, token), slice.row.vocab,
                    slice.row.head);
    uint32_t count = p.top_k + 1;
    // The last tile is still there.
    for (uint32_t i = slice.tiles(p.rows) - 1;; i--) {
        SparseTile<Q> tile = slice.tile(p.rows, i);
        if (i + 1 < slice.tiles(p.rows)) {
            tile.begin();
            tile.end_without(shared.columns, count);
        }
        for (uint32_t chunk = tile.first + thread_index(); chunk < tile.end; chunk += block_threads()) {
            float g[CHUNK];
            rest_gradient<CE>(scales, exponent, tile.load(chunk), g);
            store_chunk(gradient, chunk, g);
        }
        ATKD_SYNC_BLOCK();
        if (i == 0) {
            break;
        }
    }
    slice.whole().for_known(shared.columns, count, [&](uint32_t k, uint32_t column) {
        store(gradient.data + column, narrow<G>(ATKD_REMOTE(shared.values, k, 0)));
    });
}

// CE: cross entropy has a weight. It is apart from the divergence, whose classes it does not have.
template <class D, bool CE, class Q, class S>
ATKD_DEVICE void row_sparse(const atkd_sparse &p, uint32_t token, StagedMemory staged, S &shared) {
    uint8_t group = load(p.rows.batch.groups + token);
    int32_t signed_target = target_of(p.rows.batch, token);
    if (ATKD_RARELY(group == ATKD_IGNORED || signed_target == IGNORED_TARGET)) {
        Rows<Q, Q> rows(p.rows, token);
        by_gradient_type<Q>(p.rows, [&](auto g) { drop_row<decltype(g)>(p.rows, rows); });
        return;
    }
    uint32_t target = uint32_t(signed_target);
    sum_rest<CE>(p, SparseSlice<Q>(p.rows, token, staged), token, target, shared);
    ATKD_SYNC_CLUSTER();
    if (cluster_rank() == 0) {
        row_of_classes<D, CE, Q>(p, token, group, target, shared);
    }
    if (p.rows.gradient != nullptr) {
        RestScales scales = scales_for_all(shared.rest_scales);
        // Computed again: kept, it would take registers that the classes need.
        SparseSlice<Q> slice(p.rows, opaque(token), staged);
        by_gradient_type<Q>(
            p.rows, [&](auto type) { write_sparse_gradient<CE, decltype(type)>(p, slice, token, scales, shared); });
    }
    // No block goes on while another may read what it shares.
    ATKD_SYNC_CLUSTER();
}

template <class D, class Q> ATKD_DEVICE void row_sparse(const atkd_sparse &p) {
    ATKD_STAGED(staged);
    ATKD_SHARED_STRUCT(SparseShared<D>, shared);
    if (p.rows.objective.ce_weight != 0) {
        for_tokens(p.rows, [&](uint32_t token) { row_sparse<D, true, Q>(p, token, staged, shared); });
    } else {
        for_tokens(p.rows, [&](uint32_t token) { row_sparse<D, false, Q>(p, token, staged, shared); });
    }
}

} // namespace

#define ATKD_ROW_SPARSE(D, suffix, dtype, Q)                                                                           \
    ATKD_KERNEL(row_sparse_##dtype##suffix, atkd_sparse, ATKD_SPARSE) { row_sparse<D, Q>(p); }
ATKD_DIVERGENCES(ATKD_ROW_SPARSE, f32, float)
ATKD_DIVERGENCES(ATKD_ROW_SPARSE, f16, f16)
ATKD_DIVERGENCES(ATKD_ROW_SPARSE, bf16, bf16)
