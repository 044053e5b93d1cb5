// The GPU's side of machine.cuh, on a CPU: every CUDA thread is a coroutine that hands over at
// barriers and warp operations, to a scheduler on Rust's side (src/simt) that shuffles them.
//
// It is a test instrument. Every access to global memory is checked against the buffers given and for
// alignment, and counted; shared memory knows which of its elements were written; a barrier that some
// threads never reach is an error and not a hang. Bulk loads are done at any time until they are waited for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

extern "C" {
uint32_t simt_thread_index();
uint32_t simt_block_threads();
uint32_t simt_block_index();
uint32_t simt_cluster_blocks();
// Called by each thread first. Does not return if the block has more threads than the kernel's launch bounds.
void simt_begin_kernel(uint32_t max_threads);
void simt_sync_block(uint32_t line);
void simt_sync_cluster(uint32_t line);
// Waits for the other lanes of the warp and returns what each of them gave.
void simt_exchange(uint64_t value, uint64_t *lanes);
// Waits for the other lanes, and puts what they did to shared memory before.
void simt_sync_warp();
// Before an element in shared memory is read (0), written (1) or added to (2). Does not return if another thread's
// access to it is in no order with this one.
void simt_touch(const void *at, uint32_t access, const char *name, uint32_t index);
// Before `bytes` at `at` are touched. Does not return if they must not be.
void simt_access(const void *at, uint64_t bytes, uint64_t alignment, bool write);
// Another thread may wait for what is there now to change; and this one does.
void simt_changed(const uint32_t *at);
void simt_wait_for_change(const uint32_t *at, uint32_t line);
// 16 bytes of staged memory.
void simt_load_staged(uint32_t offset, void *to);
// An element of it, of 2 or 4 bytes.
void simt_load_staged_element(uint32_t offset, uint32_t bytes, void *to);
void simt_store_staged_element(uint32_t offset, uint32_t bytes, const void *from);
// 16 bytes, which come when the thread waits for its copies.
void simt_copy_async(uint32_t offset, const void *from);
void simt_wait_for_copies();
void simt_init_barrier(struct Barrier *barrier, uint32_t arrivals);
// Expects so many bytes more.
void simt_arrive(struct Barrier *barrier, uint32_t bytes);
void simt_wait_for(struct Barrier *barrier, uint32_t parity, uint32_t line);
void simt_bulk_load(uint32_t offset, const void *from, uint32_t bytes, struct Barrier *barrier);
// No more than what is checked of it: it brings nothing that a thread sees.
void simt_bulk_prefetch(const void *from, uint32_t bytes);
// Shared memory for the declaration `slot` of block `rank` of the cluster, zeroed when the block starts.
void *simt_shared(uint64_t slot, uint64_t bytes, uint32_t rank);
// Ends the launch with an error.
[[noreturn]] void simt_fault(const char *what, const char *name, uint64_t index);
}

