// row_resident: loss and gradient; a block takes one token at a time, and its registers hold the row of both models:
// each logit is read once, the gradient written once. Other blocks on the same multiprocessor read while this one
// waits at its barriers.
#include "math/divergences.cuh"
#include "row.cuh"

namespace {

template <class D, class T> ATKD_DEVICE void row_resident(const atkd_rows &p, uint32_t token) {
    // Chunks of each model in a thread's registers: 128 bytes.
    constexpr uint32_t HELD = ATKD_HELD_BYTES / (CHUNK * sizeof(T));
    ATKD_ROW_SHARED(D, ATKD_RESIDENT_THREADS);
    Rows<T, T> rows(p, token);
    uint8_t group = load(p.batch.groups + rows.token);
    int32_t signed_target = target_of(p.batch, rows.token);
    if (ATKD_RARELY(group == ATKD_IGNORED || signed_target == IGNORED_TARGET)) {
        drop_row<T>(p, rows);
        return;
    }
    uint32_t target = uint32_t(signed_target), target_chunk = rows.teacher.chunk_of(target);
    // Bit i of `held`: chunk i exists; of `plain`: it is full as well, and has not the target.
    uint32_t held = 0, plain = 0;
    Packed<T> teacher[HELD], student[HELD];
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        uint32_t chunk = rows.first + i * rows.stride;
        held |= (chunk < rows.teacher.chunks() ? 1u : 0u) << i;
        if (rows.full(chunk)) {
            teacher[i] = load_full(rows.teacher, chunk);
            student[i] = load_full(rows.student, chunk);
            plain |= (chunk != target_chunk ? 1u : 0u) << i;
        }
    }
    if (ATKD_RARELY(held != plain)) {
        ATKD_UNROLL
        for (uint32_t i = 0; i < HELD; i++) {
            uint32_t chunk = rows.first + i * rows.stride;
            if (((held & ~plain) >> i & 1) != 0) {
                if (!rows.full(chunk)) {
                    rows.load(chunk, teacher[i], student[i]);
                }
                mask_out(rows.teacher.within(target, chunk), teacher[i]);
                mask_out(rows.teacher.within(target, chunk), student[i]);
            }
        }
    }

    // The maxima are known before the sums, which then need no rescaling.
    Maxima<D::CROSS, T> maxima;
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        if ((held >> i & 1) != 0) {
            maxima.add(teacher[i], student[i]);
        }
    }
    float exponent = inverse_temperature_of(p.batch, rows.token) * LOG2_E;
    auto own = maxima.template state<RowState<D, float>>();
    RowState<D, float> empty = own;
    Shifts shifts = own.shifts(exponent);
    ATKD_UNROLL
    for (uint32_t i = 0; i < HELD; i++) {
        if ((plain >> i & 1) != 0) {
            fold_chunk<false, false>(own, shifts, teacher[i], student[i], exponent);
        }
    }
    bool masked = !own.finite();
    if (ATKD_RARELY(held != plain || masked)) {
        own = masked ? empty : own;
        uint32_t left = masked ? held : held & ~plain;
        ATKD_UNROLL
        for (uint32_t i = 0; i < HELD; i++) {
            if ((left >> i & 1) != 0) {
                fold_chunk<false, true>(own, shifts, teacher[i], student[i], exponent);
            }
        }
    }
    auto row_scales = reduce_row<D>(p, rows, group, target, own, warps, scales);
    // Computed again: kept, it would take a register that the reduction needs.
    exponent = inverse_temperature_of(p.batch, opaque(rows.token)) * LOG2_E;
    if constexpr (D::SWEEPS == 2) {
        ATKD_SECOND_SWEEP_SHARED(D, ATKD_RESIDENT_THREADS);
        auto terms = D::template Terms<float>::empty();
        // Expressions of these would take registers that the sweep needs.
        held = opaque(held);
        plain = opaque(plain);
        rows.first = opaque(rows.first);
        rows.stride = opaque(rows.stride);
        by_size<D, false>(row_scales, [&](auto large) {
            ATKD_UNROLL
            for (uint32_t i = 0; i < HELD; i++) {
                if ((held >> i & 1) != 0) {
                    D::template add<decltype(large)::value>(terms, p.divergence, row_scales, exponent, teacher[i],
                                                            student[i]);
                }
            }
        });
        row_scales = reduce_terms<D>(p, rows, terms, warp_terms, scales);
    }
    if (p.gradient == nullptr) {
        return;
    }
    Row<T> gradient = rows.template gradient<T>(p);
    plain = gradient.full_count == 0 ? 0 : plain;
    held = opaque(held);
    rows.first = opaque(rows.first);
    by_size<D, false>(row_scales, [&](auto large) {
        ATKD_UNROLL
        for (uint32_t i = 0; i < HELD; i++) {
            if ((held >> i & 1) != 0) {
                float g[CHUNK];
                gradient_chunk<D, false, decltype(large)::value>(p.divergence, row_scales, exponent, teacher[i],
                                                                 student[i], g);
                uint32_t chunk = rows.first + i * rows.stride;
                if (ATKD_RARELY((plain >> i & 1) == 0)) {
                    insert_target(rows.teacher.within(target, chunk), row_scales.target, g);
                    store_chunk(gradient, chunk, g);
                } else {
                    store_full(gradient, chunk, g);
                }
            }
        }
    });
}

template <class D, class T> ATKD_DEVICE void row_resident(const atkd_rows &p) {
    for_tokens(p, [&](uint32_t token) { row_resident<D, T>(p, token); });
}

} // namespace

#define ATKD_ROW_RESIDENT(D, suffix, dtype, T)                                                                         \
    ATKD_KERNEL(row_resident_##dtype##suffix, atkd_rows, ATKD_RESIDENT) { row_resident<D, T>(p); }
ATKD_DIVERGENCES(ATKD_ROW_RESIDENT, f32, float)
ATKD_DIVERGENCES(ATKD_ROW_RESIDENT, f16, f16)
ATKD_DIVERGENCES(ATKD_ROW_RESIDENT, bf16, bf16)
