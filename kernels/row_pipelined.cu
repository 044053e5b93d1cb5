// Loss and gradient of one token a cluster at a time, whose shared memory holds the whole row of both models:
// each logit is read once, the gradient written once. Rows come and gradients leave by bulk copies. While a
// cluster waits for one, or at its barriers, clusters on the same multiprocessors work; with several stages,
// its own next rows are on their way too.
#include "row.cuh"

namespace {

constexpr uint32_t MOST_STAGES = 4;
template <class T> constexpr uint32_t CHUNK_BYTES = CHUNK * sizeof(T);

// The chunks of a row that are this block's, by their places in its slice.
struct Slice {
    uint32_t start, places;
    // Those that share no 16 bytes with what is not in the row: they come and go by bulk copies.
    uint32_t whole_start, whole_end;

    template <class T> static ATKD_DEVICE Slice of(const Row<const T> &row, uint32_t most) {
        uint32_t chunks = row.chunks();
        uint32_t start = cluster_rank() * most < chunks ? cluster_rank() * most : chunks;
        uint32_t places = most < chunks - start ? most : chunks - start;
        uint32_t whole_start = places > 0 && !row.whole(start) ? 1 : 0;
        bool ends_outside = whole_start < places && !row.whole(start + places - 1);
        return {start, places, whole_start, ends_outside ? places - 1 : places};
    }
    template <class T> ATKD_DEVICE uint32_t whole_bytes() const {
        return (whole_end - whole_start) * CHUNK_BYTES<T>;
    }
};

// What a block needs to know of a row that is on its way.
struct alignas(16) Coming {
    Slice slice;
    // The place of the chunk that holds the target, where in it that is, and the thread whose chunk it is, if a
    // bulk copy brings it to this block.
    uint32_t target_place, target_within, target_thread;
    uint32_t mode;
};

// Where a block's slices lie in its shared memory: stage by stage, the teacher's, then the student's, which
// the gradient replaces.
template <class T> ATKD_DEVICE uint32_t teacher_at(const atkd_rows &p, uint32_t stage) {
    return 2 * stage * p.slice * CHUNK_BYTES<T>;
}
template <class T> ATKD_DEVICE uint32_t student_at(const atkd_rows &p, uint32_t stage) {
    return teacher_at<T>(p, stage) + p.slice * CHUNK_BYTES<T>;
}

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
    const atkd_rows &p;
    uint32_t workers, count, next, stage;
    // Of the next row, if there is one. Known early, it can be asked for as soon as there is room.
    uint32_t token, mode;
    int32_t target;

    ATKD_DEVICE Loader(const atkd_rows &p_, uint32_t workers_)
        : p(p_), workers(workers_), count(tokens_to_do(p_)), next(cluster_index()), stage(0) {}

    ATKD_DEVICE void look() {
        if (next < count) {
            token = token_to_do(p, next);
            mode = load(p.batch.modes + token);
            target = target_of(p.batch, token);
        }
    }

    template <class Comings, class Barriers>
    ATKD_DEVICE void ask(StagedMemory staged, Comings &coming, Barriers &full) {
        if (next >= count) {
            return;
        }
        Rows<T, T> rows(p, token);
        Slice slice = Slice::of(rows.teacher, p.slice);
        Coming row = {slice, 0, 0, 0xffffffffu, mode};
        uint32_t before = slice.whole_start * CHUNK_BYTES<T>, bytes = slice.template whole_bytes<T>();
        if (mode == ATKD_IGNORED || target == IGNORED_TARGET) {
            row.mode = ATKD_IGNORED;
            bytes = 0;
        } else {
            uint32_t target_chunk = rows.chunk_of(uint32_t(target));
            row.target_place = target_chunk - slice.start;
            row.target_within = rows.within(uint32_t(target), target_chunk);
            if (row.target_place >= slice.whole_start && row.target_place < slice.whole_end) {
                row.target_thread = (row.target_place - slice.whole_start) % workers;
            }
        }
        coming[stage] = row;
        ATKD_EXPECT(full, stage, 2 * bytes);
        if (bytes > 0) {
            const T *teacher = rows.teacher.at(slice.start + slice.whole_start);
            const T *student = rows.student.at(slice.start + slice.whole_start);
            ATKD_BULK_LOAD(staged, teacher_at<T>(p, stage) + before, teacher, bytes, full, stage);
            ATKD_BULK_LOAD(staged, student_at<T>(p, stage) + before, student, bytes, full, stage);
        }
        stage = stage + 1 == p.stages ? 0 : stage + 1;
        next += p.clusters;
        look();
    }
};

