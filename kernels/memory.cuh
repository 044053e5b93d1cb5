// Global memory, shared memory and the few machine instructions that the kernels use, on both of the
// machines they are compiled for: a GPU (nvcc), and the simulator (simt/) on which the same kernels are
// tested.
#pragma once

#include <stdint.h>

#include "params.h"

// As Rust's side asserts of its own (src/params.rs).
static_assert(sizeof(atkd_summary) == 1088 && sizeof(atkd_batch) == 104, "the layout is a contract");
static_assert(sizeof(atkd_teacher_margin) == 120 && sizeof(atkd_count_valid) == 136, "the layout is a contract");
static_assert(sizeof(atkd_select_hard) == 184 && sizeof(atkd_objective) == 80, "the layout is a contract");
static_assert(sizeof(atkd_rows) == 336 && sizeof(atkd_token_terms) == 288, "the layout is a contract");

// A condition that few rows or chunks meet: its branch leaves the common path, which is what
// scripts/kernel-instructions counts.
#define ATKD_RARELY(condition) __builtin_expect(!!(condition), 0)

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define ATKD_DEVICE __device__ __forceinline__

// What machines before sm_90 do not know, they leave out.
#if __CUDA_ARCH__ >= 900
#define ATKD_SINCE_SM_90(...) asm volatile(__VA_ARGS__)
#else
#define ATKD_SINCE_SM_90(...)
#endif

