// Loss and gradient of one token a cluster at a time, whose shared memory holds the whole row of both models:
// each logit is read once, the gradient written once. Rows come and gradients leave by bulk copies. While a
// cluster waits for one, or at its barriers, clusters on the same multiprocessors work; with several stages,
// its own next rows are on their way too.
#include "row.cuh"

namespace {

constexpr uint32_t MOST_STAGES = 4;

// The chunks of a row that are this block's.
struct Slice {
    uint32_t start, end;
    // Those that share no 16 bytes with what is not in the row: they come and go by bulk copies.
    uint32_t whole_start, whole_end;

    template <class T> ATKD_DEVICE Slice(const Row<const T> &row, uint32_t most) {
        uint32_t chunks = row.chunks();
        start = cluster_rank() * most < chunks ? cluster_rank() * most : chunks;
        end = most < chunks - start ? start + most : chunks;
        whole_start = start < end && !row.whole(start) ? start + 1 : start;
        whole_end = whole_start < end && !row.whole(end - 1) ? end - 1 : end;
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
    ATKD_DEVICE uint32_t teacher(uint32_t stage, uint32_t place) const {
        return (2 * stage * most + place) * CHUNK_BYTES;
    }
    ATKD_DEVICE uint32_t student(uint32_t stage, uint32_t place) const {
        return ((2 * stage + 1) * most + place) * CHUNK_BYTES;
    }
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
        uint32_t stage = asked % p.stages, place = slice.whole_start - slice.start;
        uint32_t bytes = (slice.whole_end - slice.whole_start) * Stages<T>::CHUNK_BYTES;
        ATKD_EXPECT(full, stage, 2 * bytes);
        if (bytes > 0) {
            ATKD_BULK_LOAD(staged, stages.teacher(stage, place), rows.teacher.at(slice.whole_start), bytes, full, stage);
            ATKD_BULK_LOAD(staged, stages.student(stage, place), rows.student.at(slice.whole_start), bytes, full, stage);
        }
        asked += 1;
        look();
    }
};

template <class T> ATKD_DEVICE void row_pipelined(const atkd_rows &p) {
    ATKD_STAGED(staged);
    ATKD_SHARED(Barrier, full, MOST_STAGES);
    ATKD_ROW_SHARED(256);
    Stages<T> stages(p);
    Loader<T> loader(p, stages);
    bool leads = thread_index() == 0;
    if (leads) {
        for (uint32_t stage = 0; stage < p.stages; stage++) {
            ATKD_INIT_BARRIER(full, stage, 1);
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
        uint8_t mode = load(p.batch.modes + token);
        int32_t signed_target = target_of(p.batch, token);
        if (ATKD_RARELY(mode == ATKD_IGNORED || signed_target == IGNORED_TARGET)) {
            drop_row<T>(p, rows);
            return;
        }
        uint32_t target = uint32_t(signed_target), target_chunk = rows.chunk_of(target);
        if (leads) {
            read_target(rows, target, target_logits);
        }
        // The row's first chunk and its last, where no bulk copy brings them, are two threads' own to read.
        Slice slice(rows.teacher, stages.most);
        bool has_start = leads && slice.start < slice.whole_start;
        bool has_end = has_start || (thread_index() == WARP && slice.whole_end < slice.end);
        uint32_t end = has_start ? slice.start : slice.whole_end;
        auto read_end = [&](Packed<T> &teacher, Packed<T> &student) {
            rows.load(end, teacher, student);
            take_out(rows.within(target, end), teacher);
            take_out(rows.within(target, end), student);
        };
        Largest<T> teacher_max, student_max;
        if (ATKD_RARELY(has_end)) {
            Packed<T> teacher, student;
            read_end(teacher, student);
            teacher_max.add(teacher);
            student_max.add(student);
        }

        uint32_t stage = turn % p.stages;
        ATKD_WAIT(full, stage, turn / p.stages % 2);
        turn += 1;
        auto for_wholes = [&](auto f) {
            for (uint32_t chunk = slice.whole_start + thread_index(); chunk < slice.whole_end; chunk += block_threads()) {
                f(chunk, load_chunk_staged<T>(staged, stages.teacher(stage, chunk - slice.start)),
                  load_chunk_staged<T>(staged, stages.student(stage, chunk - slice.start)));
            }
        };
        // The maxima first, so that no sum must be rebased.
        bool has_target = false;
        for_wholes([&](uint32_t chunk, Packed<T> teacher, Packed<T> student) {
            if (ATKD_RARELY(chunk == target_chunk)) {
                has_target = true;
                take_out(rows.within(target, chunk), teacher);
                take_out(rows.within(target, chunk), student);
            }
            teacher_max.add(teacher);
            student_max.add(student);
        });
        auto own = RowState<float>::from(teacher_max.value(), student_max.value(), exponent);
        RowState<float> empty = own;
        for_wholes([&](uint32_t chunk, const Packed<T> &teacher, const Packed<T> &student) {
            if (chunk != target_chunk) {
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
            for_wholes([&](uint32_t chunk, Packed<T> teacher, Packed<T> student) {
                if (masked || chunk == target_chunk) {
                    take_out(rows.within(target, chunk), teacher);
                    take_out(rows.within(target, chunk), student);
                    add_with_care(teacher, student);
                }
            });
            if (has_end) {
                Packed<T> teacher, student;
                read_end(teacher, student);
                add_with_care(teacher, student);
            }
        }
        settle_row(p, rows, mode, own, warps, whole, scales, target_logits);

        if (p.gradient != nullptr) {
            GradientScales row_scales = scales[0];
            RowState<double> state = whole[0];
            float teacher_reference = state.teacher_reference, student_reference = state.student_reference;
            Row<T> gradient = rows.template gradient<T>(p);
            for_wholes([&](uint32_t chunk, const Packed<T> &teacher, const Packed<T> &student) {
                float a[CHUNK], b[CHUNK], g[CHUNK];
                unpack(teacher, a);
                unpack(student, b);
                gradient_of<false>(row_scales, teacher_reference, student_reference, exponent, a, b, g);
                store_chunk_staged(staged, stages.student(stage, chunk - slice.start), pack<T>(g));
            });
            if (ATKD_RARELY(has_target)) {
                uint32_t at = stages.student(stage, target_chunk - slice.start);
                Packed<T> packed = load_chunk_staged<T>(staged, at);
                put(rows.within(target, target_chunk), narrow<T>(row_scales.target), packed);
                store_chunk_staged(staged, at, packed);
            }
            if (ATKD_RARELY(has_end)) {
                Packed<T> teacher, student;
                read_end(teacher, student);
                float a[CHUNK], b[CHUNK], g[CHUNK];
                unpack(teacher, a);
                unpack(student, b);
                gradient_of<false>(row_scales, teacher_reference, student_reference, exponent, a, b, g);
                put_target(rows.within(target, end), row_scales.target, g);
                store_chunk(gradient, end, g);
            }
            fence_bulk();
            ATKD_SYNC_BLOCK();
            uint32_t bytes = (slice.whole_end - slice.whole_start) * Stages<T>::CHUNK_BYTES;
            if (leads && bytes > 0) {
                bulk_store(gradient.at(slice.whole_start), staged,
                           stages.student(stage, slice.whole_start - slice.start), bytes);
                commit_bulk_stores();
                wait_bulk_stores_read();
            }
        }
        if (leads) {
            loader.ask(staged, full);
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

ATKD_KERNEL(row_pipelined_f32, atkd_rows, 256, 3) { ATKD_ROW_PIPELINED(float); }
ATKD_KERNEL(row_pipelined_f16, atkd_rows, 256, 3) { ATKD_ROW_PIPELINED(f16); }
ATKD_KERNEL(row_pipelined_bf16, atkd_rows, 256, 3) { ATKD_ROW_PIPELINED(bf16); }
