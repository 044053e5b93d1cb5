// Loss and gradient of one token a cluster at a time, whose shared memory holds the whole row of both models:
// each logit is read once, the gradient written once. Rows come and gradients leave by bulk copies. While a
// cluster waits for one, or at its barriers, clusters on the same multiprocessors work; with several stages,
// its own next rows are on their way too.
#include "row.cuh"

namespace {

constexpr uint32_t MOST_STAGES = 4;

// The chunks of a row that are this block's, by their places in its slice.
struct Slice {
    uint32_t start, places;
    // Those that share no 16 bytes with what is not in the row: they come and go by bulk copies.
    uint32_t whole_start, whole_end;

    template <class T> ATKD_DEVICE Slice(const Row<const T> &row, uint32_t most) {
        uint32_t chunks = row.chunks();
        start = cluster_rank() * most < chunks ? cluster_rank() * most : chunks;
        places = most < chunks - start ? most : chunks - start;
        whole_start = places > 0 && !row.whole(start) ? 1 : 0;
        whole_end = whole_start < places && !row.whole(start + places - 1) ? places - 1 : places;
    }
    template <class T> ATKD_DEVICE uint32_t whole_bytes() const {
        return (whole_end - whole_start) * uint32_t(CHUNK * sizeof(T));
    }
};

// Where a block's slices lie in its shared memory: stage by stage, the teacher's, then the student's, which
// the gradient replaces.
template <class T> struct Stages {
    static constexpr uint32_t CHUNK_BYTES = CHUNK * sizeof(T);
    // Chunks that there is room for in a slice. A row that starts off a chunk's boundary has one more.
    uint32_t most;

    ATKD_DEVICE explicit Stages(const atkd_rows &p) {
        uint32_t chunks = (p.batch.vocab + CHUNK - 1 + CHUNK - 1) / CHUNK;
        most = (chunks + cluster_blocks() - 1) / cluster_blocks();
    }
    ATKD_DEVICE uint32_t teacher(uint32_t stage) const { return 2 * stage * most * CHUNK_BYTES; }
    ATKD_DEVICE uint32_t student(uint32_t stage) const { return (2 * stage + 1) * most * CHUNK_BYTES; }
};

template <class T> ATKD_DEVICE Packed<T> load_chunk_staged(StagedMemory staged, uint32_t offset) {
    Packed<T> packed;
    ATKD_UNROLL
    for (uint32_t i = 0; i < Packed<T>::PARTS; i++) {
        packed.part[i] = load_staged(staged, offset + 16 * i);
    }
    return packed;
}
template <class T>
ATKD_DEVICE void store_chunk_staged(StagedMemory staged, uint32_t offset, const Packed<T> &packed) {
    ATKD_UNROLL
    for (uint32_t i = 0; i < Packed<T>::PARTS; i++) {
        store_staged(staged, offset + 16 * i, packed.part[i]);
    }
}

// Asks for rows ahead of their turn; by one thread of the block.
template <class T> struct Loader {
    static constexpr uint32_t NONE = 0xffffffffu;
    const atkd_rows &p;
    Stages<T> stages;
    uint32_t next, token, asked;

    ATKD_DEVICE Loader(const atkd_rows &p_, const Stages<T> &stages_)
        : p(p_), stages(stages_), next(cluster_index()), token(NONE), asked(0) {}

    // Which row is next. Known early, it can be asked for as soon as there is room.
    ATKD_DEVICE void look() {
        uint32_t count = tokens_to_do(p);
        token = NONE;
        while (token == NONE && next < count) {
            uint32_t candidate = token_to_do(p, next);
            next += p.clusters;
            bool ignored = load(p.batch.modes + candidate) == ATKD_IGNORED ||
                           target_of(p.batch, candidate) == IGNORED_TARGET;
            token = ignored ? NONE : candidate;
        }
    }

    template <class Barriers> ATKD_DEVICE void ask(StagedMemory staged, Barriers &full) {
        if (token == NONE) {
            return;
        }
        Rows<T, T> rows(p, token);
        Slice slice(rows.teacher, stages.most);
        uint32_t stage = asked % p.stages, before = slice.whole_start * Stages<T>::CHUNK_BYTES;
        uint32_t bytes = slice.template whole_bytes<T>();
        ATKD_EXPECT(full, stage, 2 * bytes);
        if (bytes > 0) {
            const T *teacher = rows.teacher.at(slice.start + slice.whole_start);
            const T *student = rows.student.at(slice.start + slice.whole_start);
            ATKD_BULK_LOAD(staged, stages.teacher(stage) + before, teacher, bytes, full, stage);
            ATKD_BULK_LOAD(staged, stages.student(stage) + before, student, bytes, full, stage);
        }
        asked += 1;
        look();
    }
};

template <class T> ATKD_DEVICE void row_pipelined(const atkd_rows &p) {
    ATKD_STAGED(staged);
    // Of each stage: the row has come; its gradient is complete.
    ATKD_SHARED(Barrier, full, MOST_STAGES);
    ATKD_SHARED(Barrier, written, MOST_STAGES);
    ATKD_ROW_SHARED(128);
    // All warps work on the row but the last, which does what takes time and not throughput.
    uint32_t workers = block_threads() - WARP;
    bool works = thread_index() < workers, leads = thread_index() == workers;
    Stages<T> stages(p);
    Loader<T> loader(p, stages);
    if (leads) {
        for (uint32_t stage = 0; stage < p.stages; stage++) {
            ATKD_INIT_BARRIER(full, stage, 1);
            ATKD_INIT_BARRIER(written, stage, workers);
        }
        publish_barriers();
    }
    ATKD_SYNC_BLOCK();
    if (leads) {
        loader.look();
        for (uint32_t stage = 0; stage < p.stages; stage++) {
            loader.ask(staged, full);
        }
    }
    float exponent = p.batch.inverse_temperature * LOG2_E;
    uint32_t turn = 0;
    for_tokens(p, [&](uint32_t token) {
        Rows<T, T> rows(p, token);
        rows.speaks = leads && cluster_rank() == 0;
        uint8_t mode = load(p.batch.modes + token);
        int32_t signed_target = target_of(p.batch, token);
        if (ATKD_RARELY(mode == ATKD_IGNORED || signed_target == IGNORED_TARGET)) {
            drop_row<T>(p, rows);
            return;
        }
        uint32_t target = uint32_t(signed_target);
        Slice slice(rows.teacher, stages.most);
        uint32_t stage = turn % p.stages, parity = turn / p.stages % 2;
        turn += 1;
        uint32_t at_teacher = stages.teacher(stage), at_student = stages.student(stage);

        // The row's first chunk and its last, where no bulk copy brings them, are two threads' own to read.
        bool has_start = thread_index() == 0 && slice.whole_start > 0;
        bool has_end = has_start || (thread_index() == WARP && slice.whole_end < slice.places);
        uint32_t end = slice.start + (has_start ? 0 : slice.whole_end), end_target = rows.within(target, end);
        auto with_end = [&](auto f) {
            Packed<T> teacher, student;
            rows.load(end, teacher, student);
            take_out(end_target, teacher);
            take_out(end_target, student);
            f(teacher, student);
        };
        uint32_t first = slice.whole_start + thread_index();
        auto for_wholes = [&](auto f) {
            for (uint32_t place = first; place < slice.whole_end; place += workers) {
                uint32_t at = place * Stages<T>::CHUNK_BYTES;
                f(place, load_chunk_staged<T>(staged, at_teacher + at), load_chunk_staged<T>(staged, at_student + at));
            }
        };
        // Where the target is in a chunk that a bulk copy brings, and whose chunk that is.
        uint32_t target_place = rows.chunk_of(target) - slice.start, target_within = rows.within(target, rows.chunk_of(target));
        bool has_target = false;
        if (works) {
            // The maxima first, so that no sum must be rebased.
            Largest<T> teacher_max, student_max;
            auto add_to_max = [&](const Packed<T> &teacher, const Packed<T> &student) {
                teacher_max.add(teacher);
                student_max.add(student);
            };
            if (ATKD_RARELY(has_end)) {
                with_end(add_to_max);
            }
            ATKD_WAIT(full, stage, parity);
            for_wholes([&](uint32_t place, Packed<T> teacher, Packed<T> student) {
                if (ATKD_RARELY(place == target_place)) {
                    has_target = true;
                    take_out(target_within, teacher);
                    take_out(target_within, student);
                }
                add_to_max(teacher, student);
            });
            auto own = RowState<float>::from(teacher_max.value(), student_max.value(), exponent);
            RowState<float> empty = own;
            for_wholes([&](uint32_t place, const Packed<T> &teacher, const Packed<T> &student) {
                if (place != target_place) {
                    float a[CHUNK], b[CHUNK];
                    unpack(teacher, a);
                    unpack(student, b);
                    add<false, false>(own, a, b, exponent);
                }
            });
            bool masked = !own.finite();
            if (ATKD_RARELY(has_end || has_target || masked)) {
                own = masked ? empty : own;
                auto add_with_care = [&](const Packed<T> &teacher, const Packed<T> &student) {
                    float a[CHUNK], b[CHUNK];
                    unpack(teacher, a);
                    unpack(student, b);
                    add<false, true>(own, a, b, exponent);
                };
                for_wholes([&](uint32_t place, Packed<T> teacher, Packed<T> student) {
                    if (place == target_place) {
                        take_out(target_within, teacher);
                        take_out(target_within, student);
                    } else if (!masked) {
                        return;
                    }
                    add_with_care(teacher, student);
                });
                if (has_end) {
                    with_end(add_with_care);
                }
            }
            post_state<false>(own, warps);
        } else if (rows.speaks) {
            read_target(rows, target, target_logits);
        }
        ATKD_SYNC_CLUSTER();
        if (!works && cluster_rank() == 0) {
            merge_row(p, mode, warps, workers / WARP, whole, scales, target_logits);
        }
        ATKD_SYNC_CLUSTER();
        if (works && p.gradient != nullptr) {
            GradientScales row_scales = ATKD_REMOTE(scales, 0, 0);
            for_wholes([&](uint32_t place, const Packed<T> &teacher, const Packed<T> &student) {
                float a[CHUNK], b[CHUNK], g[CHUNK];
                unpack(teacher, a);
                unpack(student, b);
                gradient_of<false>(row_scales, exponent, a, b, g);
                store_chunk_staged(staged, at_student + place * Stages<T>::CHUNK_BYTES, pack<T>(g));
            });
            if (ATKD_RARELY(has_target)) {
                uint32_t at = at_student + target_place * Stages<T>::CHUNK_BYTES;
                Packed<T> packed = load_chunk_staged<T>(staged, at);
                put(target_within, narrow<T>(row_scales.target), packed);
                store_chunk_staged(staged, at, packed);
            }
            if (ATKD_RARELY(has_end)) {
                with_end([&](const Packed<T> &teacher, const Packed<T> &student) {
                    float a[CHUNK], b[CHUNK], g[CHUNK];
                    unpack(teacher, a);
                    unpack(student, b);
                    gradient_of<false>(row_scales, exponent, a, b, g);
                    put_target(end_target, row_scales.target, g);
                    store_chunk(rows.template gradient<T>(p), end, g);
                });
            }
            fence_bulk();
            ATKD_ARRIVE(written, stage);
        }
        if (leads) {
            uint32_t bytes = slice.template whole_bytes<T>();
            if (p.gradient != nullptr) {
                ATKD_WAIT(written, stage, parity);
                if (bytes > 0) {
                    bulk_store(rows.template gradient<T>(p).at(slice.start + slice.whole_start), staged,
                               at_student + slice.whole_start * Stages<T>::CHUNK_BYTES, bytes);
                    commit_bulk_stores();
                    wait_bulk_stores_read();
                }
            }
            loader.ask(staged, full);
        }
        // Beside the next row's way here.
        if (rows.speaks) {
            tell_terms(p, rows, mode, whole, target_logits);
        }
    });
    if (leads) {
        wait_bulk_stores();
    }
}

} // namespace

// Nothing where there are no bulk copies: no plan chooses it there.
#if defined(__CUDACC__) && __CUDA_ARCH__ < 900
#define ATKD_ROW_PIPELINED(T)
#else
#define ATKD_ROW_PIPELINED(T) row_pipelined<T>(p)
#endif

ATKD_KERNEL(row_pipelined_f32, atkd_rows, 160, 3) { ATKD_ROW_PIPELINED(float); }
ATKD_KERNEL(row_pipelined_f16, atkd_rows, 160, 3) { ATKD_ROW_PIPELINED(f16); }
ATKD_KERNEL(row_pipelined_bf16, atkd_rows, 160, 3) { ATKD_ROW_PIPELINED(bf16); }
