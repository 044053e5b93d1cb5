// row_stream: loss and gradient; a cluster or team takes one token at a time, of any vocabulary, stride and
// alignment. One pass over the row for its state, a second for the gradient, whose reads should hit the L2 cache: the
// host chooses clusters or teams large enough, and so rows in flight few enough. A divergence of two sweeps reads the row
// once more in between.
#include "math/divergences.cuh"
#include "row.cuh"

namespace {

template <class D, class P, class Q, class G, bool CE_SUM>
ATKD_DEVICE void row_stream(const atkd_rows &p, uint32_t token) {
    ATKD_ROW_SHARED(D, ATKD_STREAM_THREADS);
    Rows<P, Q> rows(p, token);
    // Every thread reads group and label: cached words, and no barrier to wait at.
    uint8_t group = load(p.batch.groups + rows.token);
    int32_t signed_target = target_of(p.batch, rows.token);
    if (ATKD_RARELY(group == ATKD_IGNORED || signed_target == IGNORED_TARGET)) {
        drop_row<G>(p, rows);
        return;
    }
    uint32_t target = uint32_t(signed_target), target_chunk = rows.teacher.chunk_of(target);
    float exponent = inverse_temperature_of(p.batch, rows.token) * LOG2_E;
    auto own = first_sweep<D, CE_SUM>(rows, target, target_chunk, exponent);
    auto row_scales = reduce_row<D, CE_SUM>(p, rows, group, target, own, warps, scales);
    // Computed again: kept, it would take a register that the reduction needs.
    exponent = inverse_temperature_of(p.batch, opaque(rows.token)) * LOG2_E;
    if constexpr (D::SWEEPS == 2) {
        ATKD_SECOND_SWEEP_SHARED(D, ATKD_STREAM_THREADS);
        auto terms = second_sweep<D, CE_SUM>(p.divergence, rows, target, target_chunk, row_scales, exponent);
        row_scales = reduce_terms<D>(p, rows, terms, warp_terms, scales);
    }
    if (p.gradient == nullptr) {
        return;
    }
    // Expressions of these would otherwise be kept in registers, which the warp that reduces the row needs.
    rows.first = opaque(rows.first);
    rows.full_count = opaque(rows.full_count);
    write_gradient<D, CE_SUM, G>(p, rows, target, target_chunk, row_scales, exponent);
}

template <class D, class P, class Q, class G> ATKD_DEVICE void row_stream(const atkd_rows &p) {
    // Cross entropy at a temperature other than 1 has a sum of its own. (At 1, or without cross entropy, it does no harm.)
    bool not_at_1 = p.objective.inverse_temperature != 1 || p.batch.temperatures != nullptr;
    if constexpr (!D::SPECIALISED) {
        for_tokens(p, [&](uint32_t token) { row_stream<D, P, Q, G, true>(p, token); });
    } else if (ATKD_RARELY(p.objective.ce_weight != 0 && not_at_1)) {
        for_tokens(p, [&](uint32_t token) { row_stream<D, P, Q, G, true>(p, token); });
    } else {
        for_tokens(p, [&](uint32_t token) { row_stream<D, P, Q, G, false>(p, token); });
    }
}

} // namespace

// row_stream_<teacher>_<student>_<gradient><divergence>
#define ATKD_ROW_STREAM(D, suffix, teacher, P, student, Q, gradient, G)                                                \
    ATKD_KERNEL(row_stream_##teacher##_##student##_##gradient##suffix, atkd_rows, ATKD_STREAM) {                       \
        row_stream<D, P, Q, G>(p);                                                                                     \
    }
#define ATKD_ROW_STREAM_OF(teacher, P)                                                                                 \
    ATKD_DIVERGENCES(ATKD_ROW_STREAM, teacher, P, f32, float, f32, float)                                              \
    ATKD_DIVERGENCES(ATKD_ROW_STREAM, teacher, P, f32, float, f16, f16)                                                \
    ATKD_DIVERGENCES(ATKD_ROW_STREAM, teacher, P, f32, float, bf16, bf16)                                              \
    ATKD_DIVERGENCES(ATKD_ROW_STREAM, teacher, P, f16, f16, f16, f16)                                                  \
    ATKD_DIVERGENCES(ATKD_ROW_STREAM, teacher, P, f16, f16, f32, float)                                                \
    ATKD_DIVERGENCES(ATKD_ROW_STREAM, teacher, P, bf16, bf16, bf16, bf16)                                              \
    ATKD_DIVERGENCES(ATKD_ROW_STREAM, teacher, P, bf16, bf16, f32, float)

ATKD_ROW_STREAM_OF(f32, float)
ATKD_ROW_STREAM_OF(f16, f16)
ATKD_ROW_STREAM_OF(bf16, bf16)
