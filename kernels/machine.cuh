// Threads, barriers, atomics, copies and the few machine instructions that the kernels use, on both of the machines
// they are compiled for: a GPU (nvcc), and the simulator (simt/) on which the same kernels are tested. Every function
// and macro before the #else has its double in simt/simt.h; macros are those for which the simulator needs the line
// or the name of an array. No other file asks for which machine it is compiled.
#pragma once

#include <stdint.h>

#include "params.h"

// Rust's side asserts the same sizes (src/params.rs).
static_assert(sizeof(atkd_summary) == 1096 && sizeof(atkd_batch) == 120, "the layout is a contract");
static_assert(sizeof(atkd_teacher_margin) == 136 && sizeof(atkd_count_valid) == 160, "the layout is a contract");
static_assert(sizeof(atkd_select_hard) == 200 && sizeof(atkd_objective) == 88, "the layout is a contract");
static_assert(sizeof(atkd_prepare_rows) == 176 && sizeof(atkd_rows) == 416, "the layout is a contract");
static_assert(sizeof(atkd_shard) == 472 && sizeof(atkd_row_state) == 40 && sizeof(atkd_sweep_terms) == 12,
              "the layout is a contract");
static_assert(sizeof(atkd_sparse) == 496, "the layout is a contract");
static_assert(sizeof(atkd_token_terms) == 368 && sizeof(atkd_token_entropies) == 56, "the layout is a contract");

// A condition that few rows or chunks meet: its branch leaves the common path, which is what
// scripts/kernel-instructions counts.
#define ATKD_RARELY(condition) __builtin_expect(!!(condition), 0)

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define ATKD_DEVICE __device__ __forceinline__

// Expands to nothing below sm_90.
#if __CUDA_ARCH__ >= 900
#define ATKD_SINCE_SM_90(...) asm volatile(__VA_ARGS__)
#define ATKD_BULK_COPIES 1
#else
#define ATKD_SINCE_SM_90(...)
#define ATKD_BULK_COPIES 0
#endif

