// row_pipelined: loss and gradient, each logit read once. A persistent, warp-specialised kernel: a team of co-resident
// blocks takes one row at a time, each block a slice of it, which its shared memory holds for both models. The gradient
// is written while the next row's slice is loaded into the room that this one leaves.
//
// Roles. The consumers are all warps but the last: three passes over the slice in shared memory (maxima, sums,
// gradient). The producer is the last warp: it resolves the next row, issues the bulk copies, merges the sums of the
// block and of the team, and stores what the row's loss follows from. Its lane 0 does what one thread must.
//
// Barriers. full: an mbarrier, which completes when a row's slice has arrived. empty[FIRST_TILE], empty[REST]:
// mbarriers at which each consumer warp arrives when it has read the slice's first tile, and all of it, for the last
// time. ROW_FULL, SUMS_READY, SCALES_READY: named barriers of all the block's warps. The slice has one stage of
// shared memory, refilled as its parts empty; the row's descriptor (Task) and its ragged edges have two, by `stage`.
//
//             ROW_FULL                       SUMS_READY                     SCALES_READY
//   consumers    | max pass, sum pass            |                               | gradient pass, arrives at empty[..]
//   producer     | next task and its edges,      | block's sums -> publish       | expect the next row; margins, DKD;
//                | target logits of this row     | -> gather the team's -> scales| wait for empty[..], refill
//                                                                                  (full of the next row -> ROW_FULL)
//
// A divergence of two sweeps has SUMS_READY and SCALES_READY twice: after the first scales the consumers make the second
// sweep over the slice, and the producer reduces and exchanges its terms, in an epoch of their own.
//
// Exchange. Each block publishes its state of the row to two slots in global memory, which it uses alternately. A
// slot is a few 16-byte messages, each with the exchange's epoch in its last word, written and read as one 128-bit access
// (as in NCCL's LL128 protocol): who finds the epoch has the payload, and no fence is needed. The epoch of a launch's
// first exchange is 1, and before a launch all slots hold epoch 0. A slot is free again when its block has gathered the
// team's states of the next exchange: by then every block has read what was published here before. Every block merges
// the same states in the same order, and so has the same scales.
//
// Scheduling. The first two rows of a team are its own; later ones come from a queue, whose head (the ticket counter)
// is atkd_summary.next_ticket: multiprocessors are not equally fast. The team's first block draws the ticket, and its
// messages bring it to the others.
#include "math/divergences.cuh"
#include "row.cuh"

