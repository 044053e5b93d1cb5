// Loss and gradient of one token a cluster whose registers hold the whole row of both models: each logit
// is read once, the gradient written once. The host chooses clusters large enough; blocks of other
// clusters on the same multiprocessor read while this one waits at its barriers.
#include "row.cuh"

namespace {

template <class T> ATKD_DEVICE void row_resident(const atkd_rows &p) {
    // Chunks of each model in a thread's registers: 128 bytes.
    constexpr uint32_t HELD = 128 / (CHUNK * sizeof(T));
    ATKD_ROW_SHARED();
    Rows<T, T> rows(p);
    uint8_t mode = load(p.batch.modes + rows.token);
    int32_t signed_target = target_of(p.batch, rows.token);
    if (ATKD_RARELY(mode == ATKD_IGNORED || signed_target == IGNORED_TARGET)) {
        drop_row<T>(p, rows);
        return;
    }
    uint32_t target = uint32_t(signed_target), chunks = rows.teacher.chunks();
    uint32_t target_chunk = rows.chunk_of(target);
    bool has_edge = rows.wholes == 0 || (rows.first == 0 && rows.teacher.lead > 0), has_target = false;
    Packed<T> teacher[HELD], student[HELD];
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        uint32_t chunk = rows.first + i * rows.stride;
        if (rows.whole(chunk)) {
            teacher[i] = load_whole(rows.teacher, chunk);
            student[i] = load_whole(rows.student, chunk);
        }
        has_edge |= chunk == chunks - 1;
        has_target |= chunk == target_chunk;
    }
    if (ATKD_RARELY(has_edge)) {
        ATKD_UNROLL
        for (uint32_t i = 0; i < HELD; i++) {
            uint32_t chunk = rows.first + i * rows.stride;
            if (chunk < chunks && !rows.whole(chunk)) {
                teacher[i] = load_packed(rows.teacher, chunk);
                student[i] = load_packed(rows.student, chunk);
            }
        }
    }
    if (ATKD_RARELY(has_target)) {
        ATKD_UNROLL
        for (uint32_t i = 0; i < HELD; i++) {
            if (rows.first + i * rows.stride == target_chunk) {
                take_out(rows.within(target, target_chunk), teacher[i]);
                take_out(rows.within(target, target_chunk), student[i]);
            }
        }
    }
    if (thread_index() == 0) {
        read_target(rows, target, target_logits);
    }

    // The maxima first, so that no sum must be rebased.
    Largest<T> teacher_max, student_max;
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        if (rows.first + i * rows.stride < chunks) {
            teacher_max.add(teacher[i]);
            student_max.add(student[i]);
        }
    }
    float exponent = p.batch.inverse_temperature * LOG2_E;
    auto own = RowState<float>::from(teacher_max.value(), student_max.value(), exponent);
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        if (rows.first + i * rows.stride < chunks) {
            float a[CHUNK], b[CHUNK];
            unpack(teacher[i], a);
            unpack(student[i], b);
            add<false>(own, a, b, exponent);
        }
    }
    settle_row(p, rows, mode == ATKD_HARD, own, warps, whole, scales, target_logits);
    if (p.gradient == nullptr) {
        return;
    }
    GradientScales row_scales = scales[0];
    RowState<double> state = whole[0];
    float teacher_reference = state.teacher_reference, student_reference = state.student_reference;
    Row<T> gradient = rows.template gradient<T>(p);
    rows.first = forget(rows.first);
    has_target = false;
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        uint32_t chunk = rows.first + i * rows.stride;
        if (chunk < chunks) {
            float a[CHUNK], b[CHUNK], g[CHUNK];
            unpack(teacher[i], a);
            unpack(student[i], b);
            gradient_of<false>(row_scales, teacher_reference, student_reference, exponent, a, b, g);
            store_chunk(gradient, chunk, g);
            has_target |= chunk == target_chunk;
        }
    }
    if (ATKD_RARELY(has_target)) {
        store(gradient.data + target, narrow<T>(row_scales.target));
    }
}

} // namespace

ATKD_KERNEL(row_resident_f32, atkd_rows, 256, 2) { row_resident<float>(p); }
ATKD_KERNEL(row_resident_f16, atkd_rows, 256, 2) { row_resident<f16>(p); }
ATKD_KERNEL(row_resident_bf16, atkd_rows, 256, 2) { row_resident<bf16>(p); }
