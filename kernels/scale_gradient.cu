// A gradient times a number that is known on the device alone. Most often it is 1, and there is nothing to do: a host
// that looked first would have to wait for the device.
#include "packed.cuh"

namespace {

template <class T> ATKD_DEVICE void scale_gradient(const atkd_scale_gradient &p) {
    float factor = load(p.factor);
    if (factor == 1.0f) {
        return;
    }
    uint32_t first = block_index() % p.parts * block_threads() + thread_index();
    for (uint32_t token = block_index() / p.parts; token < p.tokens; token += p.blocks / p.parts) {
        T *data = row_at(static_cast<T *>(p.gradient), p.strides, token);
        Row<const T> from(data, p.vocab, head_of(data));
        Row<T> to(data, p.vocab, from.head);
        for (uint32_t chunk = first; chunk < from.chunks(); chunk += p.parts * block_threads()) {
            float g[CHUNK];
            load_chunk(from, chunk, g);
            ATKD_UNROLL
            for (uint32_t k = 0; k < CHUNK; k++) {
                g[k] *= factor;
            }
            store_chunk(to, chunk, g);
        }
    }
}

} // namespace

ATKD_KERNEL(scale_gradient_f32, atkd_scale_gradient, ATKD_SCALE) { scale_gradient<float>(p); }
ATKD_KERNEL(scale_gradient_f16, atkd_scale_gradient, ATKD_SCALE) { scale_gradient<f16>(p); }
ATKD_KERNEL(scale_gradient_bf16, atkd_scale_gradient, ATKD_SCALE) { scale_gradient<bf16>(p); }
