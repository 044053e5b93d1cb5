// Loss and gradient of one token a cluster at a time, whose shared memory holds the whole row of both models:
// each logit is read once, the gradient written once. Rows come and gradients leave by bulk copies. While a
// cluster waits, for a row or for all of its blocks, others on the same multiprocessors work; with several
// stages, its own next rows are on their way too.
#include "row.cuh"

namespace {

constexpr uint32_t MOST_STAGES = 4, MOST_BLOCKS = 16;
// All warps of a block work on the row but the last, which does what takes time and not throughput.
constexpr uint32_t WORKERS = 128, WORKING_WARPS = WORKERS / WARP;
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

constexpr uint32_t NO_TOKEN = 0xffffffffu;

// What a block needs to know of a row that is on its way.
struct alignas(16) Coming {
    Slice slice;
    uint32_t token; // NO_TOKEN: there is no row to come
    // The target, the place of its chunk, where in that it is, and the thread whose chunk it is, if a bulk copy
    // brings it to this block.
    uint32_t target, target_place;
    uint8_t target_within, target_thread;
    uint8_t mode;
};

// Where a block's slices lie in its shared memory: stage by stage, the teacher's, then the student's, which
// the gradient replaces.
template <class T> ATKD_DEVICE uint32_t teacher_at(const atkd_rows &p, uint32_t stage) {
    return 2 * stage * p.slice * CHUNK_BYTES<T>;
}
template <class T> ATKD_DEVICE uint32_t student_at(const atkd_rows &p, uint32_t stage) {
    return teacher_at<T>(p, stage) + p.slice * CHUNK_BYTES<T>;
}

// Where part i of a chunk lies. Of chunks of two parts, 32 bytes from lane to lane, every other four lanes take the
// second first, or else eight lanes' parts would lie in half of the banks.
template <class T> ATKD_DEVICE uint32_t part_at(uint32_t offset, uint32_t i, bool swapped) {
    return offset + (Packed<T>::PARTS == 2 && swapped ? 16 - 16 * i : 16 * i);
}
ATKD_DEVICE bool swaps_parts() { return (thread_index() & 4) != 0; }

template <class T>
ATKD_DEVICE Packed<T> load_chunk_staged(StagedMemory staged, uint32_t offset, bool swapped = false) {
    Packed<T> packed;
    ATKD_UNROLL
    for (uint32_t i = 0; i < Packed<T>::PARTS; i++) {
        packed.part[i] = load_staged(staged, part_at<T>(offset, i, swapped));
    }
    return packed;
}
template <class T>
ATKD_DEVICE void store_chunk_staged(StagedMemory staged, uint32_t offset, const Packed<T> &packed,
                                    bool swapped = false) {
    ATKD_UNROLL
    for (uint32_t i = 0; i < Packed<T>::PARTS; i++) {
        store_staged(staged, part_at<T>(offset, i, swapped), packed.part[i]);
    }
}

// A state as it is posted in the block and pushed to another.
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
// Of GradientScales, likewise.
struct alignas(16) PushedScales {
    float teacher, student, target, reserved;
};
struct alignas(8) PushedReferences {
    float teacher, student;
};

// What the threads of a block share beside the rows.
struct Shared {
    // Of each stage: the row has come; all warps are done with it.
    ATKD_SHARED_MEMBER(Barrier, full, MOST_STAGES);
    ATKD_SHARED_MEMBER(Barrier, done, MOST_STAGES);
    ATKD_SHARED_MEMBER(Coming, coming, MOST_STAGES);
    // Of the row in turn. The states of the block's warps are there; those of the cluster's blocks, in the first
    // block; what the gradient needs. Nobody writes any of the next row before all have read this one's: a warp
    // posts the next only when it has seen the scales, which follow from all that was posted.
    ATKD_SHARED_MEMBER(Barrier, posted, 1);
    ATKD_SHARED_MEMBER(Barrier, gathered, 1);
    ATKD_SHARED_MEMBER(Barrier, settled, 1);
    ATKD_SHARED_MEMBER(PushedReferences, references, 1);
    ATKD_SHARED_MEMBER(PushedScales, scales, 1);
    ATKD_SHARED_MEMBER(Sums, warp_sums, WORKING_WARPS);
    ATKD_SHARED_MEMBER(Maxima, warp_maxima, WORKING_WARPS);
    ATKD_SHARED_MEMBER(Sums, block_sums, MOST_BLOCKS);
    ATKD_SHARED_MEMBER(Maxima, block_maxima, MOST_BLOCKS);
};

// Asks for rows ahead of their turn; by one thread of the block.
template <class T> struct Loader {
    const atkd_rows &p;
    uint32_t count, next, stage;
    // Of the next row, if there is one. Known early, it can be asked for as soon as there is room.
    uint32_t token;
    uint8_t mode;
    int32_t target;

    ATKD_DEVICE explicit Loader(const atkd_rows &p_)
        : p(p_), count(tokens_to_do(p_)), next(cluster_index()), stage(0) {}

    ATKD_DEVICE void look() {
        token = NO_TOKEN;
        if (next < count) {
            token = token_to_do(p, next);
            mode = load(p.batch.modes + token);
            target = target_of(p.batch, token);
        }
    }

    ATKD_DEVICE void ask(StagedMemory staged, Shared &shared) {
        Coming row = {{0, 0, 0, 0}, token, 0, 0, 0, WORKERS, ATKD_IGNORED};
        uint32_t bytes = 0;
        const T *teacher = nullptr, *student = nullptr;
        if (token != NO_TOKEN) {
            Rows<T, T> rows(p, token);
            row.slice = Slice::of(rows.teacher, p.slice);
            teacher = rows.teacher.at(row.slice.start + row.slice.whole_start);
            student = rows.student.at(row.slice.start + row.slice.whole_start);
            if (mode != ATKD_IGNORED && target != IGNORED_TARGET) {
                row.mode = mode;
                row.target = uint32_t(target);
                bytes = row.slice.template whole_bytes<T>();
                uint32_t target_chunk = rows.chunk_of(uint32_t(target));
                row.target_place = target_chunk - row.slice.start;
                row.target_within = uint8_t(rows.within(uint32_t(target), target_chunk));
                if (row.target_place >= row.slice.whole_start && row.target_place < row.slice.whole_end) {
                    row.target_thread = uint8_t((row.target_place - row.slice.whole_start) % WORKERS);
                }
            }
        }
        shared.coming[stage] = row;
        ATKD_EXPECT(shared.full, stage, 2 * bytes);
        if (bytes > 0) {
            uint32_t before = row.slice.whole_start * CHUNK_BYTES<T>;
            ATKD_BULK_LOAD(staged, teacher_at<T>(p, stage) + before, teacher, bytes, shared.full, stage);
            ATKD_BULK_LOAD(staged, student_at<T>(p, stage) + before, student, bytes, shared.full, stage);
        }
        stage = stage + 1 == p.stages ? 0 : stage + 1;
        next += p.clusters;
        look();
    }
};

// What the working warps do with a row.
template <class T>
ATKD_DEVICE void work(const atkd_rows &p, Shared &shared, StagedMemory staged, const Coming &row, uint32_t at_row,
                      uint32_t to_student, uint32_t parity) {
    // The row's first chunk and its last, where no bulk copy brings them, are two threads' own to read.
    bool has_start = thread_index() == 0 && row.slice.whole_start > 0;
    bool has_end = has_start || (thread_index() == WARP && row.slice.whole_end < row.slice.places);
    uint32_t end = has_start ? 0 : row.slice.whole_end;
    auto with_end = [&](auto f) {
        Packed<T> teacher, student;
        Rows<T, T>(p, row.token).load(row.slice.start + end, teacher, student);
        if (end == row.target_place) {
            take_out(row.target_within, teacher);
            take_out(row.target_within, student);
        }
        f(teacher, student);
    };
    bool has_target = thread_index() == row.target_thread;
    uint32_t target_at = at_row + row.target_place * CHUNK_BYTES<T>;
    auto with_target = [&](auto f) {
        Packed<T> teacher = load_chunk_staged<T>(staged, target_at);
        Packed<T> student = load_chunk_staged<T>(staged, target_at + to_student);
        take_out(row.target_within, teacher);
        take_out(row.target_within, student);
        f(teacher, student);
    };
    bool has_own = has_target || has_end;
    auto for_own = [&](auto f) {
        if (ATKD_RARELY(has_own)) {
            if (has_target) {
                with_target(f);
            }
            if (has_end) {
                with_end(f);
            }
        }
    };
    // The thread's first chunk, and where the whole ones end.
    uint32_t first_at = at_row + (row.slice.whole_start + thread_index()) * CHUNK_BYTES<T>;
    uint32_t end_at = at_row + row.slice.whole_end * CHUNK_BYTES<T>;
    auto for_wholes = [&](auto f) {
        constexpr uint32_t STEP = WORKERS * CHUNK_BYTES<T>, TOGETHER = 4;
        auto one = [&](uint32_t at) {
            f(at, load_chunk_staged<T>(staged, at, swaps_parts()),
              load_chunk_staged<T>(staged, at + to_student, swaps_parts()));
        };
        uint32_t at = first_at;
        ATKD_NO_UNROLL
        for (; at + (TOGETHER - 1) * STEP < end_at; at += TOGETHER * STEP) {
            ATKD_UNROLL
            for (uint32_t i = 0; i < TOGETHER; i++) {
                one(at + i * STEP);
            }
        }
        ATKD_NO_UNROLL
        for (; at < end_at; at += STEP) {
            one(at);
        }
    };
    // All but the target's, which only one warp has to look for.
    auto for_others = [&](auto f) {
        if (ATKD_RARELY(thread_index() / WARP == row.target_thread / WARP)) {
            for_wholes([&](uint32_t at, const Packed<T> &teacher, const Packed<T> &student) {
                if (at != target_at) {
                    f(teacher, student);
                }
            });
        } else {
            for_wholes([&](uint32_t, const Packed<T> &teacher, const Packed<T> &student) { f(teacher, student); });
        }
    };

    // The maxima first, so that no sum must be rebased.
    float exponent = p.batch.inverse_temperature * LOG2_E;
    Largest<T> teacher_max, student_max;
    auto add_to_max = [&](const Packed<T> &teacher, const Packed<T> &student) {
        teacher_max.add(teacher);
        student_max.add(student);
    };
    for_others(add_to_max);
    for_own(add_to_max);
    auto own = RowState<float>::from(teacher_max.value(), student_max.value());
    References references = own.references(exponent);
    RowState<float> empty = own;
    for_others([&](const Packed<T> &teacher, const Packed<T> &student) {
        add<false, false>(own, references, teacher, student, exponent);
    });
    auto add_with_care = [&](const Packed<T> &teacher, const Packed<T> &student) {
        add<false, true>(own, references, teacher, student, exponent);
    };
    if (ATKD_RARELY(!own.finite())) {
        own = empty;
        for_others(add_with_care);
    }
    for_own(add_with_care);
    RowState<float> of_warp = merge_warp<false>(own);
    if (thread_index() % WARP == 0) {
        shared.warp_sums[thread_index() / WARP] = sums_of(of_warp);
        shared.warp_maxima[thread_index() / WARP] = maxima_of(of_warp);
        ATKD_ARRIVE(shared.posted, 0);
    }

    ATKD_WAIT_FOR_PUSHES(shared.settled, 0, parity);
    if (p.gradient == nullptr) {
        return;
    }
    PushedScales scales = shared.scales[0];
    PushedReferences of_row = shared.references[0];
    References of_gradient = {of_row.teacher, of_row.student, 0};
    GradientScales row_scales = {scales.teacher, scales.student, 0, scales.target, of_gradient};
    for_wholes([&](uint32_t at, const Packed<T> &teacher, const Packed<T> &student) {
        float g[CHUNK];
        gradient_of<false>(row_scales, exponent, teacher, student, g);
        store_chunk_staged(staged, at + to_student, pack<T>(g), swaps_parts());
    });
    if (ATKD_RARELY(has_own)) {
        if (has_target) {
            uint32_t at = target_at + to_student;
            Packed<T> packed = load_chunk_staged<T>(staged, at);
            put(row.target_within, narrow<T>(row_scales.target), packed);
            store_chunk_staged(staged, at, packed);
        }
        if (has_end) {
            with_end([&](const Packed<T> &teacher, const Packed<T> &student) {
                float g[CHUNK];
                gradient_of<false>(row_scales, exponent, teacher, student, g);
                if (end == row.target_place) {
                    put_target(row.target_within, row_scales.target, g);
                }
                store_chunk(Rows<T, T>(p, row.token).template gradient<T>(p), row.slice.start + end, g);
            });
        }
    }
    fence_bulk();
}

// What the last warp does meanwhile: from the states of the warps to the block's, and, in the first block, from
// those of all blocks to what the gradient needs.
template <class T>
ATKD_DEVICE void serve(const atkd_rows &p, Shared &shared, const Coming &row, uint32_t parity) {
    uint32_t lane = thread_index() % WARP;
    bool settles = cluster_rank() == 0;
    if (lane == 0) {
        if (settles) {
            ATKD_EXPECT(shared.gathered, 0, cluster_blocks() * uint32_t(sizeof(Sums) + sizeof(Maxima)));
        }
        ATKD_EXPECT(shared.settled, 0, uint32_t(sizeof(PushedScales) + sizeof(PushedReferences)));
    }
    float target_logit = 0;
    if (settles) {
        target_logit = target_logit_of<T, T>(p, row.token, row.target);
    }
    float exponent = p.batch.inverse_temperature * LOG2_E;
    ATKD_WAIT(shared.posted, 0, parity);
    auto of_block = state_of<float>(shared.warp_sums[lane % WORKING_WARPS], shared.warp_maxima[lane % WORKING_WARPS]);
    share_maxima(of_block, exponent);
    of_block = merge_warp<false, WORKING_WARPS>(of_block);
    if (lane == 0) {
        ATKD_PUSH(shared.block_sums, cluster_rank(), 0, sums_of(of_block), shared.gathered, 0);
        ATKD_PUSH(shared.block_maxima, cluster_rank(), 0, maxima_of(of_block), shared.gathered, 0);
    }
    if (settles) {
        ATKD_WAIT_FOR_PUSHES(shared.gathered, 0, parity);
        RowState<double> whole = RowState<double>::empty();
        if (lane % MOST_BLOCKS < cluster_blocks()) {
            whole = state_of<double>(shared.block_sums[lane % MOST_BLOCKS], shared.block_maxima[lane % MOST_BLOCKS]);
        }
        share_maxima(whole, exponent);
        whole = merge_warp<false, MOST_BLOCKS>(whole);
        GradientScales found = settle(p, row.token, row.mode, whole, target_logit, true);
        if (lane < cluster_blocks()) {
            PushedScales scales = {found.teacher, found.student, found.target, 0};
            PushedReferences references = {found.references.teacher, found.references.student};
            ATKD_PUSH(shared.scales, 0, lane, scales, shared.settled, 0);
            ATKD_PUSH(shared.references, 0, lane, references, shared.settled, 0);
        }
    }
}

template <class T> ATKD_DEVICE void row_pipelined(const atkd_rows &p) {
    ATKD_STAGED(staged);
    ATKD_SHARED_STRUCT(Shared, shared);
    uint32_t lane = thread_index() % WARP;
    bool works = thread_index() < WORKERS, leads = thread_index() == WORKERS;
    Loader<T> loader(p);
    if (leads) {
        for (uint32_t stage = 0; stage < p.stages; stage++) {
            ATKD_INIT_BARRIER(shared.full, stage, 1);
            ATKD_INIT_BARRIER(shared.done, stage, WORKING_WARPS);
        }
        ATKD_INIT_BARRIER(shared.posted, 0, WORKING_WARPS);
        ATKD_INIT_BARRIER(shared.gathered, 0, 1);
        ATKD_INIT_BARRIER(shared.settled, 0, 1);
        publish_barriers();
    }
    ATKD_SYNC_CLUSTER();
    if (leads) {
        loader.look();
        for (uint32_t stage = 0; stage < p.stages; stage++) {
            loader.ask(staged, shared);
        }
    }
    uint32_t stage = 0, parity = 0, row_parity = 0;
    for (;;) {
        ATKD_WAIT(shared.full, stage, parity);
        Coming row = shared.coming[stage];
        if (row.token == NO_TOKEN) {
            break;
        }
        // Where the row's teacher lies; the student's is a slice further.
        uint32_t at_row = teacher_at<T>(p, stage), to_student = p.slice * CHUNK_BYTES<T>;
        if (ATKD_RARELY(row.mode == ATKD_IGNORED)) {
            Rows<T, T> rows(p, row.token);
            rows.speaks = leads && cluster_rank() == 0;
            drop_row<T>(p, rows);
        } else {
            if (works) {
                work<T>(p, shared, staged, row, at_row, to_student, row_parity);
            } else {
                serve<T>(p, shared, row, row_parity);
            }
            row_parity ^= 1;
        }
        // Its lanes have read the row, and what is coming.
        sync_warp();
        if (works && lane == 0) {
            ATKD_ARRIVE(shared.done, stage);
        }
        if (leads) {
            ATKD_WAIT(shared.done, stage, parity);
            uint32_t bytes = row.slice.template whole_bytes<T>();
            if (p.gradient != nullptr && row.mode != ATKD_IGNORED && bytes > 0) {
                Row<T> gradient = Rows<T, T>(p, row.token).template gradient<T>(p);
                bulk_store(gradient.at(row.slice.start + row.slice.whole_start), staged,
                           at_row + to_student + row.slice.whole_start * CHUNK_BYTES<T>, bytes);
                commit_bulk_stores();
                wait_bulk_stores_read();
            }
            loader.ask(staged, shared);
        }
        stage = stage + 1 == p.stages ? 0 : stage + 1;
        parity ^= stage == 0 ? 1 : 0;
    }
    if (leads) {
        wait_bulk_stores();
    }
    // No block ends while another pushes to it.
    ATKD_SYNC_CLUSTER();
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
