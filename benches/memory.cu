// Measures a GPU's memory by kernels that do nothing else, to hold the kernels of this crate against.
//
//   nvcc -std=c++17 -O3 -arch=native -o memory benches/memory.cu && ./memory
//
// Each volume is 8192 rows of V elements of 2 bytes. Of each access pattern the best of several grids, the median of 15
// runs. Bytes read and written count alike. What a kernel has written last is still in the L2 cache when it ends, and
// leaves it at the expense of the next one: before margins in a call in place, gradients of the call before.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                                           \
    do {                                                                                                      \
        cudaError_t error = (call);                                                                           \
        if (error != cudaSuccess) {                                                                           \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));                                    \
            exit(1);                                                                                          \
        }                                                                                                     \
    } while (0)

// Pieces of 16 bytes that a thread has on their way.
constexpr int AHEAD = 4;

__global__ void read_one(const uint4 *a, size_t pieces, uint32_t *out) {
    size_t step = size_t(gridDim.x) * blockDim.x * AHEAD;
    uint32_t bits = 0;
    for (size_t i = size_t(blockIdx.x) * blockDim.x * AHEAD + threadIdx.x; i < pieces; i += step) {
        uint4 x[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            size_t at = i + k * blockDim.x;
            x[k] = at < pieces ? __ldcs(a + at) : uint4();
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            bits |= x[k].x | x[k].y | x[k].z | x[k].w;
        }
    }
    // Never, but the compiler does not know.
    if (bits == 0x12345678) {
        *out = bits;
    }
}

__global__ void read_two_write_one(const uint4 *a, const uint4 *b, uint4 *c, size_t pieces) {
    size_t step = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < pieces; i += step) {
        uint4 x = __ldcs(a + i), y = __ldcs(b + i);
        __stcs(c + i, make_uint4(x.x ^ y.x, x.y ^ y.y, x.z ^ y.z, x.w ^ y.w));
    }
}

template <class Before, class F> double median_ms(Before before, F run) {
    constexpr int RUNS = 15;
    cudaEvent_t starts[2 * RUNS], ends[2 * RUNS];
    for (int i = 0; i < 2 * RUNS; i++) {
        CHECK(cudaEventCreate(&starts[i]));
        CHECK(cudaEventCreate(&ends[i]));
    }
    for (int i = 0; i < 2 * RUNS; i++) {
        before();
        CHECK(cudaEventRecord(starts[i]));
        run();
        CHECK(cudaEventRecord(ends[i]));
    }
    CHECK(cudaDeviceSynchronize());
    // The first half is while the clocks rise.
    std::vector<float> times(RUNS);
    for (int i = 0; i < RUNS; i++) {
        CHECK(cudaEventElapsedTime(&times[i], starts[RUNS + i], ends[RUNS + i]));
    }
    std::sort(times.begin(), times.end());
    return times[RUNS / 2];
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    printf("%s\n\n| 8192 x V x 2 bytes | volumes | ms | GB/s |\n|---|---|---|---|\n", device.name);
    constexpr int THREADS = 256;
    for (size_t vocab : {4096, 8192, 32000, 50257, 128256, 151936}) {
        size_t bytes = 8192 * vocab * 2, pieces = bytes / 16;
        uint4 *a, *b, *c;
        CHECK(cudaMalloc(&a, bytes));
        CHECK(cudaMalloc(&b, bytes));
        CHECK(cudaMalloc(&c, bytes));
        CHECK(cudaMemset(a, 1, bytes));
        CHECK(cudaMemset(b, 2, bytes));
        auto row = [&](const char *what, int volumes, auto before, auto launch, std::vector<size_t> grids) {
            double best = 1e9;
            for (size_t grid : grids) {
                best = std::min(best, median_ms(before, [&] { launch(unsigned(grid)); }));
            }
            CHECK(cudaGetLastError());
            printf("| V = %zu, %s | %d | %.3f | %.0f |\n", vocab, what, volumes, best, volumes * bytes / best / 1e6);
        };
        size_t at_once = device.multiProcessorCount, all = (pieces + THREADS - 1) / THREADS;
        auto as_rows = [&](unsigned grid) { read_two_write_one<<<grid, THREADS>>>(a, b, c, pieces); };
        auto as_margins = [&](unsigned grid) {
            read_one<<<grid, THREADS>>>(a, pieces, reinterpret_cast<uint32_t *>(c));
        };
        auto copy = [&](unsigned) { CHECK(cudaMemcpyAsync(c, a, bytes, cudaMemcpyDeviceToDevice)); };
        auto nothing = [] {};
        std::vector<size_t> few = {4 * at_once, 8 * at_once};
        row("copied by the driver", 2, nothing, copy, {1});
        row("two read and one written, as rows are", 3, nothing, as_rows, {8 * at_once, all});
        row("read, as margins are", 1, nothing, as_margins, few);
        row("the same after rows, as in a call in place", 1, [&] { as_rows(unsigned(all)); }, as_margins, few);
        CHECK(cudaFree(a));
        CHECK(cudaFree(b));
        CHECK(cudaFree(c));
    }
}
