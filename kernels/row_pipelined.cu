// Loss and gradient of one token a team of blocks at a time, whose shared memory holds the whole row of both models:
// each logit is read once, the gradient written once. Rows come by bulk copies. While a team waits, for a row or for
// all of its blocks, others on the same multiprocessors work. All blocks of a launch in teams run at once.
#include "row.cuh"

namespace {

constexpr uint32_t NO_TOKEN = 0xffffffffu;
constexpr uint32_t ALL = 0xffffffffu; // room for a slice of any size

// The chunks of a row that are this block's, by their places in its slice. Slices start where lines of 128 bytes do, in
// global memory and in shared memory alike: bulk copies between places 16 bytes off each other take 8% longer. So the
// row's first line may start with places that are not in the row.
struct Slice {
    uint32_t start; // the chunk of the first place; before the row, less than 0, modulo 2^32
    // Those that share no 16 bytes with what is not in the row: they come by bulk copies.
    uint32_t whole_start, whole_end;
    bool starts_outside, ends_outside; // the slice has a chunk of the row before those; after them

    template <class T> static ATKD_DEVICE Slice of(const Row<const T> &row, uint32_t most, uint32_t rank) {
        uint32_t before = uint32_t(reinterpret_cast<uintptr_t>(row.at(0)) % LINE / (CHUNK * sizeof(T)));
        uint32_t all = before + row.chunks(), from = rank * most < all ? rank * most : all;
        uint32_t places = most < all - from ? most : all - from, start = from - before;
        uint32_t first = rank == 0 ? before : 0;
        bool starts_outside = first < places && !row.whole(start + first);
        uint32_t whole_start = first + (starts_outside ? 1 : 0);
        bool ends_outside = whole_start < places && !row.whole(start + places - 1);
        return {start, whole_start, places - (ends_outside ? 1 : 0), starts_outside, ends_outside};
    }
};

// All warps of a block work on the row, WORKERS threads, but the last, which waits for what is not here yet, and does
// what takes time and not throughput. They share the whole chunks by pieces of 16 bytes in turn. A pack, which a thread
// handles at once, is as many elements as a chunk.
template <class T, uint32_t WORKERS> struct Block {
    static constexpr uint32_t PARTS = Packed<T>::PARTS, PER = Packed<T>::PER;
    // Bytes from a thread's piece to its next, and from pack to pack.
    static constexpr uint32_t STEP = WORKERS * 16, PACK = PARTS * STEP;
    // Packs that a thread reads together, so that their arithmetic overlaps, and the bytes of all threads' to the next:
    // 64 bytes of each model a thread or, in small blocks, 32.
    static constexpr uint32_t TOGETHER = WORKERS / 64 / PARTS, TURN = TOGETHER * PACK;
};

// What a block needs to know of a row that is on its way.
struct alignas(8) Coming {
    uint32_t start, whole_end; // of its slice
    uint32_t token;            // NO_TOKEN: there is no row to come
    uint32_t target;
    // Of the target, if a bulk copy brings it to this block, where the pack of the thread whose it is starts;
    // else NOT_HERE.
    uint32_t target_at;
    uint8_t target_thread, target_within;
    uint8_t mode;
    uint8_t whole_start : 4, starts_outside : 1, ends_outside : 1; // of its slice
};
constexpr uint32_t NOT_HERE = 0xffffffffu;

// Where the slices of a row that is on its way come from: what lies in them at 0. Whole chunks lie there to `end`.
struct alignas(8) Source {
    uintptr_t teacher, student;
    uint32_t end;
};

// A state as it is posted in the block.
struct alignas(16) Sums {
    float teacher, weighted_gap, student;
    uint32_t ruled_out;
};
struct alignas(8) Maxima {
    float teacher, student;
};
ATKD_DEVICE Sums sums_of(const RowState<float> &state) {
    return {state.teacher_sum, state.weighted_gap, state.student_sum, state.ruled_out};
}
ATKD_DEVICE Maxima maxima_of(const RowState<float> &state) { return {state.teacher_max, state.student_max}; }
template <class Real> ATKD_DEVICE RowState<Real> state_of(const Sums &sums, const Maxima &maxima) {
    return {sums.teacher, sums.weighted_gap, sums.student, 0, maxima.teacher, maxima.student, sums.ruled_out};
}

// The same as a block tells it to its team, in global memory: pieces that are written and read whole, each with the
// number of the row, which the first one of a launch has as 1. Before a launch all numbers there are 0. A block writes
// to two places in turn: it comes to the same one again when all have read what it wrote there, since it has had their
// states of the row between.
struct Told {
    Bytes16 sums;   // and twice the number, plus 1 if ruled out
    Bytes16 maxima; // and, of the first block, which row comes after the next; twice the number
};
static_assert(sizeof(Told) == ATKD_TOLD_STATE, "the layout is a contract");

// What the threads of a block share beside the row.
template <class T, uint32_t WORKERS> struct Shared {
    // The slice's first chunk of teacher and student, then its last, without the target: if no bulk copy brings them.
    // Of the row at work and the next, in turn.
    ATKD_SHARED_MEMBER(uint32_t, ends, 2 * 4 * CHUNK * sizeof(T) / 4);
    ATKD_SHARED_MEMBER(Sums, warp_sums, WORKERS / WARP);
    ATKD_SHARED_MEMBER(Maxima, warp_maxima, WORKERS / WARP);
    ATKD_SHARED_MEMBER(GradientScales, scales, 1);
    ATKD_SHARED_MEMBER(Weights, weights, 1);
    ATKD_SHARED_MEMBER(Coming, coming, 2); // the row at work and the next, in turn
    ATKD_SHARED_MEMBER(Source, source, 1); // of the next
    ATKD_SHARED_MEMBER(Barrier, full, 1);  // the row has come
    ATKD_SHARED_MEMBER(Barrier, read, 2);  // its first turn has been read for the last time; all of it has
};

// Where a block's slices lie in its shared memory: the teacher's, then the student's.
template <class T> ATKD_DEVICE uint32_t to_student(const atkd_rows &p) { return p.slice * CHUNK * sizeof(T); }

// A thread that works on the row: all but the last warp's.
// region: consumers
template <class T, uint32_t WORKERS> struct Worker {
    using Of = Block<T, WORKERS>;
    const atkd_rows &p;
    StagedMemory staged;
    Shared<T, WORKERS> &shared;
    const Coming &row;
    // Where the slice's whole chunks start in it, and how many bytes they are.
    uint32_t at_start, end;
    float exponent;
    bool has_start, has_end, has_target; // has_end: its first chunk or its last
    uint32_t end_chunk;
    uint32_t turn; // of shared.ends

    ATKD_DEVICE Worker(const atkd_rows &p_, StagedMemory staged_, Shared<T, WORKERS> &shared_, const Coming &row_,
                       uint32_t turn_)
        : p(p_), staged(staged_), shared(shared_), row(row_), at_start(row.whole_start * CHUNK * sizeof(T)),
          end((row.whole_end - row.whole_start) * CHUNK * sizeof(T)),
          exponent(p.batch.inverse_temperature * LOG2_E), turn(turn_) {
        has_start = thread_index() == 0 && row.starts_outside;
        has_end = has_start || (thread_index() == WARP && row.ends_outside);
        end_chunk = row.start + (has_start ? row.whole_start - 1 : row.whole_end);
        has_target = row.target_at != NOT_HERE && thread_index() == row.target_thread;
    }

    // Of a thread that has an end, its chunk of teacher, 0, or student, 1.
    ATKD_DEVICE Packed<T> end_of(uint32_t model) const {
        Packed<T> packed = {};
        ATKD_UNROLL
        for (uint32_t i = 0; i < 4 * Of::PARTS; i++) {
            packed.part[i / 4].word[i % 4] = shared.ends[(4 * turn + (has_start ? 0 : 2) + model) * 4 * Of::PARTS + i];
        }
        return packed;
    }

    // A pack of the slice that starts at `slice` in shared memory. With `whole` no part of it is missing.
    ATKD_DEVICE Packed<T> pack_of(uint32_t slice, uint32_t at, bool whole) const {
        Packed<T> packed = whole ? Packed<T>() : nothing<T>();
        ATKD_UNROLL
        for (uint32_t i = 0; i < Of::PARTS; i++) {
            if (whole || at + i * Of::STEP < end) {
                packed.part[i] = load_staged(staged, slice + at_start + at + i * Of::STEP);
            }
        }
        return packed;
    }
    ATKD_DEVICE Packed<T> teacher_at(uint32_t at, bool whole) const { return pack_of(0, at, whole); }
    ATKD_DEVICE Packed<T> student_at(uint32_t at, bool whole) const { return pack_of(to_student<T>(p), at, whole); }

    // Calls f(at, further, teacher, student, whole) for the thread's packs, which lie at the sum of both: first for
    // those of no whole turn, of which the last may lack parts, then turn by turn; and read(last) when it has read
    // those of a turn. So all is read a turn before the end.
    template <class F, class Read> ATKD_DEVICE void for_packs(F f, Read read) const {
        constexpr uint32_t TOGETHER = Of::TOGETHER, PACK = Of::PACK;
        uint32_t in_turns = end / Of::TURN * Of::TURN;
        ATKD_NO_UNROLL
        for (uint32_t at = in_turns + thread_index() * 16; at < end; at += PACK) {
            constexpr bool WHOLE = Of::PARTS == 1;
            f(at, 0, teacher_at(at, WHOLE), student_at(at, WHOLE), Flag<WHOLE>());
        }
        ATKD_NO_UNROLL
        for (uint32_t at = thread_index() * 16; at < in_turns; at += Of::TURN) {
            Packed<T> teacher[TOGETHER], student[TOGETHER];
            ATKD_UNROLL
            for (uint32_t i = 0; i < TOGETHER; i++) {
                teacher[i] = teacher_at(at + i * PACK, true);
                student[i] = student_at(at + i * PACK, true);
            }
            read(at + Of::TURN >= in_turns);
            ATKD_UNROLL
            for (uint32_t i = 0; i < TOGETHER; i++) {
                f(at, i * PACK, teacher[i], student[i], Flag<true>());
            }
        }
    }
    // All but the target's, which only one warp has to look for.
    template <class F> ATKD_DEVICE void for_others(F f) const {
        auto nothing_to_tell = [](bool) {};
        if (ATKD_RARELY(row.target_at != NOT_HERE && thread_index() / WARP == row.target_thread / WARP)) {
            auto unless_target = [&](uint32_t at, uint32_t further, const Packed<T> &teacher, const Packed<T> &student,
                                     auto whole) {
                if (!has_target || at + further != row.target_at) {
                    f(teacher, student, whole);
                }
            };
            for_packs(unless_target, nothing_to_tell);
        } else {
            auto any = [&](uint32_t, uint32_t, const Packed<T> &teacher, const Packed<T> &student, auto whole) {
                f(teacher, student, whole);
            };
            for_packs(any, nothing_to_tell);
        }
    }
    // What else is this thread's.
    template <class F> ATKD_DEVICE void for_own(F f) const {
        if (ATKD_RARELY(has_target || has_end)) {
            if (has_target) {
                Packed<T> teacher = teacher_at(row.target_at, false), student = student_at(row.target_at, false);
                take_out(row.target_within, teacher);
                take_out(row.target_within, student);
                f(teacher, student, Flag<false>());
            }
            if (has_end) {
                f(end_of(0), end_of(1), Flag<false>());
            }
        }
    }

    // The state of the thread's warp, in its first lane.
    ATKD_DEVICE RowState<float> sums() {
        // The maxima first, so that no sum must be rebased while it is added to.
        Largest<T> teacher_max, student_max;
        auto add_to_max = [&](const Packed<T> &teacher, const Packed<T> &student, auto) {
            teacher_max.add(teacher);
            student_max.add(student);
        };
        for_others(add_to_max);
        for_own(add_to_max);
        auto own = RowState<float>::from(teacher_max.value(), student_max.value());
        References references = own.references(exponent);
        auto add_with_care = [&](const Packed<T> &teacher, const Packed<T> &student, auto) {
            add<false, true>(own, references, teacher, student, exponent);
        };
        for_others([&](const Packed<T> &teacher, const Packed<T> &student, auto whole) {
            add<false, !decltype(whole)::value>(own, references, teacher, student, exponent);
        });
        if (ATKD_RARELY(!own.finite())) {
            own = {0, 0, 0, 0, own.teacher_max, own.student_max, 0};
            for_others(add_with_care);
        }
        for_own(add_with_care);
        return merge_warp<false>(own);
    }

    // `read` is told when turns of the slice have been read, and whether that is all of it.
    template <bool LARGE_ROW, class Read>
    ATKD_DEVICE void gradient(const GradientScales &of_row, Read read) const {
        Row<T> gradient = Rows<T, T>(p, row.token).template gradient<T>(p);
        uintptr_t to = reinterpret_cast<uintptr_t>(gradient.at(row.start + row.whole_start));
        auto store_gradient = [&](uint32_t at, uint32_t further, const Packed<T> &teacher, const Packed<T> &student,
                                  auto whole) {
            float g[CHUNK];
            gradient_of<false, LARGE_ROW>(of_row, exponent, teacher, student, g);
            Packed<T> packed = pack<T>(g);
            ATKD_UNROLL
            for (uint32_t i = 0; i < Of::PARTS; i++) {
                if (decltype(whole)::value || at + further + i * Of::STEP < end) {
                    store16(reinterpret_cast<void *>(to + at + further + i * Of::STEP), packed.part[i]);
                }
            }
        };
        for_packs(store_gradient, read);
        if (ATKD_RARELY(has_target)) {
            store(gradient.data + row.target, narrow<T>(of_row.target));
        }
        if (ATKD_RARELY(has_end)) {
            float g[CHUNK];
            gradient_of<false, LARGE_ROW>(of_row, exponent, end_of(0), end_of(1), g);
            put_target(gradient.within(row.target, end_chunk), of_row.target, g);
            store_chunk(gradient, end_chunk, g);
        }
    }
};
// end region

// The last warp: it asks for rows, and settles what they come to. Its first lane, the leader, does what one does.
// region: one warp per block
template <class T, uint32_t WORKERS> struct Server {
    using Of = Block<T, WORKERS>;
    const atkd_rows &p;
    StagedMemory staged;
    Shared<T, WORKERS> &shared;
    uint32_t lane, count, rank;
    bool leads;
    // Of the next row: up to where its slices have been asked for.
    uint32_t asked;
    // Of the shared ends, a lane each.
    uint32_t end_element;
    // Which row comes after that, by its place among those to do.
    uint32_t after;
    // Of the row in turn: its number, and the team's states, a lane each.
    uint32_t number;
    TargetLogits target_logits;
    Sums block_sums;
    Maxima block_maxima;

    ATKD_DEVICE Server(const atkd_rows &p_, StagedMemory staged_, Shared<T, WORKERS> &shared_)
        : p(p_), staged(staged_), shared(shared_), lane(thread_index() % WARP), count(tokens_to_do(p_)),
          rank(block_index() % p_.team), leads(lane == 0), after(block_index() / p_.team + p_.clusters),
          number(0) {}

    // The row that comes next, by its place among those to do. Known early, it can be asked for as soon as there is
    // room, and its ends are here when their row is.
    ATKD_DEVICE void look(uint32_t index, uint32_t turn) {
        Coming coming = {0, 0, NO_TOKEN, 0, NOT_HERE, 0, 0, ATKD_IGNORED, 0, 0, 0};
        Source source = {0, 0, 0};
        asked = 0;
        end_element = 0;
        if (index < count) {
            find(index, coming, source);
        }
        if (leads) {
            shared.coming[turn] = coming;
            shared.source[0] = source;
        }
    }
    ATKD_DEVICE void find(uint32_t index, Coming &coming, Source &source) {
        coming.token = token_to_do(p, index);
        uint8_t mode = load(p.batch.modes + coming.token);
        int32_t target = target_of(p.batch, coming.token);
        if (mode == ATKD_IGNORED || target == IGNORED_TARGET) {
            return;
        }
        Rows<T, T> rows(p, coming.token);
        auto slice = Slice::of(rows.teacher, p.slice, rank);
        uint32_t start = slice.start + slice.whole_start;
        asked = slice.whole_start * CHUNK * sizeof(T);
        uint32_t end = slice.whole_end * CHUNK * sizeof(T);
        source = {reinterpret_cast<uintptr_t>(rows.teacher.at(start)) - asked,
                  reinterpret_cast<uintptr_t>(rows.student.at(start)) - asked, end};
        coming.start = slice.start;
        coming.whole_end = slice.whole_end;
        coming.target = uint32_t(target);
        coming.mode = mode;
        coming.whole_start = uint8_t(slice.whole_start);
        coming.starts_outside = slice.starts_outside;
        coming.ends_outside = slice.ends_outside;
        // Among the elements that bulk copies bring.
        uint32_t element = coming.target + rows.teacher.lead - start * CHUNK;
        if (element * sizeof(T) < end - asked) {
            uint32_t piece = element / Of::PER, turn = piece / WORKERS;
            coming.target_thread = uint8_t(piece % WORKERS);
            coming.target_at = coming.target_thread * 16 + turn / Of::PARTS * Of::PACK;
            coming.target_within = uint8_t(turn % Of::PARTS * Of::PER + element % Of::PER);
        }
        // Of the slice's first chunk of teacher and student, then its last, a lane each.
        bool last = lane >= 2 * CHUNK;
        uint32_t chunk = slice.start + (last ? slice.whole_end : slice.whole_start - 1);
        uint32_t j = chunk * CHUNK + lane % CHUNK - rows.teacher.lead;
        const T *data = lane / CHUNK % 2 == 0 ? rows.teacher.data : rows.student.data;
        bool there = last ? slice.ends_outside : slice.starts_outside;
        T z = there && j < p.batch.vocab && j != coming.target ? load(data + j) : narrow<T>(OUTSIDE);
        end_element = to_bits(z);
    }

    ATKD_DEVICE void place_ends(uint32_t turn) {
        constexpr uint32_t WORDS = 4 * CHUNK * sizeof(T) / 4;
        uint32_t next = shuffle_xor(end_element, 1);
        if (sizeof(T) == 4) {
            shared.ends[turn * WORDS + lane] = end_element;
        } else if (lane % 2 == 0) {
            shared.ends[turn * WORDS + lane / 2] = end_element | next << 16;
        }
    }

    ATKD_DEVICE void expect() {
        Source source = shared.source[0];
        ATKD_EXPECT(shared.full, 0, 2 * (source.end - asked));
    }

    // Asks for it as far as there is room.
    ATKD_DEVICE void ask(uint32_t room) {
        Source source = shared.source[0];
        uint32_t until = room < source.end ? room : source.end;
        if (asked < until) {
            auto *teacher_from = reinterpret_cast<const void *>(source.teacher + asked);
            auto *student_from = reinterpret_cast<const void *>(source.student + asked);
            ATKD_BULK_LOAD(staged, asked, teacher_from, until - asked, shared.full, 0);
            ATKD_BULK_LOAD(staged, asked + to_student<T>(p), student_from, until - asked, shared.full, 0);
            asked = until;
        }
    }
    // What there is no room for yet, into the L2 cache. Any earlier, and it would be gone again when there is.
    ATKD_DEVICE void prefetch() {
        Source source = shared.source[0];
        if (asked < source.end) {
            bulk_prefetch(reinterpret_cast<const void *>(source.teacher + asked), source.end - asked);
            bulk_prefetch(reinterpret_cast<const void *>(source.student + asked), source.end - asked);
        }
    }

    // While the others work on the gradient: the next row, into the room that this one leaves, and what this one came
    // to.
    ATKD_DEVICE void follow(const Coming &row, uint32_t turn) {
        if (leads) {
            expect();
            if (p.gradient == nullptr) {
                ask(ALL);
            }
            if (p.team > 1) {
                prefetch();
            }
        }
        place_ends(turn ^ 1);
        ATKD_WAIT(shared.read, 0, turn);
        if (leads) {
            ask(row.whole_start * CHUNK * uint32_t(sizeof(T)) + Of::TURN);
        }
        ATKD_WAIT(shared.read, 1, turn);
        if (leads) {
            ask(ALL);
        }
        if (rank == 0 && row.mode != ATKD_IGNORED) {
            // region: one warp per row
            tell<false>(p, row.token, merge_blocks<double>(), target_logits);
            // end region
        }
    }

    // While the others work on the row.
    ATKD_DEVICE void prepare(const Coming &row, uint32_t turn) {
        number += 1;
        look(shuffle_from(after, 0), turn ^ 1);
        if (leads && rank == 0) {
            // Whoever is ready first comes for one: multiprocessors are not equally fast. The first two rows of each
            // team are its own.
            after = 2 * p.clusters + add_atomic(&p.batch.summary->drawn, 1);
        }
        sync_warp();
        if (row.mode != ATKD_IGNORED) {
            target_logits = target_logits_of<T, T>(p, row.token, row.target);
        }
    }

    ATKD_DEVICE Told *told_by(uint32_t block) const {
        return static_cast<Told *>(p.states) + (number & 1) * ATKD_PIPELINED_GRID + block;
    }

    // From the states of the warps to the block's, from all blocks' to what the gradient needs.
    ATKD_DEVICE void settle(const Coming &row) {
        bool ignored = row.mode == ATKD_IGNORED;
        auto of_block = RowState<float>::empty();
        if (!ignored) {
            uint32_t warp = lane % (WORKERS / WARP);
            of_block = state_of<float>(shared.warp_sums[warp], shared.warp_maxima[warp]);
            share_maxima<false>(of_block, p.batch.inverse_temperature * LOG2_E);
            of_block = merge_warp<false, WORKERS / WARP>(of_block);
        }
        block_sums = {0, 0, 0, 0};
        block_maxima = {LOWEST, LOWEST};
        if (leads) {
            block_sums = sums_of(of_block);
            block_maxima = maxima_of(of_block);
        }
        if (p.team > 1) {
            if (leads) {
                Told *told = told_by(block_index());
                post16(&told->sums, {{to_bits(block_sums.teacher), to_bits(block_sums.weighted_gap),
                                      to_bits(block_sums.student), 2 * number + (block_sums.ruled_out != 0 ? 1 : 0)}});
                post16(&told->maxima,
                       {{to_bits(block_maxima.teacher), to_bits(block_maxima.student), after, 2 * number}});
            }
            hear();
        }
        if (!ignored) {
            Weights weights = shared.weights[0];
            GradientScales found =
                scales_of<false>(p, weights, row.token, row.mode, merge_blocks<float>(), target_logits, rank == 0);
            if (leads) {
                shared.scales[0] = found;
            }
        }
    }

    // The states of the team's blocks, a lane each. Lanes without a block keep the empty state that they have.
    ATKD_DEVICE void hear() {
        if (lane < p.team) {
            const Told *told = told_by(block_index() - rank + lane);
            Posts posts = {};
            ATKD_WAIT_FOR_POSTS(posts, &told->sums, &told->maxima, number);
            const Bytes16 &sums = posts.first, &maxima = posts.second;
            block_sums = {from_bits<float>(sums.word[0]), from_bits<float>(sums.word[1]),
                          from_bits<float>(sums.word[2]), sums.word[3] & 1};
            block_maxima = {from_bits<float>(maxima.word[0]), from_bits<float>(maxima.word[1])};
            after = maxima.word[2];
        }
        sync_warp();
    }

    template <class Real> ATKD_DEVICE RowState<Real> merge_blocks() const {
        auto state = state_of<Real>(block_sums, block_maxima);
        share_maxima<false>(state, p.batch.inverse_temperature * LOG2_E);
        return merge_warp<false>(state);
    }
};
// end region

// Where the block's threads meet, of both kinds.
enum Meeting { HERE = 1, POSTED, SETTLED };

// All threads of the block, for a token that is ignored.
template <class T> ATKD_DEVICE void drop(const atkd_rows &p, const Coming &row) {
    Rows<T, T> rows(p, row.token);
    rows.first = block_index() % p.team * block_threads() + thread_index();
    rows.stride = p.team * block_threads();
    rows.speaks = rows.first == 0;
    drop_row<T>(p, rows);
}

// region: consumers
template <class T, uint32_t WORKERS>
ATKD_DEVICE void work(const atkd_rows &p, StagedMemory staged, Shared<T, WORKERS> &shared) {
    uint32_t lane = thread_index() % WARP, warp = thread_index() / WARP;
    for (uint32_t parity = 0;; parity ^= 1) {
        ATKD_MEET(HERE, WORKERS + WARP);
        const Coming &row = shared.coming[parity];
        if (row.token == NO_TOKEN) {
            break;
        }
        bool ignored = row.mode == ATKD_IGNORED;
        Worker<T, WORKERS> worker(p, staged, shared, row, parity);
        if (ATKD_RARELY(ignored)) {
            drop<T>(p, row);
        } else {
            RowState<float> of_warp = worker.sums();
            if (lane == 0) {
                shared.warp_sums[warp] = sums_of(of_warp);
                shared.warp_maxima[warp] = maxima_of(of_warp);
            }
        }
        ATKD_MEET(POSTED, WORKERS + WARP);
        ATKD_MEET(SETTLED, WORKERS + WARP);
        uint32_t times = 0;
        auto arrive_once = [&](uint32_t part) {
            if (times == part) {
                sync_warp();
                if (lane == 0) {
                    ATKD_ARRIVE(shared.read, part);
                }
                times += 1;
            }
        };
        auto read = [&](bool all) {
            arrive_once(0);
            if (all) {
                arrive_once(1);
            }
        };
        if (!ignored && p.gradient != nullptr) {
            GradientScales scales = shared.scales[0];
            if (ATKD_RARELY(scales.large<false>())) {
                worker.template gradient<true>(scales, read);
            } else {
                worker.template gradient<false>(scales, read);
            }
        }
        read(true);
    }
}
// end region

// region: one warp per block
template <class T, uint32_t WORKERS>
ATKD_DEVICE void serve(const atkd_rows &p, StagedMemory staged, Shared<T, WORKERS> &shared) {
    Server<T, WORKERS> server(p, staged, shared);
    server.look(block_index() / p.team, 0);
    server.place_ends(0);
    if (server.leads) {
        server.expect();
        server.ask(ALL);
        // Not in registers, of which this warp has no more than those that need them.
        shared.weights[0] = Weights::of(p);
    }
    sync_warp();
    for (uint32_t parity = 0;; parity ^= 1) {
        ATKD_WAIT(shared.full, 0, parity);
        ATKD_MEET(HERE, WORKERS + WARP);
        const Coming &row = shared.coming[parity];
        if (row.token == NO_TOKEN) {
            break;
        }
        if (ATKD_RARELY(row.mode == ATKD_IGNORED)) {
            drop<T>(p, row);
        }
        server.prepare(row, parity);
        ATKD_MEET(POSTED, WORKERS + WARP);
        server.settle(row);
        ATKD_MEET(SETTLED, WORKERS + WARP);
        server.follow(row, parity);
    }
}
// end region

template <class T, uint32_t WORKERS> ATKD_DEVICE void row_pipelined(const atkd_rows &p) {
    using SharedByBlock = Shared<T, WORKERS>;
    ATKD_STAGED(staged);
    ATKD_SHARED_STRUCT(SharedByBlock, shared);
    if (thread_index() == WORKERS) {
        ATKD_INIT_BARRIER(shared.full, 0, 1);
        ATKD_INIT_BARRIER(shared.read, 0, WORKERS / WARP);
        ATKD_INIT_BARRIER(shared.read, 1, WORKERS / WARP);
        publish_barriers();
    }
    ATKD_SYNC_BLOCK();
    if (thread_index() < WORKERS) {
        work<T, WORKERS>(p, staged, shared);
    } else {
        serve<T, WORKERS>(p, staged, shared);
    }
}

} // namespace

