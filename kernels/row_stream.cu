// Loss and gradient of one token a cluster, for any vocabulary, stride and alignment. One pass over the
// row for its state, a second for the gradient, whose reads should hit the L2 cache: the host chooses
// clusters large enough, and so rows in flight few enough.
#include "row.cuh"

namespace {

template <class P, class Q, class G, bool AT_1> ATKD_DEVICE void row_stream(const atkd_rows &p) {
    ATKD_ROW_SHARED();
    Rows<P, Q> rows(p);
    uint8_t mode = load(p.batch.modes + rows.token);
    if (mode == ATKD_IGNORED) {
        drop_row<G>(p, rows);
        return;
    }
    // Every thread reads the label: one cached word, and no barrier to wait at.
    uint32_t target = static_cast<uint32_t>(target_of(p.batch, rows.token));
    if (thread_index() == 0) {
        read_target(rows, target, target_logits);
    }
    RowState<float> own = RowState<float>::empty();
    for (uint32_t chunk = rows.first; chunk < rows.teacher.chunks(); chunk += rows.stride) {
        float a[CHUNK], b[CHUNK];
        load_chunk(rows.teacher, chunk, a);
        load_chunk(rows.student, chunk, b);
        take_out(rows.within(target, chunk), a, b);
        accumulate<AT_1>(own, a, b, p.batch.inverse_temperature);
    }
    settle_row(p, rows, mode == ATKD_HARD, own, warps, whole, scales, target_logits);
    if (p.gradient == nullptr) {
        return;
    }
    GradientScales row_scales = scales[0];
    RowState<double> state = whole[0];
    float exponent = p.batch.inverse_temperature * LOG2_E;
    Row<G> gradient = rows.template gradient<G>(p);
    for (uint32_t chunk = rows.first; chunk < rows.teacher.chunks(); chunk += rows.stride) {
        float a[CHUNK], b[CHUNK], g[CHUNK];
        load_chunk(rows.teacher, chunk, a);
        load_chunk(rows.student, chunk, b);
        uint32_t within = rows.within(target, chunk);
        take_out(within, a, b);
        gradient_of<AT_1>(row_scales, state.teacher_max, state.student_max, exponent, within, a, b, g);
        store_chunk(gradient, chunk, g);
    }
}

template <class P, class Q, class G> ATKD_DEVICE void row_stream(const atkd_rows &p) {
    // Cross entropy at a temperature other than 1 has a sum of its own.
    if (p.objective.ce_weight != 0 && p.objective.inverse_temperature != 1) {
        row_stream<P, Q, G, true>(p);
    } else {
        row_stream<P, Q, G, false>(p);
    }
}

} // namespace

// row_stream_<teacher>_<student>_<gradient>
#define ATKD_ROW_STREAM(teacher, P, student, Q, gradient, G)                                                  \
    ATKD_KERNEL(row_stream_##teacher##_##student##_##gradient, atkd_rows, 384, 2) { row_stream<P, Q, G>(p); }
#define ATKD_ROW_STREAM_OF(teacher, P)                                                                        \
    ATKD_ROW_STREAM(teacher, P, f32, float, f32, float)                                                       \
    ATKD_ROW_STREAM(teacher, P, f16, f16, f16, f16)                                                           \
    ATKD_ROW_STREAM(teacher, P, f16, f16, f32, float)                                                         \
    ATKD_ROW_STREAM(teacher, P, bf16, bf16, bf16, bf16)                                                       \
    ATKD_ROW_STREAM(teacher, P, bf16, bf16, f32, float)

ATKD_ROW_STREAM_OF(f32, float)
ATKD_ROW_STREAM_OF(f16, f16)
ATKD_ROW_STREAM_OF(bf16, bf16)