// The next kernel may take its place on the machine as soon as this one has, and then waits here: so each
// begins after all before it have ended, and what they wrote is there.
ATKD_DEVICE void begin_kernel() {
    ATKD_SINCE_SM_90("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}
// A kernel with the launch bounds geometry##_THREADS and geometry##_BLOCKS.
#define ATKD_KERNEL(name, params, geometry)                                                                   \
    static ATKD_DEVICE void name##_body(const params &p);                                                     \
    extern "C" __global__ void __launch_bounds__(geometry##_THREADS, geometry##_BLOCKS)                       \
        name(const __grid_constant__ params p) {                                                              \
        begin_kernel();                                                                                       \
        name##_body(p);                                                                                       \
    }                                                                                                         \
    static ATKD_DEVICE void name##_body(const params &p)
// `count` elements of shared memory.
#define ATKD_SHARED(type, name, count) __shared__ type name[count]
// The same as a member of a struct, of which a kernel has one. Its address is computed once: of an array by itself
// it is computed for every access.
#define ATKD_SHARED_MEMBER(type, name, count) type name[count]
#define ATKD_SHARED_STRUCT(type, name)                                                                        \
    __shared__ type name##_memory;                                                                            \
    type &name = *static_cast<type *>(__cvta_shared_to_generic(forget(in_shared(&name##_memory))))
// The shared memory that the launch asks for.
#define ATKD_STAGED(name)                                                                                     \
    extern __shared__ __align__(128) unsigned char name##_memory[];                                          \
    StagedMemory name = {forget(in_shared(name##_memory))}

typedef __half f16;
typedef __nv_bfloat16 bf16;

ATKD_DEVICE uint32_t thread_index() { return threadIdx.x; }
ATKD_DEVICE uint32_t block_threads() { return blockDim.x; }
ATKD_DEVICE uint32_t block_index() { return blockIdx.x; }
#define ATKD_SYNC_BLOCK() __syncthreads()
// The same barrier where some warps come to it from elsewhere in the code than others, each as a whole.
#define ATKD_MEET(barrier, threads)                                                                           \
    do {                                                                                                      \
        __syncwarp();                                                                                         \
        asm volatile("barrier.sync %0, %1;" ::"n"(int(barrier)), "n"(threads) : "memory");                    \
    } while (0)

// A cluster: blocks that run at once and read each other's shared memory. Before sm_90, one block; there the
// blocks of a row are a team, in a launch whose blocks all run at once, and meet through global memory.
#if __CUDA_ARCH__ >= 900
ATKD_DEVICE uint32_t cluster_blocks() {
    uint32_t blocks;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    return blocks;
}
ATKD_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
ATKD_DEVICE uint32_t cluster_index() {
    uint32_t index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}
// Afterwards blocks see what others wrote to shared memory, and nothing else: to release global memory too, as the
// barrier does by itself, would be to wait for every gradient on its way. What a block read of another's shared memory it
// has used before it comes here: only then is the read over.
ATKD_DEVICE void sync_cluster() {
    if (cluster_blocks() == 1) {
        __syncthreads();
    } else {
        asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n"
                     "barrier.cluster.arrive.relaxed;\n"
                     "barrier.cluster.wait;" ::
                         : "memory");
    }
}
// What block `rank` of the cluster has where this one has `at`, in shared memory.
template <class T> ATKD_DEVICE T load_remote(const T *at, uint32_t rank) {
    uint64_t address;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(at), "r"(rank));
    return *reinterpret_cast<const T *>(address);
}
ATKD_DEVICE uint32_t team_blocks(const atkd_rows &) { return 1; }
#else
ATKD_DEVICE uint32_t cluster_blocks() { return 1; }
ATKD_DEVICE uint32_t cluster_rank() { return 0; }
ATKD_DEVICE uint32_t cluster_index() { return blockIdx.x; }
ATKD_DEVICE void sync_cluster() { __syncthreads(); }
template <class T> ATKD_DEVICE T load_remote(const T *at, uint32_t) { return *at; }
ATKD_DEVICE uint32_t team_blocks(const atkd_rows &p) { return p.team; }
#endif
#define ATKD_SYNC_CLUSTER() sync_cluster()
#define ATKD_REMOTE(array, index, rank) load_remote(&(array)[index], rank)

// Before a loop over registers, which must not become a loop over local memory.
#define ATKD_UNROLL _Pragma("unroll")
// Before a loop that runs a few times a row: unrolled, it would take the main loops' registers.
#define ATKD_NO_UNROLL _Pragma("unroll 1")

template <class T> ATKD_DEVICE T shuffle_xor(T value, uint32_t mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T> ATKD_DEVICE T shuffle_from(T value, uint32_t lane) {
    return __shfl_sync(0xffffffffu, value, static_cast<int>(lane));
}
ATKD_DEVICE void sync_warp() { __syncwarp(); }
ATKD_DEVICE uint32_t warp_ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
ATKD_DEVICE int32_t warp_max(int32_t value) { return __reduce_max_sync(0xffffffffu, value); }
// The lanes whose value is this lane's.
ATKD_DEVICE uint32_t warp_match(uint32_t value) { return __match_any_sync(0xffffffffu, value); }
ATKD_DEVICE uint32_t count_bits(uint32_t bits) { return __popc(bits); }

// The same value. What was computed from it is computed again, and not kept in registers until then.
ATKD_DEVICE uint32_t forget(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}
ATKD_DEVICE double forget(double value) {
    asm volatile("" : "+d"(value));
    return value;
}

// 2^x, 0 below 2^-126; relative error 2^-22.
ATKD_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, relative error 2^-23; 0 from 2^126 on.
ATKD_DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <class T> ATKD_DEVICE T load(const T *at) { return *at; }
template <class T> ATKD_DEVICE void store(T *at, T value) { *at = value; }
// Returns what was there.
ATKD_DEVICE uint32_t add_atomic(uint32_t *at, uint32_t value) { return atomicAdd(at, value); }
ATKD_DEVICE void max_atomic(uint64_t *at, uint64_t value) {
    atomicMax(reinterpret_cast<unsigned long long *>(at), static_cast<unsigned long long>(value));
}
// Who sees what was added sees what was written before.
ATKD_DEVICE void add_release(uint32_t *at, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
// Likewise, and sees what was written before those additions whose sum it returns.
ATKD_DEVICE uint32_t add_acquire_release(uint32_t *at, uint32_t value) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
    return before;
}
ATKD_DEVICE uint32_t load_acquire(const uint32_t *at) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
// Until the top bit is another than before, by a block that runs at once with this one.
ATKD_DEVICE void wait_for_flip(const uint32_t *at, uint32_t before) {
    while ((load_acquire(at) ^ before) >> 31 == 0) {
    }
}
#define ATKD_WAIT_FOR_FLIP(at, before) wait_for_flip(at, before)
// In shared memory.
#define ATKD_ADD_SHARED(array, index, value) atomicAdd(&(array)[index], value)

// 16 bytes at an address that is a multiple of 16.
struct alignas(16) Bytes16 {
    uint32_t word[4];
};
// From global memory, whose addresses Row computes as integers. What is read for the LAST time may leave the
// caches before what is to be read again.
template <bool LAST> ATKD_DEVICE Bytes16 load16(const void *at) {
    Bytes16 value;
#define ATKD_LOAD16(instruction)                                                                              \
    asm volatile(instruction " {%0, %1, %2, %3}, [%4];"                                                       \
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])         \
                 : "l"(at)                                                                                    \
                 : "memory")
    if (LAST) {
        ATKD_LOAD16("ld.global.cs.v4.b32");
    } else {
        ATKD_LOAD16("ld.global.v4.b32");
    }
    return value;
}
ATKD_DEVICE void store16(void *at, const Bytes16 &value) {
    // Nobody reads a gradient soon: it must not push the rows that are read again out of L2.
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(value.word[0]),
                 "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
}

// Written and read as one, to and by blocks that run at once with this one, and so in no order with anything else.
ATKD_DEVICE void post16(Bytes16 *at, const Bytes16 &value) {
    uint64_t low = value.word[0] | uint64_t(value.word[1]) << 32, high = value.word[2] | uint64_t(value.word[3]) << 32;
    asm volatile("{\n.reg .b128 all;\nmov.b128 all, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], all;\n}" ::"l"(at),
                 "l"(low), "l"(high)
                 : "memory");
}
ATKD_DEVICE Bytes16 load_posted(const Bytes16 *at) {
    uint64_t low, high;
    asm volatile("{\n.reg .b128 all;\nld.relaxed.gpu.global.b128 all, [%2];\nmov.b128 {%0, %1}, all;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(at)
                 : "memory");
    return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
}
struct Posts {
    Bytes16 first, second;
};
// Until half of the last word is `number`, at both addresses. It asks for both at once: an answer takes as long as some
// hundred instructions.
ATKD_DEVICE Posts wait_for_posts(const Bytes16 *first, const Bytes16 *second, uint32_t number) {
    for (;;) {
        Posts posts = {load_posted(first), load_posted(second)};
        if (posts.first.word[3] >> 1 == number && posts.second.word[3] >> 1 == number) {
            return posts;
        }
    }
}
#define ATKD_WAIT_FOR_POSTS(posts, first, second, number) posts = wait_for_posts(first, second, number)

ATKD_DEVICE uint32_t in_shared(const void *at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Staged memory is accessed by offsets that are multiples of 16.
struct StagedMemory {
    uint32_t address;
};
ATKD_DEVICE Bytes16 load_staged(StagedMemory staged, uint32_t offset) {
    Bytes16 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
                 : "r"(staged.address + offset)
                 : "memory");
    return value;
}
// An mbarrier. A phase ends when as many threads have arrived as it was made for, and all bytes that they
// expect have come.
struct Barrier {
    uint64_t word;
};
ATKD_DEVICE void init_barrier(Barrier &barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(in_shared(&barrier)), "r"(arrivals) : "memory");
}
// By the thread that made barriers for bulk copies, before the block's barrier after which others use them.
ATKD_DEVICE void publish_barriers() { ATKD_SINCE_SM_90("fence.mbarrier_init.release.cluster;" ::: "memory"); }
ATKD_DEVICE void arrive(Barrier &barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(in_shared(&barrier)) : "memory");
}
ATKD_DEVICE void arrive_expecting(Barrier &barrier, uint32_t bytes) {
    ATKD_SINCE_SM_90("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                         in_shared(&barrier)),
                     "r"(bytes)
                     : "memory");
}
ATKD_DEVICE void wait_for(Barrier &barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define ATKD_TRY_WAIT "mbarrier.try_wait"
#else
#define ATKD_TRY_WAIT "mbarrier.test_wait"
#endif
    asm volatile("{\n.reg .pred done;\n"
                 "again:\n" ATKD_TRY_WAIT ".parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(in_shared(&barrier)),
                 "r"(parity)
                 : "memory");
}
#define ATKD_INIT_BARRIER(array, index, arrivals) init_barrier((array)[index], arrivals)
#define ATKD_ARRIVE(array, index) arrive((array)[index])
#define ATKD_EXPECT(array, index, bytes) arrive_expecting((array)[index], bytes)
// Until the phase of this parity has ended; the first is 0.
#define ATKD_WAIT(array, index, parity) wait_for((array)[index], parity)

// A bulk copy, by the machine and in no order: of a multiple of 16 bytes, from and to multiples of 16.
ATKD_DEVICE void bulk_load(StagedMemory staged, uint32_t offset, const void *from, uint32_t bytes,
                           Barrier &barrier) {
    ATKD_SINCE_SM_90(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            staged.address + offset),
        "l"(from), "r"(bytes), "r"(in_shared(&barrier))
        : "memory");
}
#define ATKD_BULK_LOAD(staged, offset, global, bytes, array, index)                                           \
    bulk_load(staged, offset, global, bytes, (array)[index])
// Into the L2 cache, of a multiple of 16 bytes from a multiple of 16. A hint.
ATKD_DEVICE void bulk_prefetch(const void *from, uint32_t bytes) {
    ATKD_SINCE_SM_90("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

ATKD_DEVICE float widen(float x) { return x; }
ATKD_DEVICE float widen(f16 x) { return __half2float(x); }
ATKD_DEVICE float widen(bf16 x) { return __bfloat162float(x); }
template <class T> ATKD_DEVICE T narrow(float x);
template <> ATKD_DEVICE float narrow<float>(float x) { return x; }
template <> ATKD_DEVICE f16 narrow<f16>(float x) { return __float2half_rn(x); }
template <> ATKD_DEVICE bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

// Of an element's own size; of more bits, the lower ones.
template <class T> ATKD_DEVICE T from_bits(uint32_t bits);
template <> ATKD_DEVICE float from_bits<float>(uint32_t bits) { return __uint_as_float(bits); }
template <> ATKD_DEVICE f16 from_bits<f16>(uint32_t bits) { return __ushort_as_half(uint16_t(bits)); }
template <> ATKD_DEVICE bf16 from_bits<bf16>(uint32_t bits) { return __ushort_as_bfloat16(uint16_t(bits)); }
ATKD_DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }
ATKD_DEVICE uint32_t to_bits(f16 x) { return __half_as_ushort(x); }
ATKD_DEVICE uint32_t to_bits(bf16 x) { return __bfloat16_as_ushort(x); }

// Two elements of half precision in a word, the first in its lower half.
template <class T> ATKD_DEVICE uint32_t narrow_two(float first, float second);
template <> ATKD_DEVICE uint32_t narrow_two<f16>(float first, float second) {
    uint32_t two;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
}
template <> ATKD_DEVICE uint32_t narrow_two<bf16>(float first, float second) {
    uint32_t two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
}
// The larger of each; NaN only if both are.
template <class T> ATKD_DEVICE uint32_t max_of_two(uint32_t a, uint32_t b);
template <> ATKD_DEVICE uint32_t max_of_two<f16>(uint32_t a, uint32_t b) {
    uint32_t max;
    asm("max.f16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
    return max;
}
template <> ATKD_DEVICE uint32_t max_of_two<bf16>(uint32_t a, uint32_t b) {
    uint32_t max;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
    return max;
}

#else
#include "simt/simt.h"
#endif

constexpr uint32_t WARP = ATKD_WARP;

// Logits that one thread handles at once: 16 bytes of half precision, twice that of single.
constexpr uint32_t CHUNK = ATKD_CHUNK;

// Bytes that the L2 cache holds together.
constexpr uint32_t LINE = ATKD_LINE;

// Where a row of a matrix starts. The branch goes one way for all rows of a launch; without it the compiler computes the
// product anew in every turn of a loop, to save registers.
template <class T> ATKD_DEVICE T *row_at(T *first, const atkd_strides &strides, uint32_t row) {
    int64_t start = int64_t(row) * strides.stride;
    if (ATKD_RARELY(strides.inverse != 0)) {
        start += int64_t(uint32_t(uint64_t(row) * strides.inverse >> 32) >> strides.shift) * strides.skip;
    }
    return first + start;
}

// A row of V elements, seen as chunks. Chunk 0 starts at or before the row, so that every later chunk
// starts at a multiple of its own bytes; what lies outside the row does not exist.
template <class T> struct Row {
    T *data;
    uint32_t vocab;
    // Chunk c is elements c * CHUNK - lead ... + CHUNK - 1.
    uint32_t lead;
    // Chunks that lie in the row and start at a multiple of 16 bytes.
    uint32_t first_whole, wholes;

    // `lead` is given by the row that leads; a row of another alignment is read element by element.
    ATKD_DEVICE Row(T *row, uint32_t vocab_, uint32_t lead_)
        : data(row), vocab(vocab_), lead(lead_), first_whole((lead_ + CHUNK - 1) / CHUNK), wholes(0) {
        uint32_t end = (vocab + lead) / CHUNK;
        if ((reinterpret_cast<uintptr_t>(row) - lead * sizeof(T)) % 16 == 0 && end > first_whole) {
            wholes = end - first_whole;
        }
    }

    ATKD_DEVICE uint32_t chunks() const { return (vocab + lead + CHUNK - 1) / CHUNK; }

    ATKD_DEVICE bool whole(uint32_t chunk) const { return chunk - first_whole < wholes; }

    // The chunk that an element is in.
    ATKD_DEVICE uint32_t chunk_of(uint32_t element) const { return (element + lead) / CHUNK; }

    // Where an element lies in a chunk; CHUNK or more if it is in another.
    ATKD_DEVICE uint32_t within(uint32_t element, uint32_t chunk) const { return element - (chunk * CHUNK - lead); }

    // Where a chunk starts, which may be before the row.
    ATKD_DEVICE T *at(uint32_t chunk) const {
        // Of integers the compiler makes one instruction, of pointers three.
        uintptr_t start = reinterpret_cast<uintptr_t>(data) - lead * sizeof(T);
        return reinterpret_cast<T *>(start + uint64_t(chunk) * (CHUNK * sizeof(T)));
    }
};

// How many elements before the row a multiple of these bytes lies; unless they are given, of a chunk's.
template <class T> ATKD_DEVICE uint32_t lead_of(const T *row, uint32_t bytes = CHUNK * sizeof(T)) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row) % bytes) / static_cast<uint32_t>(sizeof(T));
}

constexpr float OUTSIDE = -__builtin_huge_valf();

// A chunk as it lies in memory.
template <class T> struct Packed {
    static constexpr uint32_t PARTS = CHUNK * sizeof(T) / 16, PER = CHUNK / PARTS;
    Bytes16 part[PARTS];
};

// By shifts and not through a pointer, for which the compiler may want an address, and so local memory.
template <class T> ATKD_DEVICE T element_of(const Bytes16 &bytes, uint32_t index) {
    uint32_t word = bytes.word[index * sizeof(T) / 4];
    return from_bits<T>(sizeof(T) == 2 && index % 2 == 1 ? word >> 16 : word);
}
template <class T> ATKD_DEVICE void set_element(Bytes16 &bytes, uint32_t index, T value) {
    uint32_t &word = bytes.word[index * sizeof(T) / 4], bits = to_bits(value);
    word = sizeof(T) == 4 ? bits : index % 2 == 1 ? (word & 0xffffu) | bits << 16 : (word & 0xffff0000u) | bits;
}

template <bool LAST = false, class T>
ATKD_DEVICE Packed<T> load_whole(const Row<const T> &row, uint32_t chunk) {
    Packed<T> packed = {};
    ATKD_UNROLL
    for (uint32_t i = 0; i < Packed<T>::PARTS; i++) {
        packed.part[i] = load16<LAST>(row.at(chunk) + i * Packed<T>::PER);
    }
    return packed;
}

// -inf outside the row.
template <class T> ATKD_DEVICE Packed<T> load_packed(const Row<const T> &row, uint32_t chunk) {
    if (ATKD_RARELY(!row.whole(chunk))) {
        Packed<T> packed = {};
        constexpr uint32_t PER = Packed<T>::PER;
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            uint32_t j = chunk * CHUNK + k - row.lead;
            T z = j < row.vocab ? load(row.at(chunk) + k) : narrow<T>(OUTSIDE);
            set_element<T>(packed.part[k / PER], k % PER, z);
        }
        return packed;
    }
    return load_whole(row, chunk);
}

template <class T> ATKD_DEVICE Packed<T> nothing() {
    Packed<T> packed = {};
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        set_element<T>(packed.part[k / Packed<T>::PER], k % Packed<T>::PER, narrow<T>(OUTSIDE));
    }
    return packed;
}

template <class T> ATKD_DEVICE void unpack(const Packed<T> &packed, float (&x)[CHUNK]) {
    constexpr uint32_t PER = Packed<T>::PER;
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        x[k] = widen(element_of<T>(packed.part[k / PER], k % PER));
    }
}
// A bf16 is the upper half of the float: one instruction each.
template <> ATKD_DEVICE void unpack(const Packed<bf16> &packed, float (&x)[CHUNK]) {
    ATKD_UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        x[2 * i] = from_bits<float>(packed.part[0].word[i] << 16);
        x[2 * i + 1] = from_bits<float>(packed.part[0].word[i] & 0xffff0000u);
    }
}

