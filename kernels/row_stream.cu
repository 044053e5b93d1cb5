// Loss and gradient of one token a cluster at a time, for any vocabulary, stride and alignment. One pass over the
// row for its state, a second for the gradient, whose reads should hit the L2 cache: the host chooses
// clusters large enough, and so rows in flight few enough.
#include "row.cuh"

namespace {

template <class P, class Q, class G, bool AT_1> ATKD_DEVICE void row_stream(const atkd_rows &p, uint32_t token) {
    ATKD_ROW_SHARED(384);
    Rows<P, Q> rows(p, token);
    // Every thread reads mode and label: cached words, and no barrier to wait at.
    uint8_t mode = load(p.batch.modes + rows.token);
    int32_t target = target_of(p.batch, rows.token);
    if (mode == ATKD_IGNORED || target == IGNORED_TARGET) {
        drop_row<G>(p, rows);
        return;
    }
    if (thread_index() == 0) {
        read_target(rows, uint32_t(target), target_logits);
    }
    RowState<float> own = RowState<float>::empty();
    float inverse_temperature = p.batch.inverse_temperature;
    for_chunks(rows, uint32_t(target),
               [&](uint32_t, uint32_t, const float (&a)[CHUNK], const float (&b)[CHUNK]) {
                   accumulate<AT_1>(own, a, b, inverse_temperature);
               });
    settle_row(p, rows, mode, own, warps, whole, scales, target_logits);
    if (p.gradient == nullptr) {
        return;
    }
    GradientScales row_scales = scales[0];
    RowState<double> state = whole[0];
    float teacher_max = state.teacher_max, student_max = state.student_max, exponent = inverse_temperature * LOG2_E;
    Row<G> gradient = rows.template gradient<G>(p);
    for_chunks(rows, uint32_t(target),
               [&](uint32_t chunk, uint32_t within, const float (&a)[CHUNK], const float (&b)[CHUNK]) {
                   float g[CHUNK];
                   gradient_of<AT_1>(row_scales, teacher_max, student_max, exponent, within, a, b, g);
                   store_chunk(gradient, chunk, g);
               });
}

template <class P, class Q, class G> ATKD_DEVICE void row_stream(const atkd_rows &p) {
    // Cross entropy at a temperature other than 1 has a sum of its own.
    if (p.objective.ce_weight != 0 && p.objective.inverse_temperature != 1) {
        for_tokens(p, [&](uint32_t token) { row_stream<P, Q, G, true>(p, token); });
    } else {
        for_tokens(p, [&](uint32_t token) { row_stream<P, Q, G, false>(p, token); });
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