namespace {

enum NamedBarrier { ROW_FULL = 1, SUMS_READY, SCALES_READY };
enum EmptyBarrier { FIRST_TILE, REST, EMPTY_BARRIERS };

constexpr uint32_t NO_TOKEN = 0xffffffffu;
constexpr uint32_t NOT_HERE = 0xffffffffu;
constexpr uint32_t UNLIMITED = 0xffffffffu;

// The types of both models' logits. Offsets in slices are those of the narrower one's; the other's are WIDTH times as
// large.
template <class P, class Q, bool STUDENT = (sizeof(Q) < sizeof(P))> struct Models {
    using Teacher = P;
    using Student = Q;
    using Narrow = P;
    using Wide = Q;
    template <class X> static constexpr uint32_t WIDTH = sizeof(X) / sizeof(Narrow);
    // An element of an edge takes so many bytes.
    static constexpr uint32_t EDGE = sizeof(P) == sizeof(Q) ? sizeof(P) : 4;
};
template <class P, class Q> struct Models<P, Q, true> : Models<Q, P, false> {
    using Teacher = P;
    using Student = Q;
};

// A row's descriptor: its token, its target and its slice in this block.
struct alignas(8) Task {
    uint32_t first_chunk, full_end; // Slice's
    uint32_t token;                 // NO_TOKEN: there are no more rows
    uint32_t target;
    // The target's place in the slice, if a bulk copy brings it to this block: the thread that reads it, the offset at
    // which that thread's vector starts, and the element in the vector. Else target_at is NOT_HERE.
    uint32_t target_at;
    uint8_t target_thread, target_within;
    uint8_t group;                                      // ATKD_IGNORED, ATKD_EASY or ATKD_HARD
    uint8_t full_start : 4, has_head : 1, has_tail : 1; // Slice's
};

// The addresses of the next row's slices, as if they were full from offset 0 on; their full chunks end at offset `end`.
struct alignas(8) LoadSource {
    uintptr_t teacher, student;
    uint32_t end;
};

// The shared memory of a block beside the row.
template <class D, bool CE_SUM, class M, uint32_t CONSUMERS> struct Shared {
    // By stage, the ragged edges without the target: the head chunk of teacher and student, then the tail chunk.
    ATKD_SHARED_MEMBER(uint32_t, edges, 2 * 4 * CHUNK * M::EDGE / 4);
    using State = PackedState<D, CE_SUM>;
    ATKD_SHARED_MEMBER(State, warp_states, CONSUMERS / WARP); // of one sweep, then of the other
    ATKD_SHARED_MEMBER(typename D::Scales, scales, 1);
    ATKD_SHARED_MEMBER(Weights, weights, 1);
    ATKD_SHARED_MEMBER(Task, tasks, 2);        // by stage
    ATKD_SHARED_MEMBER(LoadSource, source, 1); // of the next row
    ATKD_SHARED_MEMBER(Barrier, full, 1);
    ATKD_SHARED_MEMBER(Barrier, empty, EMPTY_BARRIERS);
};

// The skeleton: the kernel, the consumers' loop, the producer's loop. What they call follows below.

template <class D, bool CE_SUM, class M, uint32_t CONSUMERS> struct Consumer;
template <class D, bool CE_SUM, class M, uint32_t CONSUMERS> struct Producer;
template <class D, bool CE_SUM, class M, uint32_t CONSUMERS> struct Tiling;
template <class M> ATKD_DEVICE void drop_task(const atkd_rows &p, const Task &task);

// region: consumers
template <class D, bool CE_SUM, class M, uint32_t CONSUMERS>
ATKD_DEVICE void consume(const atkd_rows &p, StagedMemory staged, Shared<D, CE_SUM, M, CONSUMERS> &shared) {
    using Tiles = Tiling<D, CE_SUM, M, CONSUMERS>;
    uint32_t lane = thread_index() % WARP, warp = thread_index() / WARP;
    for (uint32_t stage = 0;; stage ^= 1) {
        ATKD_SYNC_NAMED(ROW_FULL, CONSUMERS + WARP);
        const Task &task = shared.tasks[stage];
        if (task.token == NO_TOKEN) {
            break;
        }
        bool ignored = task.group == ATKD_IGNORED;
        Consumer<D, CE_SUM, M, CONSUMERS> consumer(p, staged, shared, task, stage);
        if (ATKD_RARELY(ignored)) {
            drop_task<M>(p, task);
        } else {
            RowState<D, float> warp_state = consumer.sums();
            if (lane == 0) {
                shared.warp_states[warp] = PackedState<D, CE_SUM>::of(warp_state);
            }
        }
        ATKD_SYNC_NAMED(SUMS_READY, CONSUMERS + WARP);
        ATKD_SYNC_NAMED(SCALES_READY, CONSUMERS + WARP);
        if constexpr (D::SWEEPS == 2) {
            if (!ignored) {
                typename D::Scales scales = shared.scales[0];
                by_size<D, CE_SUM, Tiles::SPECIALISED>(scales, [&](auto large) {
                    auto terms = consumer.template terms<decltype(large)::value>(scales);
                    if (lane == 0) {
                        shared.warp_states[warp] =
                            repacked<PackedState<D, CE_SUM>>(PackedState<SecondSweep<D>, false>::of(terms));
                    }
                });
            }
            ATKD_SYNC_NAMED(SUMS_READY, CONSUMERS + WARP);
            ATKD_SYNC_NAMED(SCALES_READY, CONSUMERS + WARP);
        }
        uint32_t arrivals = 0;
        auto arrive_once = [&](uint32_t part) {
            if (arrivals == part) {
                sync_warp();
                if (lane == 0) {
                    ATKD_ARRIVE(shared.empty, part);
                }
                arrivals += 1;
            }
        };
        auto release = [&](bool all) {
            arrive_once(FIRST_TILE);
            if (all) {
                arrive_once(REST);
            }
        };
        if (!ignored && p.gradient != nullptr) {
            typename D::Scales scales = shared.scales[0];
            by_gradient_type<typename M::Student>(p, [&](auto g) {
                by_size<D, CE_SUM, Tiles::SPECIALISED>(scales, [&](auto large) {
                    consumer.template gradient<decltype(large)::value, decltype(g)>(scales, release);
                });
            });
        }
        release(true);
    }
}
// end region

// region: one warp per block
template <class D, bool CE_SUM, class M, uint32_t CONSUMERS>
ATKD_DEVICE void produce(const atkd_rows &p, StagedMemory staged, Shared<D, CE_SUM, M, CONSUMERS> &shared) {
    Producer<D, CE_SUM, M, CONSUMERS> producer(p, staged, shared);
    producer.fetch_task(block_index() / p.team, 0);
    producer.place_edges(0);
    if (producer.elected) {
        producer.expect();
        producer.load_until(UNLIMITED);
        // The weights are not in registers: the kernel has as many per thread as the consumers need, and the producer none to spare.
        shared.weights[0] = Weights::of(p);
    }
    sync_warp();
    for (uint32_t stage = 0;; stage ^= 1) {
        ATKD_WAIT(shared.full, 0, stage);
        ATKD_SYNC_NAMED(ROW_FULL, CONSUMERS + WARP);
        const Task &task = shared.tasks[stage];
        if (task.token == NO_TOKEN) {
            break;
        }
        if (ATKD_RARELY(task.group == ATKD_IGNORED)) {
            drop_task<M>(p, task);
        }
        producer.advance(task, stage);
        ATKD_SYNC_NAMED(SUMS_READY, CONSUMERS + WARP);
        producer.reduce(task);
        ATKD_SYNC_NAMED(SCALES_READY, CONSUMERS + WARP);
        if constexpr (D::SWEEPS == 2) {
            producer.store_row_margins(task);
            ATKD_SYNC_NAMED(SUMS_READY, CONSUMERS + WARP);
            producer.reduce_terms(task);
            ATKD_SYNC_NAMED(SCALES_READY, CONSUMERS + WARP);
        }
        producer.refill(task, stage);
    }
}
// end region

template <class D, bool CE_SUM, class M, uint32_t CONSUMERS> ATKD_DEVICE void row_pipelined(const atkd_rows &p) {
    using SharedByBlock = Shared<D, CE_SUM, M, CONSUMERS>;
    ATKD_STAGED(staged);
    ATKD_SHARED_STRUCT(SharedByBlock, shared);
    if (thread_index() == CONSUMERS) {
        ATKD_INIT_BARRIER(shared.full, 0, 1);
        ATKD_INIT_BARRIER(shared.empty, FIRST_TILE, CONSUMERS / WARP);
        ATKD_INIT_BARRIER(shared.empty, REST, CONSUMERS / WARP);
        publish_barriers();
    }
    ATKD_SYNC_BLOCK();
    if (thread_index() < CONSUMERS) {
        consume<D, CE_SUM, M, CONSUMERS>(p, staged, shared);
    } else {
        produce<D, CE_SUM, M, CONSUMERS>(p, staged, shared);
    }
}

// The layout of a row.

// The chunks of a row that are this block's, by their places in its slice. Slices start at multiples of 128 bytes (of
// two types, the narrower one's do), in global memory and in shared memory peers: bulk copies between addresses that
// differ modulo 128 take 8% longer. So the first slice may start with places that are not in the row. The full chunks
// come by bulk copies; those at the row's ragged edges, which share 16 bytes with something else, are loaded element by
// element.
//
// An example: row 1 of V = 50257 in bf16, a team of 3, p.slice = 2104 chunks (of 8 elements, 16 bytes). The row starts
// at byte 100514, 2 bytes after a multiple of 16: chunk 0 starts one element before the row, and the row has 6283
// chunks. Chunk 0 lies 2 chunks after a multiple of 128 bytes, so that the row takes 6285 places.
//
//   rank  places          first_chunk  full places      edges
//   0     2104            -2           3 .. 2104        head: chunk 0, at place 2
//   1     2104            2102         0 .. 2104        none
//   2     2077            4206         0 .. 2076        tail: chunk 6282, at place 2076: the row's last 2 elements
struct Slice {
    uint32_t first_chunk; // the chunk of place 0; negative before the row, modulo 2^32
    uint32_t full_start, full_end;
    bool has_head, has_tail; // the slice has a chunk of the row before its full ones; after them