// Replaces one element.
template <class T> ATKD_DEVICE void put(uint32_t within, T value, Packed<T> &packed) {
    constexpr uint32_t PER = Packed<T>::PER;
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        if (within == k) {
            set_element<T>(packed.part[k / PER], k % PER, value);
        }
    }
}

// Makes one element -inf.
template <class T> ATKD_DEVICE void take_out(uint32_t within, Packed<T> &packed) {
    put(within, narrow<T>(OUTSIDE), packed);
}

// A chunk, widened; -inf outside the row.
template <class T> ATKD_DEVICE void load_chunk(const Row<const T> &row, uint32_t chunk, float (&x)[CHUNK]) {
    unpack(load_packed(row, chunk), x);
}

// Word i of a chunk in memory.
template <class T> ATKD_DEVICE uint32_t pack_word(const float (&x)[CHUNK], uint32_t i) {
    return narrow_two<T>(x[2 * i], x[2 * i + 1]);
}
template <> ATKD_DEVICE uint32_t pack_word<float>(const float (&x)[CHUNK], uint32_t i) { return to_bits(x[i]); }

template <class T> ATKD_DEVICE Packed<T> pack(const float (&x)[CHUNK]) {
    Packed<T> packed = {};
    ATKD_UNROLL
    for (uint32_t i = 0; i < 4 * Packed<T>::PARTS; i++) {
        packed.part[i / 4].word[i % 4] = pack_word<T>(x, i);
    }
    return packed;
}

template <class T> ATKD_DEVICE void store_whole(const Row<T> &row, uint32_t chunk, const float (&x)[CHUNK]) {
    Packed<T> packed = pack<T>(x);
    ATKD_UNROLL
    for (uint32_t i = 0; i < Packed<T>::PARTS; i++) {
        store16(row.at(chunk) + i * Packed<T>::PER, packed.part[i]);
    }
}

template <class T> ATKD_DEVICE void store_chunk(const Row<T> &row, uint32_t chunk, const float (&x)[CHUNK]) {
    if (ATKD_RARELY(!row.whole(chunk))) {
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            uint32_t j = chunk * CHUNK + k - row.lead;
            if (j < row.vocab) {
                store(row.at(chunk) + k, narrow<T>(x[k]));
            }
        }
        return;
    }
    store_whole(row, chunk, x);
}
