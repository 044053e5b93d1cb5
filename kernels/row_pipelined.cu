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
        : p(p_), stages(stages_), next(block_index() / cluster_blocks()), token(NONE), asked(0) {}

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
        int64_t first = int64_t(slice.whole_start) * CHUNK - rows.teacher.lead;
        ATKD_EXPECT(full, stage, 2 * bytes);
        if (bytes > 0) {
            ATKD_BULK_LOAD(staged, stages.teacher(stage, place), rows.teacher.data + first, bytes, full, stage);
            ATKD_BULK_LOAD(staged, stages.student(stage, place), rows.student.data + first, bytes, full, stage);
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
    float inverse_temperature = p.batch.inverse_temperature, exponent = inverse_temperature * LOG2_E;
    uint32_t turn = 0;
    for_tokens(p, [&](uint32_t token) {
        Rows<T, T> rows(p, token);
        uint8_t mode = load(p.batch.modes + token);
        int32_t signed_target = target_of(p.batch, token);
        if (mode == ATKD_IGNORED || signed_target == IGNORED_TARGET) {
            drop_row<T>(p, rows);
            return;
        }
        uint32_t target = uint32_t(signed_target);
        if (leads) {
            read_target(rows, target, target_logits);
        }
        // The row's first chunk and its last, where no bulk copy brings them, are two threads' own to read.
        Slice slice(rows.teacher, stages.most);
        bool has_start = leads && slice.start < slice.whole_start;
        bool has_end = thread_index() == WARP && slice.whole_end < slice.end;
        uint32_t end = has_start ? slice.start : slice.whole_end;
        Packed<T> teacher_end = {}, student_end = {};
        if (has_start || has_end) {
            teacher_end = load_packed(rows.teacher, end);
            student_end = load_packed(rows.student, end);
            take_out(rows.within(target, end), teacher_end);
            take_out(rows.within(target, end), student_end);
        }

        uint32_t stage = turn % p.stages;
        ATKD_WAIT(full, stage, turn / p.stages % 2);
        turn += 1;
        RowState<float> own = RowState<float>::empty();
        auto add_chunk = [&](const Packed<T> &teacher, const Packed<T> &student) {
            float a[CHUNK], b[CHUNK];
            unpack(teacher, a);
            unpack(student, b);
            accumulate<false>(own, a, b, inverse_temperature);
        };
        for (uint32_t chunk = slice.whole_start + thread_index(); chunk < slice.whole_end; chunk += block_threads()) {
            uint32_t at_teacher = stages.teacher(stage, chunk - slice.start);
            uint32_t at_student = stages.student(stage, chunk - slice.start);
            Packed<T> teacher = load_chunk_staged<T>(staged, at_teacher);
            Packed<T> student = load_chunk_staged<T>(staged, at_student);
            uint32_t within = rows.within(target, chunk);
            if (within < CHUNK) {
                take_out(within, teacher);
                take_out(within, student);
                store_chunk_staged(staged, at_teacher, teacher);
                store_chunk_staged(staged, at_student, student);
                fence_bulk();
            }
            add_chunk(teacher, student);
        }
        if (has_start || has_end) {
            add_chunk(teacher_end, student_end);
        }
        settle_row(p, rows, mode, own, warps, whole, scales, target_logits);

        if (p.gradient != nullptr) {
            GradientScales row_scales = scales[0];
            RowState<double> state = whole[0];
            float teacher_max = state.teacher_max, student_max = state.student_max;
            Row<T> gradient = rows.template gradient<T>(p);
            auto gradient_at = [&](uint32_t chunk, const Packed<T> &teacher, const Packed<T> &student,
                                   float (&g)[CHUNK]) {
                float a[CHUNK], b[CHUNK];
                unpack(teacher, a);
                unpack(student, b);
                gradient_of<false>(row_scales, teacher_max, student_max, exponent, rows.within(target, chunk), a, b, g);
            };
            for (uint32_t chunk = slice.whole_start + thread_index(); chunk < slice.whole_end;
                 chunk += block_threads()) {
                uint32_t at_student = stages.student(stage, chunk - slice.start);
                float g[CHUNK];
                gradient_at(chunk, load_chunk_staged<T>(staged, stages.teacher(stage, chunk - slice.start)),
                            load_chunk_staged<T>(staged, at_student), g);
                store_chunk_staged(staged, at_student, pack<T>(g));
            }
            if (has_start || has_end) {
                float g[CHUNK];
                gradient_at(end, load_packed(rows.teacher, end), load_packed(rows.student, end), g);
                store_chunk(gradient, end, g);
            }
            fence_bulk();
            ATKD_SYNC_BLOCK();
            uint32_t bytes = (slice.whole_end - slice.whole_start) * Stages<T>::CHUNK_BYTES;
            if (leads && bytes > 0) {
                bulk_store(gradient.data + (int64_t(slice.whole_start) * CHUNK - gradient.lead), staged,
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