#define ATKD_DEVICE inline
#define ATKD_BULK_COPIES 1
#define ATKD_KERNEL(name, params, geometry)                                                                            \
    static ATKD_DEVICE void name##_body(const params &p);                                                              \
    extern "C" void name(const params &p) {                                                                            \
        simt_begin_kernel(geometry##_THREADS);                                                                         \
        name##_body(p);                                                                                                \
    }                                                                                                                  \
    static ATKD_DEVICE void name##_body(const params &p)
#define ATKD_UNROLL
#define ATKD_NO_UNROLL
#define ATKD_SYNC_BLOCK() simt_sync_block(__LINE__)
#define ATKD_SYNC_NAMED(barrier, threads) simt_sync_block(barrier)
#define ATKD_SYNC_CLUSTER() simt_sync_cluster(__LINE__)
#define ATKD_REMOTE(array, index, rank) (array).remote(index, rank)
#define ATKD_WAIT_FOR_SENSE(at, before) wait_for_sense(at, before, __LINE__)
#define ATKD_ADD_SHARED(array, index, value) (array).add(index, value)
#define ATKD_SHARED(type, name, count) SharedArray<type, count> name(__COUNTER__, cluster_rank(), #name)

#define ATKD_SHARED_MEMBER(type, name, count)                                                                          \
    SharedArray<type, count> name { __COUNTER__, cluster_rank(), #name }
#define ATKD_SHARED_STRUCT(type, name) type name
#define ATKD_STAGED(name) StagedMemory name
#define ATKD_INIT_BARRIER(array, index, arrivals) simt_init_barrier((array).barrier(index), arrivals)
#define ATKD_ARRIVE(array, index) simt_arrive((array).barrier(index), 0)
#define ATKD_EXPECT(array, index, bytes) simt_arrive((array).barrier(index), bytes)
#define ATKD_WAIT(array, index, parity) simt_wait_for((array).barrier(index), parity, __LINE__)
#define ATKD_BULK_LOAD(staged, offset, global, bytes, array, index)                                                    \
    bulk_load(staged, offset, global, bytes, (array).barrier(index))

// The layout is that of Barrier in src/simt/machine/bulk.rs.
struct Barrier {
    const char *name;
    uint32_t index, id, arrivals, pending, phase;
    int32_t bytes, under_way;
};

// An array in shared memory. An element that nobody has written cannot be read.
template <class T, uint32_t N> class SharedArray {
  public:
    struct Cells {
        T value[N];
        uint8_t written[N];
    };

    class Element {
      public:
        Element(const SharedArray &array, uint32_t index) : array_(array), index_(index) {}
        // The reference may be read later, without a check for races; but the element has been written.
        operator const T &() const {
            if (!array_.cells_->written[index_]) {
                simt_fault("read of shared memory that nobody has written", array_.name_, index_);
            }
            simt_touch(array_.cells_->value + index_, 0, array_.name_, index_);
            return array_.cells_->value[index_];
        }
        Element &operator=(const T &value) {
            simt_touch(array_.cells_->value + index_, 1, array_.name_, index_);
            array_.cells_->value[index_] = value;
            array_.cells_->written[index_] = 1;
            return *this;
        }

      private:
        const SharedArray &array_;
        uint32_t index_;
    };

    SharedArray(uint64_t slot, uint32_t rank, const char *name)
        : cells_(static_cast<Cells *>(simt_shared(slot, sizeof(Cells), rank))), slot_(slot), name_(name) {}

    T remote(uint32_t index, uint32_t rank) const { return SharedArray(slot_, rank, name_)[index]; }

    Element operator[](uint32_t index) const {
        if (index >= N) {
            simt_fault("access outside an array in shared memory", name_, index);
        }
        return Element(*this, index);
    }

    T *barrier(uint32_t index) const {
        if (index >= N) {
            simt_fault("access outside an array in shared memory", name_, index);
        }
        T *barrier = cells_->value + index;
        barrier->name = name_;
        barrier->index = index;
        return barrier;
    }

    void add(uint32_t index, T value) const {
        if (index >= N || !cells_->written[index]) {
            simt_fault("addition outside an array in shared memory, or to what nobody has written", name_, index);
        }
        simt_touch(cells_->value + index, 2, name_, index);
        cells_->value[index] += value;
    }

  private:
    Cells *cells_;
    uint64_t slot_;
    const char *name_;
};

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

ATKD_DEVICE uint32_t thread_index() { return simt_thread_index(); }
ATKD_DEVICE uint32_t block_threads() { return simt_block_threads(); }
ATKD_DEVICE uint32_t block_index() { return simt_block_index(); }
ATKD_DEVICE uint32_t cluster_blocks() { return simt_cluster_blocks(); }
ATKD_DEVICE uint32_t cluster_index() { return simt_block_index() / simt_cluster_blocks(); }
ATKD_DEVICE uint32_t cluster_rank() { return simt_block_index() % simt_cluster_blocks(); }
ATKD_DEVICE uint32_t team_blocks(const atkd_rows &p) { return p.team; }

template <class T> ATKD_DEVICE T shuffle_from(T value, uint32_t lane) {
    uint64_t bits = 0, lanes[32];
    std::memcpy(&bits, &value, sizeof value);
    simt_exchange(bits, lanes);
    std::memcpy(&value, &lanes[lane % ATKD_WARP], sizeof value);
    return value;
}
template <class T> ATKD_DEVICE T shuffle_xor(T value, uint32_t mask) {
    return shuffle_from(value, simt_thread_index() % ATKD_WARP ^ mask);
}
ATKD_DEVICE void sync_warp() { simt_sync_warp(); }
ATKD_DEVICE uint32_t warp_match(uint32_t value) {
    uint64_t lanes[32];
    simt_exchange(value, lanes);
    uint32_t same = 0;
    for (uint32_t lane = 0; lane < 32; lane++) {
        same |= static_cast<uint32_t>(lanes[lane] == value) << lane;
    }
    return same;
}
ATKD_DEVICE uint32_t warp_ballot(bool vote) {
    uint64_t lanes[32];
    simt_exchange(vote, lanes);
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < 32; lane++) {
        votes |= static_cast<uint32_t>(lanes[lane]) << lane;
    }
    return votes;
}
ATKD_DEVICE int32_t warp_max(int32_t value) {
    uint64_t lanes[32];
    simt_exchange(static_cast<uint32_t>(value), lanes);
    for (uint64_t lane : lanes) {
        value = std::max(value, static_cast<int32_t>(lane));
    }
    return value;
}
ATKD_DEVICE uint32_t opaque(uint32_t value) { return value; }
ATKD_DEVICE float opaque(float value) { return value; }
ATKD_DEVICE double opaque(double value) { return value; }
ATKD_DEVICE uint32_t count_bits(uint32_t bits) { return static_cast<uint32_t>(__builtin_popcount(bits)); }

// The result is as wrong as a GPU's may be: by up to 2^-22, with a sign and size that depend on the argument's bits.
ATKD_DEVICE float exp2_fast(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    double error = double(int32_t(bits * 2654435761u)) / 2147483648.0 / 4194304.0;
    return x < -126.0f ? 0.0f : static_cast<float>(std::exp2(double(x)) * (1.0 + error));
}

// Likewise, by up to 2^-23.
ATKD_DEVICE float reciprocal_fast(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    double error = double(int32_t(bits * 2654435761u)) / 2147483648.0 / 8388608.0;
    return std::fabs(x) > 8.507059e37f ? 0.0f : static_cast<float>(1.0 / double(x) * (1.0 + error));
}

// Likewise, by up to 2^-22, or that share of the result if it is above 1.
ATKD_DEVICE float log2_fast(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    double log = std::log2(double(x)), error = double(int32_t(bits * 2654435761u)) / 2147483648.0 / 4194304.0;
    return static_cast<float>(log + error * std::fmax(1.0, std::fabs(log)));
}

template <class T> ATKD_DEVICE T load(const T *at) {
    simt_access(at, sizeof(T), alignof(T), false);
    return *at;
}
template <class T> ATKD_DEVICE void store(T *at, T value) {
    simt_access(at, sizeof(T), alignof(T), true);
    *at = value;
}
ATKD_DEVICE uint32_t add_atomic(uint32_t *at, uint32_t value) {
    simt_access(at, 4, 4, true);
    uint32_t old = *at;
    *at += value;
    return old;
}
ATKD_DEVICE void add_release(uint32_t *at, uint32_t value) {
    add_atomic(at, value);
    simt_changed(at);
}
ATKD_DEVICE uint32_t load_acquire(const uint32_t *at) { return load(at); }
ATKD_DEVICE void wait_for_sense(const uint32_t *at, uint32_t before, uint32_t line) {
    while ((load_acquire(at) ^ before) >> 31 == 0) {
        simt_wait_for_change(at, line);
    }
}
ATKD_DEVICE uint32_t add_acquire_release(uint32_t *at, uint32_t value) { return add_atomic(at, value); }
ATKD_DEVICE void max_atomic(uint64_t *at, uint64_t value) {
    simt_access(at, 8, 8, true);
    *at = std::max(value, *at);
}

struct Bytes16 {
    uint32_t word[4];
};
template <bool STREAMING> ATKD_DEVICE Bytes16 load16(const void *at) {
    simt_access(at, 16, 16, false);
    Bytes16 value;
    std::memcpy(&value, at, 16);
    return value;
}
ATKD_DEVICE void store16(void *at, const Bytes16 &value) {
    simt_access(at, 16, 16, true);
    std::memcpy(at, &value, 16);
}
ATKD_DEVICE void store8(void *at, uint32_t first, uint32_t second) {
    simt_access(at, 8, 8, true);
    uint32_t words[] = {first, second};
    std::memcpy(at, words, 8);
}

ATKD_DEVICE void store_message(Bytes16 *at, const Bytes16 &value) {
    store16(at, value);
    simt_changed(&at->word[3]);
}
template <uint32_t N> struct Messages {
    Bytes16 part[N];
};
template <uint32_t N>
ATKD_DEVICE void wait_for_messages(Messages<N> &messages, const Bytes16 *at, uint32_t epoch, uint32_t line) {
    for (uint32_t i = 0; i < N; i++) {
        while ((messages.part[i] = load16<false>(at + i)).word[3] >> 1 != epoch) {
            simt_wait_for_change(&at[i].word[3], line);
        }
    }
}
#define ATKD_WAIT_FOR_MESSAGES(messages, at, epoch) wait_for_messages(messages, at, epoch, __LINE__)

struct StagedMemory {};
ATKD_DEVICE Bytes16 load_staged(StagedMemory, uint32_t offset) {
    Bytes16 value;
    simt_load_staged(offset, &value);
    return value;
}
template <class T> ATKD_DEVICE T load_staged_element(StagedMemory, uint32_t offset) {
    T value;
    simt_load_staged_element(offset, sizeof value, &value);
    return value;
}
template <class T> ATKD_DEVICE void store_staged_element(StagedMemory, uint32_t offset, T value) {
    simt_store_staged_element(offset, sizeof value, &value);
}
ATKD_DEVICE void copy_async(StagedMemory, uint32_t offset, const void *from) { simt_copy_async(offset, from); }
ATKD_DEVICE void wait_for_copies() { simt_wait_for_copies(); }
ATKD_DEVICE void bulk_prefetch(const void *from, uint32_t bytes) { simt_bulk_prefetch(from, bytes); }
ATKD_DEVICE void bulk_load(StagedMemory, uint32_t offset, const void *from, uint32_t bytes, Barrier *barrier) {
    simt_bulk_load(offset, from, bytes, barrier);
}
ATKD_DEVICE void publish_barriers() {}

template <class T> ATKD_DEVICE T from_bits(uint32_t bits);
template <> ATKD_DEVICE float from_bits<float>(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
template <> ATKD_DEVICE f16 from_bits<f16>(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
template <> ATKD_DEVICE bf16 from_bits<bf16>(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
ATKD_DEVICE uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
ATKD_DEVICE uint32_t to_bits(f16 x) { return x.bits; }
ATKD_DEVICE uint32_t to_bits(bf16 x) { return x.bits; }

ATKD_DEVICE float widen(float x) { return x; }
ATKD_DEVICE float widen(bf16 x) { return from_bits<float>(uint32_t(x.bits) << 16); }
ATKD_DEVICE float widen(f16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 1023u;
    if (exponent == 31) {
        return from_bits<float>(sign | 0x7f800000u | fraction << 13);
    }
    float size =
        exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction | 1024u), int(exponent) - 25);
    return sign != 0 ? -size : size;
}

// To nearest, ties to even.
template <class T> ATKD_DEVICE T narrow(float x);
template <> ATKD_DEVICE float narrow<float>(float x) { return x; }
template <> ATKD_DEVICE bf16 narrow<bf16>(float x) {
    uint32_t bits = to_bits(x);
    if (x != x) {
        return {0x7fff};
    }
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <> ATKD_DEVICE f16 narrow<f16>(float x) {
    uint16_t sign = static_cast<uint16_t>(to_bits(x) >> 16 & 0x8000u);
    if (x != x) {
        return {0x7fff};
    }
    float size = std::fabs(x);
    if (size >= 65520.0f) {
        return {static_cast<uint16_t>(sign | 0x7c00u)};
    }
    int exponent;
    std::frexp(size, &exponent);
    // The value in units of the last place, of which subnormals have 2^-24.
    int unit = size == 0.0f || exponent - 11 < -24 ? -24 : exponent - 11;
    uint32_t units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
    // Rounding up to the next power of two carries into the exponent by itself.
    uint32_t bits = units + (uint32_t(unit + 24) << 10);
    return {static_cast<uint16_t>(sign | bits)};
}

template <class T> ATKD_DEVICE uint32_t narrow_two(float first, float second) {
    return to_bits(narrow<T>(first)) | to_bits(narrow<T>(second)) << 16;
}
template <class T> ATKD_DEVICE uint32_t max_of_two(uint32_t a, uint32_t b) {
    auto max = [](uint32_t x, uint32_t y) { return std::fmax(widen(from_bits<T>(x)), widen(from_bits<T>(y))); };
    return narrow_two<T>(max(a, b), max(a >> 16, b >> 16));
}