    template <class T> static ATKD_DEVICE Slice of(const Row<const T> &row, uint32_t room, uint32_t rank) {
        uint32_t before = uint32_t(reinterpret_cast<uintptr_t>(row.at(0)) % LINE / (CHUNK * sizeof(T)));
        uint32_t all = before + row.chunks(), from = rank * room < all ? rank * room : all;
        uint32_t places = room < all - from ? room : all - from, first_chunk = from - before;
        uint32_t first = rank == 0 ? before : 0;
        bool has_head = first < places && !row.full(first_chunk + first);
        uint32_t full_start = first + (has_head ? 1 : 0);
        bool has_tail = full_start < places && !row.full(first_chunk + places - 1);
        return {first_chunk, full_start, places - (has_tail ? 1 : 0), has_head, has_tail};
    }
};

// How the consumers share a slice's full chunks: pieces of 16 bytes, dealt to the threads in turn. A thread handles a
// vector at a time, which has as many elements as a chunk: one piece of half precision, two of single. Of single beside
// half precision the two are neighbours.
template <class D, bool CE_SUM, class M, uint32_t CONSUMERS> struct Tiling {
    using T = typename M::Narrow;
    static constexpr uint32_t PARTS = Packed<T>::PARTS, PER = Packed<T>::PER;
    // Bytes from a thread's piece to its next, and from its vector to its next.
    static constexpr uint32_t STEP = CONSUMERS * 16, VECTOR = PARTS * STEP;
    // Vectors that a thread reads before it computes, so that their arithmetic overlaps: 64 bytes of the wider model per
    // thread or, in small blocks, 32; with a sum more half of that, for its registers. Two sweeps compute long enough
    // beside a read. A tile is what all threads read so.
    static constexpr uint32_t UNROLL =
        D::SWEEPS == 2 ? 1 : CONSUMERS / 64 / Packed<typename M::Wide>::PARTS / (CE_SUM ? 2 : 1);
    static constexpr uint32_t TILE = UNROLL * VECTOR;
    // SPECIALISED: common rows have code of their own. It is a third of a kernel's: where it saves least, and in the kernels of
    // rare calls, it is not worth what nvcc takes for it.
    static constexpr bool IS_WIDE = CONSUMERS == ATKD_PIPELINED_WIDE_THREADS - WARP;
    static constexpr bool SPECIALISED =
        D::SPECIALISED || (D::SWEEPS == 2 && IS_WIDE && !CE_SUM && PARTS == Packed<typename M::Wide>::PARTS);
};

// The teacher's slice lies at 0 in the staged memory, the student's at this offset.
template <class M> ATKD_DEVICE uint32_t student_offset(const atkd_rows &p) {
    return p.slice * CHUNK * sizeof(typename M::Teacher);
}

// All threads of the block, for an ignored token: a gradient of zeros.
template <class M> ATKD_DEVICE void drop_task(const atkd_rows &p, const Task &task) {
    Rows<typename M::Teacher, typename M::Student> rows(p, task.token);
    rows.first = block_index() % p.team * block_threads() + thread_index();
    rows.stride = p.team * block_threads();
    rows.is_leader = rows.first == 0;
    by_gradient_type<typename M::Student>(p, [&](auto g) { drop_row<decltype(g)>(p, rows); });
}

// region: consumers
// The passes of a consumer thread over its part of the slice.
template <class D, bool CE_SUM, class M, uint32_t CONSUMERS> struct Consumer {
    using P = typename M::Teacher;
    using Q = typename M::Student;
    using T = typename M::Narrow;
    using Tiles = Tiling<D, CE_SUM, M, CONSUMERS>;
    const atkd_rows &p;
    StagedMemory staged;
    Shared<D, CE_SUM, M, CONSUMERS> &shared;
    const Task &task;
    // The full chunks' offset in the slice, and their bytes.
    uint32_t full_offset, end;
    float exponent;
    bool has_head, has_edge, has_target; // this thread has the head; the head or the tail; the target
    uint32_t edge_chunk;
    uint32_t stage;

    ATKD_DEVICE Consumer(const atkd_rows &p_, StagedMemory staged_, Shared<D, CE_SUM, M, CONSUMERS> &shared_,
                         const Task &task_, uint32_t stage_)
        : p(p_), staged(staged_), shared(shared_), task(task_), full_offset(task.full_start * CHUNK * sizeof(T)),
          end((task.full_end - task.full_start) * CHUNK * sizeof(T)),
          exponent(inverse_temperature_of(p.batch, task.token) * LOG2_E), stage(stage_) {
        has_head = thread_index() == 0 && task.has_head;
        has_edge = has_head || (thread_index() == WARP && task.has_tail);
        edge_chunk = task.first_chunk + (has_head ? task.full_start - 1 : task.full_end);
        has_target = task.target_at != NOT_HERE && thread_index() == task.target_thread;
    }

    // The edge chunk of a thread that has one, of teacher (0) or student (1).
    template <class X> ATKD_DEVICE Packed<X> edge(uint32_t model) const {
        constexpr uint32_t WORDS = CHUNK * M::EDGE / 4;
        uint32_t first = (4 * stage + (has_head ? 0 : 2) + model) * WORDS;
        Packed<X> packed = {};
        ATKD_UNROLL
        for (uint32_t i = 0; i < WORDS; i++) {
            if constexpr (sizeof(X) == M::EDGE) {
                packed.part[i / 4].word[i % 4] = shared.edges[first + i];
            } else {
                set_element(packed.part[0], i, from_bits<X>(shared.edges[first + i]));
            }
        }
        return packed;
    }

    // The vector at `at` of the slice at `slice` in shared memory. With `full` it has all of its parts.
    template <class X> ATKD_DEVICE Packed<X> load_vector(uint32_t slice, uint32_t at, bool full) const {
        Packed<X> packed = full ? Packed<X>() : all_neg_inf<X>();
        ATKD_UNROLL
        for (uint32_t i = 0; i < Packed<X>::PARTS; i++) {
            if constexpr (M::template WIDTH<X> == 2) {
                packed.part[i] = load_staged(staged, slice + 2 * (full_offset + at) + 16 * i);
            } else if (full || at + i * Tiles::STEP < end) {
                packed.part[i] = load_staged(staged, slice + full_offset + at + i * Tiles::STEP);
            }
        }
        return packed;
    }
    ATKD_DEVICE Packed<P> teacher_at(uint32_t at, bool full) const { return load_vector<P>(0, at, full); }
    ATKD_DEVICE Packed<Q> student_at(uint32_t at, bool full) const {
        return load_vector<Q>(student_offset<M>(p), at, full);
    }

    // Calls f(at, further, teacher, student, full) for the thread's vectors, each at offset at + further: first those
    // that make no whole tile, of which the last may lack parts, then tile by tile. Calls release(last) when a tile has
    // been read, so that the whole slice is released one tile's arithmetic before the end. TILED is false for rare passes:
    // their code would be in the way of the others'.
    template <bool TILED = true, class F, class Release> ATKD_DEVICE void for_vectors(F f, Release release) const {
        constexpr uint32_t UNROLL = Tiles::UNROLL, VECTOR = Tiles::VECTOR;
        uint32_t in_tiles = TILED ? end / Tiles::TILE * Tiles::TILE : 0;
        ATKD_NO_UNROLL
        for (uint32_t at = in_tiles + thread_index() * 16; at < end; at += VECTOR) {
            constexpr bool FULL = Tiles::PARTS == 1;
            f(at, 0, teacher_at(at, FULL), student_at(at, FULL), Flag<FULL>());
        }
        if constexpr (TILED) {
            ATKD_NO_UNROLL
            for (uint32_t at = thread_index() * 16; at < in_tiles; at += Tiles::TILE) {
                Packed<P> teacher[UNROLL];
                Packed<Q> student[UNROLL];
                ATKD_UNROLL
                for (uint32_t i = 0; i < UNROLL; i++) {
                    teacher[i] = teacher_at(at + i * VECTOR, true);
                    student[i] = student_at(at + i * VECTOR, true);
                }
                release(at + Tiles::TILE >= in_tiles);
                ATKD_UNROLL
                for (uint32_t i = 0; i < UNROLL; i++) {
                    f(at, i * VECTOR, teacher[i], student[i], Flag<true>());
                }
            }
        }
    }
    // Calls f(teacher, student, full) for the thread's vectors but the target's. Where TILED, only one warp tests for it.
    template <bool TILED = true, class F> ATKD_DEVICE void for_common_vectors(F f) const {
        auto keep = [](bool) {};
        auto unless_target = [&](uint32_t at, uint32_t further, const Packed<P> &teacher, const Packed<Q> &student,
                                 auto full) {
            if (!has_target || at + further != task.target_at) {
                f(teacher, student, full);
            }
        };
        if constexpr (!TILED) {
            for_vectors<false>(unless_target, keep);
        } else if (ATKD_RARELY(task.target_at != NOT_HERE && thread_index() / WARP == task.target_thread / WARP)) {
            for_vectors(unless_target, keep);
        } else {
            auto any = [&](uint32_t, uint32_t, const Packed<P> &teacher, const Packed<Q> &student, auto full) {
                f(teacher, student, full);
            };
            for_vectors(any, keep);
        }
    }
    // Calls f(teacher, student, ..) for the vector with the target, masked out, and for the edge chunk, if they are this thread's.
    template <class F> ATKD_DEVICE void for_special_vectors(F f) const {
        if (ATKD_RARELY(has_target || has_edge)) {
            if (has_target) {
                Packed<P> teacher = teacher_at(task.target_at, false);
                Packed<Q> student = student_at(task.target_at, false);
                mask_out(task.target_within, teacher);
                mask_out(task.target_within, student);
                f(teacher, student, Flag<false>());
            }
            if (has_edge) {
                f(edge<P>(0), edge<Q>(1), Flag<false>());
            }
        }
    }

    // The max pass and the sum pass. Returns the warp's state.
    ATKD_DEVICE RowState<D, float> sums() {
        // The maxima are known before the sums, which then need no rescaling.
        Maxima<D::CROSS, P, Q> maxima;
        auto add_to_max = [&](const Packed<P> &teacher, const Packed<Q> &student, auto) {
            maxima.add(teacher, student);
        };
        for_common_vectors(add_to_max);
        for_special_vectors(add_to_max);
        auto own = maxima.template state<RowState<D, float>>();
        Shifts shifts = own.shifts(exponent);
        auto fold_guarded = [&](const Packed<P> &teacher, const Packed<Q> &student, auto) {
            fold_chunk<CE_SUM, true>(own, shifts, teacher, student, exponent);
        };
        for_common_vectors([&](const Packed<P> &teacher, const Packed<Q> &student, auto full) {
            fold_chunk<CE_SUM, !decltype(full)::value>(own, shifts, teacher, student, exponent);
        });
        if (ATKD_RARELY(!own.finite() || (CE_SUM && !(own.student_sum_at_1 < -NEG_INF)))) {
            own = own.cleared();
            for_common_vectors<false>(fold_guarded);
        }
        for_special_vectors(fold_guarded);
        return merge_warp<CE_SUM>(own);
    }

    // The second sweep. Returns the warp's terms.
    template <bool LARGE_ROW> ATKD_DEVICE auto terms(const typename D::Scales &scales) {
        auto own = D::template Terms<float>::empty();
        auto add = [&](const Packed<P> &teacher, const Packed<Q> &student, auto) {
            D::template add<LARGE_ROW>(own, p.divergence, scales, exponent, teacher, student);
        };
        auto unless_target = [&](uint32_t at, uint32_t further, const Packed<P> &teacher, const Packed<Q> &student,
                                 auto full) {
            if (!has_target || at + further != task.target_at) {
                add(teacher, student, full);
            }
        };
        for_vectors<!LARGE_ROW || !Tiles::SPECIALISED>(unless_target, [](bool) {});
        for_special_vectors(add);
        return merge_warp<false>(own);
    }

    // The gradient pass, of type G. `release` is as for_vectors calls it.
    template <bool LARGE_ROW, class G, class Release>
    ATKD_DEVICE void gradient(const typename D::Scales &scales, Release release) const {
        Row<G> gradient = Rows<P, Q>(p, task.token).template gradient<G>(p);
        uintptr_t to = reinterpret_cast<uintptr_t>(gradient.at(task.first_chunk + task.full_start));
        auto store_gradient = [&](uint32_t at, uint32_t further, const Packed<P> &teacher, const Packed<Q> &student,
                                  auto full) {
            float g[CHUNK];
            gradient_chunk<D, CE_SUM, LARGE_ROW>(p.divergence, scales, exponent, teacher, student, g);
            Packed<G> packed = pack<G>(g);
            ATKD_UNROLL
            for (uint32_t i = 0; i < Packed<G>::PARTS; i++) {
                if constexpr (sizeof(G) > sizeof(T)) {
                    // A vector's 16 bytes of logits become 32, side by side.
                    store16(reinterpret_cast<void *>(to + 2 * (at + further) + 16 * i), packed.part[i]);
                } else if constexpr (sizeof(G) < sizeof(T)) {
                    // A vector's two pieces of logits become 8 bytes each.
                    ATKD_UNROLL
                    for (uint32_t k = 0; k < 2; k++) {
                        uint32_t piece = at + further + k * Tiles::STEP;
                        if (decltype(full)::value || piece < end) {
                            store8(reinterpret_cast<void *>(to + piece / 2), packed.part[i].word[2 * k],
                                   packed.part[i].word[2 * k + 1]);
                        }
                    }
                } else if (decltype(full)::value || at + further + i * Tiles::STEP < end) {
                    store16(reinterpret_cast<void *>(to + at + further + i * Tiles::STEP), packed.part[i]);
                }
            }
        };
        for_vectors<!LARGE_ROW || !Tiles::SPECIALISED>(store_gradient, release);
        if (ATKD_RARELY(has_target)) {
            store(gradient.data + task.target, narrow<G>(scales.target));
        }
        if (ATKD_RARELY(has_edge)) {
            float g[CHUNK];
            gradient_chunk<D, CE_SUM, LARGE_ROW>(p.divergence, scales, exponent, edge<P>(0), edge<Q>(1), g);
            insert_target(gradient.within(task.target, edge_chunk), scales.target, g);
            store_chunk(gradient, edge_chunk, g);
        }
    }
};
// end region

// The packed terms of the second sweep, if there is one.
template <class D, uint32_t SWEEPS = D::SWEEPS> struct SecondState {
    using Packed = PackedState<SecondSweep<D>, false>;
};
template <class D> struct SecondState<D, 1> {
    struct Packed {};
};

// A block's state of a row as it is published to its team. The payload is the state's floats and the ticket, three
// words per message; the state's flag lies beside the first message's epoch. State is a PackedState.
template <class State> struct Exchange {
    static constexpr uint32_t MESSAGES = (State::FLOATS + 1 + 2) / 3, ROOM = ATKD_EXCHANGE_BYTES / 16;
    // Slots lie alike whatever a launch exchanges.
    Bytes16 message[ROOM];
    static_assert(MESSAGES <= ROOM, "the host makes room for so many bytes");

    ATKD_DEVICE void publish(const State &state, uint32_t ticket, uint32_t epoch) {
        ATKD_UNROLL
        for (uint32_t i = 0; i < MESSAGES; i++) {
            Bytes16 payload = {};
            ATKD_UNROLL
            for (uint32_t k = 0; k < 3; k++) {
                uint32_t word = 3 * i + k;
                payload.word[k] = word < State::FLOATS ? state.word[word] : word == State::FLOATS ? ticket : 0;
            }
            payload.word[3] = 2 * epoch + (i == 0 && state.flag() != 0 ? 1 : 0);
            store_message(message + i, payload);
        }
    }

    // Spins until the state of the epoch is there. Returns its ticket.
    ATKD_DEVICE uint32_t gather(State &state, uint32_t epoch) const {
        Messages<MESSAGES> messages = {};
        ATKD_WAIT_FOR_MESSAGES(messages, message, epoch);
        ATKD_UNROLL
        for (uint32_t word = 0; word < State::FLOATS; word++) {
            state.word[word] = messages.part[word / 3].word[word % 3];
        }
        state.set_flag(messages.part[0].word[3] & 1);
        return messages.part[State::FLOATS / 3].word[State::FLOATS % 3];
    }
};

// region: one warp per block
// The producer warp: schedules rows and issues their loads (fetch_task to prefetch), reduces a row's state and its
// scales (reduce), and stores what the loss follows from (refill).
template <class D, bool CE_SUM, class M, uint32_t CONSUMERS> struct Producer {
    using P = typename M::Teacher;
    using Q = typename M::Student;
    using T = typename M::Narrow;
    static constexpr uint32_t OF_TEACHER = M::template WIDTH<P>, OF_STUDENT = M::template WIDTH<Q>;
    using Tiles = Tiling<D, CE_SUM, M, CONSUMERS>;
    const atkd_rows &p;
    StagedMemory staged;
    Shared<D, CE_SUM, M, CONSUMERS> &shared;
    uint32_t lane, count, rank;
    bool elected; // lane 0
    // The next row: the offset up to which its slices have been requested, and each lane's element of its edges.
    uint32_t loaded_until, edge_element;
    // The row after the next, by its index among those to do.
    uint32_t ticket;
    // The row at work: its epoch, its target's logits, and the states of the team's blocks, one per lane.
    uint32_t epoch;
    TargetLogits target_logits;
    PackedState<D, CE_SUM> block_state;
    typename SecondState<D>::Packed block_terms;

    ATKD_DEVICE Producer(const atkd_rows &p_, StagedMemory staged_, Shared<D, CE_SUM, M, CONSUMERS> &shared_)
        : p(p_), staged(staged_), shared(shared_), lane(thread_index() % WARP), count(tokens_to_do(p_)),
          rank(block_index() % p_.team), elected(lane == 0), ticket(block_index() / p_.team + p_.clusters), epoch(0) {}

    // Resolves a row one row ahead, so that its loads can start as soon as there is room and its edges are in shared
    // memory when its slice is.
    ATKD_DEVICE void fetch_task(uint32_t index, uint32_t stage) {
        Task task = {0, 0, NO_TOKEN, 0, NOT_HERE, 0, 0, ATKD_IGNORED, 0, 0, 0};
        LoadSource source = {0, 0, 0};
        loaded_until = 0;
        edge_element = 0;
        if (index < count) {
            resolve(index, task, source);
        }
        if (elected) {
            shared.tasks[stage] = task;
            shared.source[0] = source;
        }
    }
    ATKD_DEVICE void resolve(uint32_t index, Task &task, LoadSource &source) {
        task.token = token_to_do(p, index);
        uint8_t group = load(p.batch.groups + task.token);
        int32_t target = target_of(p.batch, task.token);
        if (group == ATKD_IGNORED || target == IGNORED_TARGET) {
            return;
        }
        Rows<P, Q> rows(p, task.token);
        Slice slice = OF_TEACHER == 1 ? Slice::of(rows.teacher, p.slice, rank) : Slice::of(rows.student, p.slice, rank);
        uint32_t start = slice.first_chunk + slice.full_start;
        loaded_until = slice.full_start * CHUNK * sizeof(T);
        uint32_t end = slice.full_end * CHUNK * sizeof(T);
        source = {reinterpret_cast<uintptr_t>(rows.teacher.at(start)) - OF_TEACHER * loaded_until,
                  reinterpret_cast<uintptr_t>(rows.student.at(start)) - OF_STUDENT * loaded_until, end};
        task.first_chunk = slice.first_chunk;
        task.full_end = slice.full_end;
        task.target = uint32_t(target);
        task.group = group;
        task.full_start = uint8_t(slice.full_start);
        task.has_head = slice.has_head;
        task.has_tail = slice.has_tail;
        // The target's place among the elements that bulk copies bring.
        uint32_t element = task.target + rows.teacher.head - start * CHUNK;
        if (element * sizeof(T) < end - loaded_until) {
            uint32_t piece = element / Tiles::PER, round = piece / CONSUMERS;
            task.target_thread = uint8_t(piece % CONSUMERS);
            task.target_at = task.target_thread * 16 + round / Tiles::PARTS * Tiles::VECTOR;
            task.target_within = uint8_t(round % Tiles::PARTS * Tiles::PER + element % Tiles::PER);
        }
        // Each lane loads one element of the edges: 8 lanes per chunk, in the order of Shared::edges.
        bool in_tail = lane >= 2 * CHUNK;
        uint32_t chunk = slice.first_chunk + (in_tail ? slice.full_end : slice.full_start - 1);
        uint32_t j = chunk * CHUNK + lane % CHUNK - rows.teacher.head;
        bool exists = (in_tail ? slice.has_tail : slice.has_head) && j < p.batch.vocab && j != task.target;
        bool of_teacher = lane / CHUNK % 2 == 0;
        if constexpr (sizeof(P) == sizeof(Q)) {
            edge_element = bits_at(of_teacher ? rows.teacher.data : rows.student.data, j, exists);
        } else {
            edge_element = of_teacher ? bits_at(rows.teacher.data, j, exists) : bits_at(rows.student.data, j, exists);
        }
    }
    // The bits of an element, of -inf if it does not exist.
    template <class X> static ATKD_DEVICE uint32_t bits_at(const X *data, uint32_t j, bool exists) {
        return to_bits(exists ? load(data + j) : narrow<X>(NEG_INF));
    }

    ATKD_DEVICE void place_edges(uint32_t stage) {
        constexpr uint32_t WORDS = 4 * CHUNK * M::EDGE / 4;
        uint32_t next = shuffle_xor(edge_element, 1);
        if (M::EDGE == 4) {
            shared.edges[stage * WORDS + lane] = edge_element;
        } else if (lane % 2 == 0) {
            shared.edges[stage * WORDS + lane / 2] = edge_element | next << 16;
        }
    }

    ATKD_DEVICE void expect() {
        LoadSource source = shared.source[0];
        ATKD_EXPECT(shared.full, 0, (OF_TEACHER + OF_STUDENT) * (source.end - loaded_until));
    }

    // Issues the next row's loads up to offset `room` of its slices.
    ATKD_DEVICE void load_until(uint32_t room) {
        LoadSource source = shared.source[0];
        uint32_t until = room < source.end ? room : source.end;
        if (loaded_until < until) {
            uint32_t teacher_at = OF_TEACHER * loaded_until, student_at = OF_STUDENT * loaded_until;
            uint32_t bytes = until - loaded_until;
            auto *teacher_from = reinterpret_cast<const void *>(source.teacher + teacher_at);
            auto *student_from = reinterpret_cast<const void *>(source.student + student_at);
            ATKD_BULK_LOAD(staged, teacher_at, teacher_from, OF_TEACHER * bytes, shared.full, 0);
            ATKD_BULK_LOAD(staged, student_at + student_offset<M>(p), student_from, OF_STUDENT * bytes, shared.full, 0);
            loaded_until = until;
        }
    }
    // Brings what there is no room for yet into the L2 cache. Any earlier, and it would be evicted before it is used.
    ATKD_DEVICE void prefetch() {
        LoadSource source = shared.source[0];
        if (loaded_until < source.end) {
            uint32_t bytes = source.end - loaded_until;
            bulk_prefetch(reinterpret_cast<const void *>(source.teacher + OF_TEACHER * loaded_until),
                          OF_TEACHER * bytes);
            bulk_prefetch(reinterpret_cast<const void *>(source.student + OF_STUDENT * loaded_until),
                          OF_STUDENT * bytes);
        }
    }

    // Runs beside the max and the sum pass: resolves the next row, draws the ticket of the one after it, and reads the
    // target's logits of this one.
    ATKD_DEVICE void advance(const Task &task, uint32_t stage) {
        epoch += 1;
        fetch_task(shuffle_from(ticket, 0), stage ^ 1);
        if (elected && rank == 0) {
            ticket = 2 * p.clusters + add_atomic(&p.batch.summary->next_ticket, 1);
        }
        sync_warp();
        if (task.group != ATKD_IGNORED) {
            target_logits = target_logits_of<P, Q>(p, task.token, task.target);
        }
    }

    // Runs while the consumers wait: reduces the warps' states to the block's, the blocks' to the row's, and that to
    // the gradient's scales.
    ATKD_DEVICE void reduce(const Task &task) {
        bool ignored = task.group == ATKD_IGNORED;
        auto of_warps = RowState<D, float>::empty();
        if (!ignored) {
            PackedState<D, CE_SUM> packed = shared.warp_states[lane % (CONSUMERS / WARP)];
            of_warps = packed.template state<float>();
            share_maxima<CE_SUM>(of_warps, exponent_of(task));
            of_warps = merge_warp<CE_SUM, CONSUMERS / WARP>(of_warps);
        }
        exchange(of_warps, block_state);
        if (!ignored) {
            Weights weights = shared.weights[0];
            auto scales = scales_of<D, CE_SUM>(p, weights, task.token, task.group, merge_blocks<float>(task),
                                               target_logits, rank == 0);
            if (elected) {
                shared.scales[0] = scales;
            }
        }
    }
    // From the block's state, which lane 0 has, to the states of the team's blocks, one per lane; lanes beyond the team
    // have an empty one.
    template <class Row, class State> ATKD_DEVICE void exchange(const Row &of_block, State &states) {
        states = State::of(elected ? of_block : Row::empty());
        if (p.team > 1) {
            if (elected) {
                slot_of<State>(block_index())->publish(states, ticket, epoch);
            }
            if (lane < p.team) {
                ticket = slot_of<State>(block_index() - rank + lane)->gather(states, epoch);
            }
            sync_warp();
        }
    }
    template <class State> ATKD_DEVICE Exchange<State> *slot_of(uint32_t block) const {
        return static_cast<Exchange<State> *>(p.states) + (epoch & 1) * ATKD_PIPELINED_GRID + block;
    }
    ATKD_DEVICE float exponent_of(const Task &task) const {
        return inverse_temperature_of(p.batch, task.token) * LOG2_E;
    }
    template <class Real> ATKD_DEVICE RowState<D, Real> merge_blocks(const Task &task) const {
        auto state = block_state.template state<Real>();
        share_maxima<CE_SUM>(state, exponent_of(task));
        return merge_warp<CE_SUM>(state);
    }

    // Runs while the consumers wait, after the second sweep: its terms complete the scales.
    ATKD_DEVICE void reduce_terms(const Task &task) {
        if (task.group == ATKD_IGNORED) {
            return;
        }
        using Packed = typename SecondState<D>::Packed;
        epoch += 1;
        const PackedState<D, CE_SUM> &packed = shared.warp_states[lane % (CONSUMERS / WARP)];
        auto of_warps = repacked<Packed>(packed).template state<float>();
        of_warps = merge_warp<false, CONSUMERS / WARP>(of_warps);
        exchange(of_warps, block_terms);
        typename D::Scales scales = shared.scales[0];
        D::finish(p.divergence, scales, merge_warp<false>(block_terms.template state<float>()), scales);
        sync_warp();
        if (elected) {
            shared.scales[0] = scales;
        }
    }

    // Stores a row's margins and, where one sweep finds it, DKD.
    ATKD_DEVICE void store_row_margins(const Task &task) {
        if (rank == 0 && task.group != ATKD_IGNORED) {
            // region: one warp per row
            store_margins<D, CE_SUM>(p, task.token, merge_blocks<double>(task), target_logits);
            // end region
        }
    }

    // Runs beside the gradient pass: loads the next row into the room that this one leaves, and stores this one's
    // margins and DKD.
    ATKD_DEVICE void refill(const Task &task, uint32_t stage) {
        if (elected) {
            expect();
            if (p.gradient == nullptr) {
                load_until(UNLIMITED);
            }
            if (p.team > 1) {
                prefetch();
            }
        }
        place_edges(stage ^ 1);
        ATKD_WAIT(shared.empty, FIRST_TILE, stage);
        if (elected) {
            load_until(task.full_start * CHUNK * uint32_t(sizeof(T)) + Tiles::TILE);
        }
        ATKD_WAIT(shared.empty, REST, stage);
        if (elected) {
            load_until(UNLIMITED);
        }
        if constexpr (D::SWEEPS == 1) {
            store_row_margins(task);
        } else if (rank == 0 && task.group != ATKD_IGNORED) {
            // The scales are complete; but the divergence is wanted in double precision.
            typename D::Scales scales = shared.scales[0];
            auto terms = merge_warp<false>(block_terms.template state<double>());
            store_dkd(p, task.token, D::finish(p.divergence, scales, terms, scales));
        }
    }
};
// end region

} // namespace