// Nothing where there are no bulk copies: no plan chooses it there.
#if defined(__CUDACC__) && __CUDA_ARCH__ < 900
#define ATKD_ROW_PIPELINED(T, geometry)
#else
#define ATKD_ROW_PIPELINED(T, geometry) row_pipelined<T, geometry##_THREADS - WARP>(p)
#endif

ATKD_KERNEL(row_pipelined_f32, atkd_rows, ATKD_PIPELINED) { ATKD_ROW_PIPELINED(float, ATKD_PIPELINED); }
ATKD_KERNEL(row_pipelined_f16, atkd_rows, ATKD_PIPELINED) { ATKD_ROW_PIPELINED(f16, ATKD_PIPELINED); }
ATKD_KERNEL(row_pipelined_bf16, atkd_rows, ATKD_PIPELINED) { ATKD_ROW_PIPELINED(bf16, ATKD_PIPELINED); }

// The same by fewer blocks, twice as large.
ATKD_KERNEL(row_pipelined_wide_f32, atkd_rows, ATKD_PIPELINED_WIDE) { ATKD_ROW_PIPELINED(float, ATKD_PIPELINED_WIDE); }
ATKD_KERNEL(row_pipelined_wide_f16, atkd_rows, ATKD_PIPELINED_WIDE) { ATKD_ROW_PIPELINED(f16, ATKD_PIPELINED_WIDE); }
ATKD_KERNEL(row_pipelined_wide_bf16, atkd_rows, ATKD_PIPELINED_WIDE) { ATKD_ROW_PIPELINED(bf16, ATKD_PIPELINED_WIDE); }
