// Loss and gradient of one token a cluster, for any vocabulary, stride and alignment. One pass over the
// row for its state, a second for the gradient, whose reads should hit the L2 cache: the host chooses
// clusters large enough, and so rows in flight few enough.
#include "batch.cuh"
#include "reduce.cuh"

namespace {

// Chunk `chunk` of both models, the target taken out.
template <class P, class Q>
ATKD_DEVICE void load_pair(const Row<const P> &teacher, const Row<const Q> &student, uint32_t chunk, uint32_t target,
                           float (&a)[CHUNK], float (&b)[CHUNK]) {
    load_chunk(teacher, chunk, a);
    load_chunk(student, chunk, b);
    uint32_t within = target - (chunk * CHUNK - teacher.lead);
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        if (within == k) {
            a[k] = b[k] = OUTSIDE;
        }
    }
}

template <class G> ATKD_DEVICE Row<G> gradient_row(const atkd_row_stream &p, uint32_t token, uint32_t lead) {
    return Row<G>(static_cast<G *>(p.gradient) + int64_t(token) * p.gradient_stride, p.batch.vocab, lead);
}

template <class P, class Q, class G, bool AT_1> ATKD_DEVICE void row_stream(const atkd_row_stream &p) {
    ATKD_SHARED(RowState<double>, warps, MAX_WARPS);
    ATKD_SHARED(GradientScales, shared_scales, 1);
    ATKD_SHARED(float, shared_maxima, 2);
    ATKD_SHARED(float, target_logits, 2);

    uint32_t token = block_index() / cluster_blocks(), vocab = p.batch.vocab;
    // Chunks of a row are dealt to the threads of the cluster in turn.
    uint32_t first = cluster_rank() * block_threads() + thread_index(), stride = cluster_blocks() * block_threads();
    bool speaks = cluster_rank() == 0 && thread_index() == 0;
    const P *teacher_row = static_cast<const P *>(p.batch.teacher) + int64_t(token) * p.batch.teacher_stride;
    const Q *student_row = static_cast<const Q *>(p.student) + int64_t(token) * p.student_stride;
    uint32_t lead = lead_of(teacher_row);
    Row<const P> teacher(teacher_row, vocab, lead);
    Row<const Q> student(student_row, vocab, lead);

    uint8_t mode = load(p.batch.modes + token);
    if (mode == ATKD_IGNORED) {
        float zeros[CHUNK] = {};
        for (uint32_t chunk = first; p.gradient != nullptr && chunk < teacher.chunks(); chunk += stride) {
            store_chunk(gradient_row<G>(p, token, lead), chunk, zeros);
        }
        if (speaks) {
            store(p.uncertainty + token, 0.0f);
            store(p.tkd + token, 0.0f);
            store(p.dkd + token, 0.0f);
            store(p.loss + token, 0.0);
            if (p.write_keys != 0) {
                store(p.batch.keys + token, 0u);
            }
        }
        return;
    }

    // Every thread reads the label: one cached word, and no barrier to wait at.
    uint32_t target = static_cast<uint32_t>(target_of(p.batch, token));
    float inverse_temperature = p.batch.inverse_temperature, exponent = inverse_temperature * LOG2_E;
    if (thread_index() == 0) {
        // Before a gradient in place overwrites it.
        target_logits[0] = widen(load(teacher_row + target));
        target_logits[1] = widen(load(student_row + target));
    }

    RowState<float> own = RowState<float>::empty();
    for (uint32_t chunk = first; chunk < teacher.chunks(); chunk += stride) {
        float a[CHUNK], b[CHUNK];
        load_pair(teacher, student, chunk, target, a, b);
        accumulate<AT_1>(own, a, b, inverse_temperature);
    }
    RowState<double> of_warp = merge_warp(own, exponent);
    if (thread_index() % WARP == 0) {
        warps[thread_index() / WARP] = of_warp;
    }
    ATKD_SYNC_CLUSTER();
    // One warp of each block merges, rather than one that the other blocks would wait for.
    RowState<double> state;
    Margins margins;
    if (thread_index() < WARP) {
        state = merge_cluster(warps, exponent);
        if (thread_index() == 0) {
            double scale = p.mean != 0 ? p.scale / double(load(&p.batch.summary->counted_valid)) : p.scale;
            scale *= p.upstream == nullptr ? 1.0 : double(load(p.upstream));
            margins = margins_of(p.objective, state, target_logits[0], target_logits[1]);
            shared_scales[0] = scales_of(p.objective, state, margins, mode == ATKD_HARD, scale);
            shared_maxima[0] = state.teacher_max;
            shared_maxima[1] = state.student_max;
        }
    }
    // Before other blocks' shared memory is gone, and this block's scales are read.
    ATKD_SYNC_CLUSTER();
    if (speaks) {
        Terms terms = terms_of(p.objective, state, margins, mode == ATKD_HARD);
        store(p.uncertainty + token, float(terms.uncertainty));
        store(p.tkd + token, float(terms.tkd));
        store(p.dkd + token, float(terms.dkd));
        store(p.loss + token, terms.loss);
        if (p.write_keys != 0) {
            store(p.batch.keys + token, key_of(float(margins.teacher)));
        }
    }
    if (p.gradient == nullptr) {
        return;
    }
    GradientScales scales = shared_scales[0];
    float teacher_max = shared_maxima[0], student_max = shared_maxima[1];
    Row<G> gradient = gradient_row<G>(p, token, lead);
    for (uint32_t chunk = first; chunk < teacher.chunks(); chunk += stride) {
        float a[CHUNK], b[CHUNK], g[CHUNK];
        load_pair(teacher, student, chunk, target, a, b);
        uint32_t within = target - (chunk * CHUNK - lead);
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            float db = b[k] - student_max;
            float value = scales.student * exp2_fast(db * exponent) -
                          scales.teacher * exp2_fast((a[k] - teacher_max) * exponent);
            if (AT_1) {
                value += scales.student_at_1 * exp2_fast(db * LOG2_E);
            }
            g[k] = within == k ? scales.target : value;
        }
        store_chunk(gradient, chunk, g);
    }
}

template <class P, class Q, class G> ATKD_DEVICE void row_stream(const atkd_row_stream &p) {
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
    ATKD_KERNEL(row_stream_##teacher##_##student##_##gradient, atkd_row_stream, 384, 2) { row_stream<P, Q, G>(p); }
#define ATKD_ROW_STREAM_OF(teacher, P)                                                                        \
    ATKD_ROW_STREAM(teacher, P, f32, float, f32, float)                                                       \
    ATKD_ROW_STREAM(teacher, P, f16, f16, f16, f16)                                                           \
    ATKD_ROW_STREAM(teacher, P, f16, f16, f32, float)                                                         \
    ATKD_ROW_STREAM(teacher, P, bf16, bf16, bf16, bf16)                                                       \
    ATKD_ROW_STREAM(teacher, P, bf16, bf16, f32, float)

ATKD_ROW_STREAM_OF(f32, float)
ATKD_ROW_STREAM_OF(f16, f16)
ATKD_ROW_STREAM_OF(bf16, bf16)