// No plan chooses this kernel where there are no bulk copies.
#if ATKD_BULK_COPIES
#define ATKD_ROW_PIPELINED(D, CE_SUM, P, Q, geometry)                                                                  \
    row_pipelined<D, CE_SUM, Models<P, Q>, geometry##_THREADS - WARP>(p)
#else
#define ATKD_ROW_PIPELINED(D, CE_SUM, P, Q, geometry)
#endif

#define ATKD_ROW_PIPELINED_OF(D, suffix, dtype, T)                                                                     \
    ATKD_KERNEL(row_pipelined_##dtype##suffix, atkd_rows, ATKD_PIPELINED) {                                            \
        ATKD_ROW_PIPELINED(D, false, T, T, ATKD_PIPELINED);                                                            \
    }
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_OF, f32, float)
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_OF, f16, f16)
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_OF, bf16, bf16)

// The wide kernels have half as many blocks, twice as large. Those _at_1 are for cross entropy at a temperature other than 1,
// which has a sum of its own.
#define ATKD_ROW_PIPELINED_WIDE_OF(D, suffix, dtype, T)                                                                \
    ATKD_KERNEL(row_pipelined_wide_##dtype##suffix, atkd_rows, ATKD_PIPELINED_WIDE) {                                  \
        ATKD_ROW_PIPELINED(D, false, T, T, ATKD_PIPELINED_WIDE);                                                       \
    }                                                                                                                  \
    ATKD_KERNEL(row_pipelined_wide_at_1_##dtype##suffix, atkd_rows, ATKD_PIPELINED_WIDE) {                             \
        ATKD_ROW_PIPELINED(D, true, T, T, ATKD_PIPELINED_WIDE);                                                        \
    }
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_WIDE_OF, f32, float)
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_WIDE_OF, f16, f16)
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_WIDE_OF, bf16, bf16)

// row_pipelined_wide_<teacher>_<student><divergence>
#define ATKD_ROW_PIPELINED_WIDE_MIXED(D, suffix, teacher, P, student, Q)                                               \
    ATKD_KERNEL(row_pipelined_wide_##teacher##_##student##suffix, atkd_rows, ATKD_PIPELINED_WIDE) {                    \
        ATKD_ROW_PIPELINED(D, false, P, Q, ATKD_PIPELINED_WIDE);                                                       \
    }
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_WIDE_MIXED, f32, float, f16, f16)
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_WIDE_MIXED, f32, float, bf16, bf16)
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_WIDE_MIXED, f16, f16, f32, float)
ATKD_DIVERGENCES(ATKD_ROW_PIPELINED_WIDE_MIXED, bf16, bf16, f32, float)