// Programmatic dependent launch: the next kernel may be scheduled now; it waits here until all earlier kernels have
// finished and their writes are visible.
ATKD_DEVICE void begin_kernel() {
    ATKD_SINCE_SM_90("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}
// A kernel with the launch bounds geometry##_THREADS and geometry##_BLOCKS.
#define ATKD_KERNEL(name, params, geometry)                                                                            \
    static ATKD_DEVICE void name##_body(const params &p);                                                              \
    extern "C" __global__ void __launch_bounds__(geometry##_THREADS, geometry##_BLOCKS)                                \
        name(const __grid_constant__ params p) {                                                                       \
        begin_kernel();                                                                                                \
        name##_body(p);                                                                                                \
    }                                                                                                                  \
    static ATKD_DEVICE void name##_body(const params &p)
// `count` elements of shared memory.
#define ATKD_SHARED(type, name, count) __shared__ type name[count]
// Shared memory as a member of a struct, of which a kernel has one. The struct's address is computed once; that of an
// array by itself is computed for every access.
#define ATKD_SHARED_MEMBER(type, name, count) type name[count]
#define ATKD_SHARED_STRUCT(type, name)                                                                                 \
    __shared__ type name##_memory;                                                                                     \
    type &name = *static_cast<type *>(__cvta_shared_to_generic(opaque(in_shared(&name##_memory))))
// The shared memory that the launch asks for.
#define ATKD_STAGED(name)                                                                                              \
    extern __shared__ __align__(ATKD_LINE)                                                                             \
    unsigned char name##_memory[];                                                                                     \
    StagedMemory name = {opaque(in_shared(name##_memory))}

typedef __half f16;
typedef __nv_bfloat16 bf16;

ATKD_DEVICE uint32_t thread_index() { return threadIdx.x; }
ATKD_DEVICE uint32_t block_threads() { return blockDim.x; }
ATKD_DEVICE uint32_t block_index() { return blockIdx.x; }
#define ATKD_SYNC_BLOCK() __syncthreads()
// A named barrier: converged warps may arrive from different places in the program.
#define ATKD_SYNC_NAMED(barrier, threads)                                                                              \
    do {                                                                                                               \
        __syncwarp();                                                                                                  \
        asm volatile("barrier.sync %0, %1;" ::"n"(int(barrier)), "n"(threads) : "memory");                             \
    } while (0)

// A cluster: co-resident blocks that read each other's shared memory. Before sm_90, one block; there the blocks of a
// row are a team, in a launch all of whose blocks are co-resident, and meet through global memory.
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
// barrier does by itself, would be to wait for every gradient on its way. A block must have used all values that it
// read from another's shared memory before it arrives: only then is the read over.
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
// The shared memory of block `rank` of the cluster, at the address that `at` has in this block.
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
// Before a loop that runs a few times per row: unrolled, it would take the main loops' registers.
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

// Returns the value, opaque to the optimiser: an expression of it is computed again, not kept in registers until then.
ATKD_DEVICE uint32_t opaque(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}
ATKD_DEVICE float opaque(float value) {
    asm volatile("" : "+f"(value));
    return value;
}
ATKD_DEVICE double opaque(double value) {
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

// log2 of a normal number; between 0.5 and 2 to an absolute error of 2^-22, else to a relative one.
ATKD_DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <class T> ATKD_DEVICE T load(const T *at) { return *at; }
template <class T> ATKD_DEVICE void store(T *at, T value) { *at = value; }
// Returns the value before the addition.
ATKD_DEVICE uint32_t add_atomic(uint32_t *at, uint32_t value) { return atomicAdd(at, value); }
ATKD_DEVICE void max_atomic(uint64_t *at, uint64_t value) {
    atomicMax(reinterpret_cast<unsigned long long *>(at), static_cast<unsigned long long>(value));
}
// Release: a thread that acquires the sum sees all earlier writes of this one.
ATKD_DEVICE void add_release(uint32_t *at, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
// Acquire and release: also sees the writes before those additions whose sum it returns.
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
// Spins until bit 31 differs from `before` (sense reversal). The writer must be co-resident.
ATKD_DEVICE void wait_for_sense(const uint32_t *at, uint32_t before) {
    while ((load_acquire(at) ^ before) >> 31 == 0) {
    }
}
#define ATKD_WAIT_FOR_SENSE(at, before) wait_for_sense(at, before)
// An atomic addition in shared memory.
#define ATKD_ADD_SHARED(array, index, value) atomicAdd(&(array)[index], value)

// 16 bytes at an address that is a multiple of 16.
struct alignas(16) Bytes16 {
    uint32_t word[4];
};
// Loads from global memory, whose addresses Row computes as integers. STREAMING: evict-first, for data that is read for
// the last time.
template <bool STREAMING> ATKD_DEVICE Bytes16 load16(const void *at) {
    Bytes16 value;
#define ATKD_LOAD16(instruction)                                                                                       \
    asm volatile(instruction " {%0, %1, %2, %3}, [%4];"                                                                \
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])                  \
                 : "l"(at)                                                                                             \
                 : "memory")
    if (STREAMING) {
        ATKD_LOAD16("ld.global.cs.v4.b32");
    } else {
        ATKD_LOAD16("ld.global.v4.b32");
    }
    return value;
}
ATKD_DEVICE void store16(void *at, const Bytes16 &value) {
    // Nobody reads a gradient soon: it must not push the rows that are read again out of L2.
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(value.word[0]), "r"(value.word[1]),
                 "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
}
ATKD_DEVICE void store8(void *at, uint32_t first, uint32_t second) {
    asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(first), "r"(second) : "memory");
}

// One relaxed 128-bit access: atomic as a whole, unordered with everything else. For co-resident blocks.
ATKD_DEVICE void store_message(Bytes16 *at, const Bytes16 &value) {
    uint64_t low = value.word[0] | uint64_t(value.word[1]) << 32, high = value.word[2] | uint64_t(value.word[3]) << 32;
    asm volatile("{\n.reg .b128 all;\nmov.b128 all, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], all;\n}" ::"l"(at),
                 "l"(low), "l"(high)
                 : "memory");
}
ATKD_DEVICE Bytes16 load_message(const Bytes16 *at) {
    uint64_t low, high;
    asm volatile("{\n.reg .b128 all;\nld.relaxed.gpu.global.b128 all, [%2];\nmov.b128 {%0, %1}, all;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(at)
                 : "memory");
    return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
}
template <uint32_t N> struct Messages {
    Bytes16 part[N];
};
// Spins until all N messages carry the epoch, in the upper 31 bits of their last words. It polls all of them at once: a
// load takes as long as some hundred instructions.
template <uint32_t N> ATKD_DEVICE void wait_for_messages(Messages<N> &messages, const Bytes16 *at, uint32_t epoch) {
    bool arrived;
    do {
        ATKD_UNROLL
        for (uint32_t i = 0; i < N; i++) {
            messages.part[i] = load_message(at + i);
        }
        arrived = true;
        ATKD_UNROLL
        for (uint32_t i = 0; i < N; i++) {
            arrived = arrived && messages.part[i].word[3] >> 1 == epoch;
        }
    } while (!arrived);
}
#define ATKD_WAIT_FOR_MESSAGES(messages, at, epoch) wait_for_messages(messages, at, epoch)

ATKD_DEVICE uint32_t in_shared(const void *at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Staged memory is accessed by offsets that are multiples of 16, but for single elements.
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
// An asynchronous copy of 16 bytes. It is there for the thread that issued it once that one has waited, and for others
// after a barrier behind.
ATKD_DEVICE void copy_async(StagedMemory staged, uint32_t offset, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(staged.address + offset), "l"(from) : "memory");
}
ATKD_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// An mbarrier. A phase completes when as many threads have arrived as it was initialised for, and all bytes that they
// expect have been loaded.
struct Barrier {
    uint64_t word;
};
ATKD_DEVICE void init_barrier(Barrier &barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(in_shared(&barrier)), "r"(arrivals) : "memory");
}
// To be called by the thread that initialised barriers for bulk copies, before the block's barrier after which others
// use them.
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
// Waits until the phase of this parity has completed; the first phase is 0.
#define ATKD_WAIT(array, index, parity) wait_for((array)[index], parity)

// An asynchronous bulk copy, unordered with everything but the barrier: size and both addresses are multiples of 16.
ATKD_DEVICE void bulk_load(StagedMemory staged, uint32_t offset, const void *from, uint32_t bytes, Barrier &barrier) {
    ATKD_SINCE_SM_90(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            staged.address + offset),
        "l"(from), "r"(bytes), "r"(in_shared(&barrier))
        : "memory");
}
#define ATKD_BULK_LOAD(staged, offset, global, bytes, array, index)                                                    \
    bulk_load(staged, offset, global, bytes, (array)[index])
// A hint: prefetches into the L2 cache. Size and address are multiples of 16.
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

// Bits are as many as the element has; of more, the lower ones count.
template <class T> ATKD_DEVICE T from_bits(uint32_t bits);
template <> ATKD_DEVICE float from_bits<float>(uint32_t bits) { return __uint_as_float(bits); }
template <> ATKD_DEVICE f16 from_bits<f16>(uint32_t bits) { return __ushort_as_half(uint16_t(bits)); }
template <> ATKD_DEVICE bf16 from_bits<bf16>(uint32_t bits) { return __ushort_as_bfloat16(uint16_t(bits)); }
ATKD_DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }
ATKD_DEVICE uint32_t to_bits(f16 x) { return __half_as_ushort(x); }
ATKD_DEVICE uint32_t to_bits(bf16 x) { return __bfloat16_as_ushort(x); }

// An element of staged memory, of two or four bytes.
template <class T> ATKD_DEVICE T load_staged_element(StagedMemory staged, uint32_t offset) {
    uint32_t bits;
    if (sizeof(T) == 2) {
        asm volatile("ld.shared.u16 %0, [%1];" : "=r"(bits) : "r"(staged.address + offset) : "memory");
    } else {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(staged.address + offset) : "memory");
    }
    return from_bits<T>(bits);
}
template <class T> ATKD_DEVICE void store_staged_element(StagedMemory staged, uint32_t offset, T value) {
    if (sizeof(T) == 2) {
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(staged.address + offset), "r"(to_bits(value)) : "memory");
    } else {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(staged.address + offset), "r"(to_bits(value)) : "memory");
    }
}

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