template <class T> ATKD_DEVICE void row_pipelined(const atkd_rows &p) {
    ATKD_STAGED(staged);
    // Of each stage: the row has come; all threads but the one that asks for rows are done with it.
    ATKD_SHARED(Barrier, full, MOST_STAGES);
    ATKD_SHARED(Barrier, done, MOST_STAGES);
    ATKD_SHARED(Coming, coming, MOST_STAGES);
    ATKD_ROW_SHARED(128);
    // All warps work on the row but the last, which does what takes time and not throughput.
    uint32_t workers = block_threads() - WARP;
    bool works = thread_index() < workers, leads = thread_index() == workers, speaks = leads && cluster_rank() == 0;
    Loader<T> loader(p, workers);
    if (leads) {
        for (uint32_t stage = 0; stage < p.stages; stage++) {
            ATKD_INIT_BARRIER(full, stage, 1);
            ATKD_INIT_BARRIER(done, stage, block_threads() - 1);
        }
        publish_barriers();
    }
    ATKD_SYNC_BLOCK();
    if (leads) {
        loader.look();
        for (uint32_t stage = 0; stage < p.stages; stage++) {
            loader.ask(staged, coming, full);
        }
    }
    float exponent = p.batch.inverse_temperature * LOG2_E;
    uint32_t stage = 0, parity = 0;
    for_tokens(p, [&](uint32_t token) {
        ATKD_WAIT(full, stage, parity);
        Coming row = coming[stage];
        // Kept, and not computed anew for every pass.
        uint32_t at_teacher = forget(teacher_at<T>(p, stage)), at_student = forget(student_at<T>(p, stage));
        if (ATKD_RARELY(row.mode == ATKD_IGNORED)) {
            Rows<T, T> rows(p, token);
            rows.speaks = speaks;
            drop_row<T>(p, rows);
        } else {
            // The row's first chunk and its last, where no bulk copy brings them, are two threads' own to read.
            bool has_start = thread_index() == 0 && row.slice.whole_start > 0;
            bool has_end = has_start || (thread_index() == WARP && row.slice.whole_end < row.slice.places);
            uint32_t end = has_start ? 0 : row.slice.whole_end;
            auto with_end = [&](auto f) {
                Packed<T> teacher, student;
                Rows<T, T>(p, token).load(row.slice.start + end, teacher, student);
                if (end == row.target_place) {
                    take_out(row.target_within, teacher);
                    take_out(row.target_within, student);
                }
                f(teacher, student);
            };
            bool has_target = thread_index() == row.target_thread;
            auto with_target = [&](auto f) {
                uint32_t at = row.target_place * CHUNK_BYTES<T>;
                Packed<T> teacher = load_chunk_staged<T>(staged, at_teacher + at);
                Packed<T> student = load_chunk_staged<T>(staged, at_student + at);
                take_out(row.target_within, teacher);
                take_out(row.target_within, student);
                f(teacher, student);
            };
            auto for_wholes = [&](auto f) {
                for (uint32_t place = row.slice.whole_start + thread_index(); place < row.slice.whole_end;
                     place += workers) {
                    uint32_t at = place * CHUNK_BYTES<T>;
                    f(place, load_chunk_staged<T>(staged, at_teacher + at),
                      load_chunk_staged<T>(staged, at_student + at));
                }
            };
            // All but the target's, which only one warp has to look for.
            auto for_others = [&](auto f) {
                if (ATKD_RARELY(thread_index() / WARP == row.target_thread / WARP)) {
                    for_wholes([&](uint32_t place, const Packed<T> &teacher, const Packed<T> &student) {
                        if (place != row.target_place) {
                            f(teacher, student);
                        }
                    });
                } else {
                    for_wholes([&](uint32_t, const Packed<T> &teacher, const Packed<T> &student) { f(teacher, student); });
                }
            };
            if (works) {
                // The maxima first, so that no sum must be rebased.
                Largest<T> teacher_max, student_max;
                auto add_to_max = [&](const Packed<T> &teacher, const Packed<T> &student) {
                    teacher_max.add(teacher);
                    student_max.add(student);
                };
                for_others(add_to_max);
                if (ATKD_RARELY(has_target)) {
                    with_target(add_to_max);
                }
                if (ATKD_RARELY(has_end)) {
                    with_end(add_to_max);
                }
                auto own = RowState<float>::from(teacher_max.value(), student_max.value(), exponent);
                RowState<float> empty = own;
                for_others([&](const Packed<T> &teacher, const Packed<T> &student) {
                    add<false, false>(own, teacher, student, exponent);
                });
                auto add_with_care = [&](const Packed<T> &teacher, const Packed<T> &student) {
                    add<false, true>(own, teacher, student, exponent);
                };
                if (ATKD_RARELY(!own.finite())) {
                    own = empty;
                    for_others(add_with_care);
                }
                if (ATKD_RARELY(has_target)) {
                    with_target(add_with_care);
                }
                if (ATKD_RARELY(has_end)) {
                    with_end(add_with_care);
                }
                post_state<false>(own, warps);
            } else if (speaks) {
                uint32_t target = (row.slice.start + row.target_place) * CHUNK + row.target_within;
                Rows<T, T> rows(p, token);
                read_target(rows, target - rows.teacher.lead, target_logits);
            }
            ATKD_SYNC_CLUSTER();
            if (!works && cluster_rank() == 0) {
                merge_row(p, uint8_t(row.mode), warps, workers / WARP, whole, scales, target_logits);
            }
            ATKD_SYNC_CLUSTER();
            if (works && p.gradient != nullptr) {
                GradientScales row_scales = ATKD_REMOTE(scales, 0, 0);
                for_wholes([&](uint32_t place, const Packed<T> &teacher, const Packed<T> &student) {
                    float g[CHUNK];
                    gradient_of<false>(row_scales, exponent, teacher, student, g);
                    store_chunk_staged(staged, at_student + place * CHUNK_BYTES<T>, pack<T>(g));
                });
                if (ATKD_RARELY(has_target)) {
                    uint32_t at = at_student + row.target_place * CHUNK_BYTES<T>;
                    Packed<T> packed = load_chunk_staged<T>(staged, at);
                    put(row.target_within, narrow<T>(row_scales.target), packed);
                    store_chunk_staged(staged, at, packed);
                }
                if (ATKD_RARELY(has_end)) {
                    with_end([&](const Packed<T> &teacher, const Packed<T> &student) {
                        float g[CHUNK];
                        gradient_of<false>(row_scales, exponent, teacher, student, g);
                        if (end == row.target_place) {
                            put_target(row.target_within, row_scales.target, g);
                        }
                        store_chunk(Rows<T, T>(p, token).template gradient<T>(p), row.slice.start + end, g);
                    });
                }
                fence_bulk();
            }
        }
        if (!leads) {
            ATKD_ARRIVE(done, stage);
        }
        if (leads) {
            ATKD_WAIT(done, stage, parity);
            uint32_t bytes = row.slice.template whole_bytes<T>();
            if (p.gradient != nullptr && row.mode != ATKD_IGNORED && bytes > 0) {
                Row<T> gradient = Rows<T, T>(p, token).template gradient<T>(p);
                bulk_store(gradient.at(row.slice.start + row.slice.whole_start), staged,
                           at_student + row.slice.whole_start * CHUNK_BYTES<T>, bytes);
                commit_bulk_stores();
                wait_bulk_stores_read();
            }
            loader.ask(staged, coming, full);
            // Beside the next row's way here.
            if (speaks && row.mode != ATKD_IGNORED) {
                tell_terms(p, token, uint8_t(row.mode), whole, target_logits);
            }
        }
        stage = stage + 1 == p.stages ? 0 : stage + 1;
        parity ^= stage == 0 ? 1 : 0;
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
