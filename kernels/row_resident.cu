// Loss and gradient of one token a block at a time, whose registers hold the whole row of both models: each
// logit is read once, the gradient written once. Other blocks on the same multiprocessor read while this one
// waits at its barriers.
#include "row.cuh"

namespace {

template <class T> ATKD_DEVICE void row_resident(const atkd_rows &p, uint32_t token) {
    // Chunks of each model in a thread's registers: 128 bytes.
    constexpr uint32_t HELD = 128 / (CHUNK * sizeof(T));
    ATKD_ROW_SHARED(256);
    Rows<T, T> rows(p, token);
    uint8_t mode = load(p.batch.modes + rows.token);
    int32_t signed_target = target_of(p.batch, rows.token);
    if (mode == ATKD_IGNORED || signed_target == IGNORED_TARGET) {
        drop_row<T>(p, rows);
        return;
    }
    uint32_t chunks = rows.teacher.chunks();
    Packed<T> teacher[HELD], student[HELD];
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        uint32_t chunk = rows.first + i * rows.stride;
        if (chunk < chunks) {
            teacher[i] = load_packed(rows.teacher, chunk);
            student[i] = load_packed(rows.student, chunk);
        }
    }
    uint32_t target = uint32_t(signed_target);
    if (thread_index() == 0) {
        read_target(rows, target, target_logits);
    }

    // The maxima first, so that no sum must be rebased.
    RowState<float> own = RowState<float>::empty();
    bool masked = false;
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        uint32_t chunk = rows.first + i * rows.stride;
        if (chunk < chunks) {
            uint32_t within = rows.within(target, chunk);
            if (within < CHUNK) {
                take_out(within, teacher[i]);
                take_out(within, student[i]);
            }
            float a[CHUNK], b[CHUNK];
            unpack(teacher[i], a);
            unpack(student[i], b);
            own.teacher_max = fmaxf(own.teacher_max, max_of(a));
            own.student_max = fmaxf(own.student_max, max_of(b));
            masked |= fminf(min_of(a), min_of(b)) == OUTSIDE;
        }
    }
    float exponent = p.batch.inverse_temperature * LOG2_E;
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        if (rows.first + i * rows.stride < chunks) {
            float a[CHUNK], b[CHUNK];
            unpack(teacher[i], a);
            unpack(student[i], b);
            add<false>(own, a, b, exponent, masked);
        }
    }
    settle_row(p, rows, mode, own, warps, whole, scales, target_logits);
    if (p.gradient == nullptr) {
        return;
    }
    GradientScales row_scales = scales[0];
    RowState<double> state = whole[0];
    Row<T> gradient = rows.template gradient<T>(p);
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        uint32_t chunk = rows.first + i * rows.stride;
        if (chunk < chunks) {
            float a[CHUNK], b[CHUNK], g[CHUNK];
            unpack(teacher[i], a);
            unpack(student[i], b);
            gradient_of<false>(row_scales, state.teacher_max, state.student_max, exponent, rows.within(target, chunk), a, b, g);
            store_chunk(gradient, chunk, g);
        }
    }
}

template <class T> ATKD_DEVICE void row_resident(const atkd_rows &p) {
    for_tokens(p, [&](uint32_t token) { row_resident<T>(p, token); });
}

} // namespace

ATKD_KERNEL(row_resident_f32, atkd_rows, 256, 2) { row_resident<float>(p); }
ATKD_KERNEL(row_resident_f16, atkd_rows, 256, 2) { row_resident<f16>(p); }
ATKD_KERNEL(row_resident_bf16, atkd_rows, 256, 2) { row_resident<bf16>(p); }
