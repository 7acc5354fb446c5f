// How long a value takes from all blocks to all blocks: rounds of "write eight slots, read all", with and without a stream of
// weights beside it. Not part of the library.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90,code=sm_90 step-hops.cu -o step-hops && ./step-hops
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CK(x) do { cudaError_t e = (x); if (e) { printf("ERR %s line %d\n", cudaGetErrorString(e), __LINE__); exit(1); } } while (0)

constexpr int kPiece = 16384, kThreads = 512, kBlocks = 132, kSenders = 128;

struct P {
    uint2* slots;
    unsigned* count;
    const uint8_t* w;
    size_t bytes;
    int rounds, mode, flight, work;  // pieces under way; cycles of nothing behind each round
    unsigned* sink;
    long long* cycles;
};

__device__ __forceinline__ uint32_t s32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, 512;" ::: "memory"); }
__device__ __forceinline__ void bulk(void* to, const void* from, uint32_t n, uint64_t* m) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(s32(to)), "l"(from),
                 "r"(n), "r"(s32(m)) : "memory");
}
__device__ __forceinline__ void wait(uint64_t* m, uint32_t parity) {
    for (uint32_t ok = 0; !ok;)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0,1,0,p;\n}"
                     : "=r"(ok) : "r"(s32(m)), "r"(parity) : "memory");
}
__device__ __forceinline__ uint4 look(const uint2* s) {  // at two slots: {value, tag} each
    uint64_t a, b;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0,%1}, [%2];" : "=l"(a), "=l"(b) : "l"(s) : "memory");
    return make_uint4(a, a >> 32, b, b >> 32);
}
__device__ __forceinline__ void put(uint2* s, uint32_t value, uint32_t tag) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(s), "l"((uint64_t)tag << 32 | value) : "memory");
}

// Copies pieces, over and over, until told to stop.
__device__ void stream(const P& p, uint8_t* ring, uint64_t* full, volatile int* stop) {
    const size_t each = p.bytes / gridDim.x / 32768 * 32768, start = blockIdx.x * (p.bytes / gridDim.x) / 32768 * 32768;
    size_t at = start;
    unsigned n = 0;
    for (; !*stop; ++n) {
        const int slot = n % p.flight;
        if (n >= unsigned(p.flight)) wait(full + slot, (n / p.flight - 1) & 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(s32(full + slot)), "r"(kPiece) : "memory");
        bulk(ring + slot * kPiece, p.w + at, kPiece, full + slot);
        at += kPiece;
        if (at >= start + each - 8 * 32768) at = start;
    }
    for (unsigned k = 1; k <= unsigned(p.flight) && k <= n; ++k) wait(full + (n - k) % p.flight, ((n - k) / p.flight) & 1);
    p.sink[blockIdx.x] = n;
}

__global__ void __launch_bounds__(kThreads + 32, 1) hop(P p) {
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ uint64_t full[32];
    __shared__ int stop;
    __shared__ float sums[16];
    const int b = blockIdx.x, t = threadIdx.x;
    if (t == 0) {
        for (int i = 0; i < 32; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(s32(full + i)));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        stop = 0;
    }
    __syncthreads();
    if (t >= kThreads) {
        if (t == kThreads && p.flight > 0) stream(p, ring, full, &stop);
        return;
    }
    float x = 0;
    const long long begin = clock64();
    for (int r = 0; r < p.rounds; r++) {
        const uint32_t tag = r + 1;
        uint2* const slots = p.slots + (r & 1) * 4096;
        uint4 v;
        if (t < 8 && b < kSenders) put(slots + b * 8 + t, __float_as_uint(x), tag);
        if (p.mode == 2) {  // a counter, then the values
            meet();
            if (t == 0) {
                asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p.count) : "memory");
                unsigned seen;
                do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p.count) : "memory");
                while ((int)(seen - tag * gridDim.x) < 0);
            }
            meet();
            v = look(slots + 2 * t);
        } else {
            if (p.mode == 5 && t < 8 && b < kSenders) put(slots + 1024 + b * 8 + t, __float_as_uint(x), tag);
            const uint2* const from = slots + (p.mode == 5 && (b & 1) ? 1024 : 0);
            if (p.mode == 6) {  // one warp looks at a slot of every fourth block first
                if (t < 32) {
                    do v = look(from + 32 * t + 30);
                    while (v.w != tag);
                    __syncwarp();
                }
                meet();
            }
            for (;;) {
                v = look(from + 2 * t);
                if (v.y == tag && v.w == tag) break;
                if (p.mode == 1) __nanosleep(20);
                if (p.mode == 3) __nanosleep(100);
            }
        }
        x += __uint_as_float(v.x) + __uint_as_float(v.z);
        if (p.mode == 4) {
            for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
            if (t % 32 == 0) sums[t / 32] = x;
        }
        meet();
        if (p.work)
            for (const long long end = clock64() + p.work; clock64() < end;) {}
    }
    if (t == 0) {
        p.cycles[b] = clock64() - begin;
        stop = 1;
    }
    if (x == 12345.f) p.sink[0] = 1;
}

int main() {
    const int shared = 200 * 1024;
    P p{};
    uint8_t* w;
    p.bytes = 4ull << 30;
    CK(cudaMalloc(&w, p.bytes));
    CK(cudaMemset(w, 1, p.bytes));
    p.w = w;
    CK(cudaMalloc(&p.slots, 65536));
    CK(cudaMalloc(&p.count, 256));
    CK(cudaMalloc(&p.sink, 4096));
    CK(cudaMalloc(&p.cycles, 8 * kBlocks));
    CK(cudaFuncSetAttribute(hop, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int work : {0, 2000})
        for (int flight : {0, 1, 2, 4, 8, 12})
            for (int mode : {0, 1, 3, 2, 5, 6, 4}) {
                p.mode = mode, p.flight = flight, p.rounds = 2000, p.work = work;
                std::vector<float> times;
                double rate = 0;
                for (int i = 0; i < 3; i++) {
                    CK(cudaMemset(p.count, 0, 4));
                    CK(cudaMemset(p.slots, 0, 65536));
                    CK(cudaMemset(p.sink, 0, 4096));
                    void* arguments[] = {&p};
                    cudaEventRecord(begin);
                    CK(cudaLaunchCooperativeKernel((void*)hop, dim3(kBlocks), dim3(kThreads + 32), arguments, shared, 0));
                    cudaEventRecord(end);
                    CK(cudaEventSynchronize(end));
                    float ms;
                    cudaEventElapsedTime(&ms, begin, end);
                    times.push_back(ms);
                    unsigned pieces[kBlocks];
                    cudaMemcpy(pieces, p.sink, sizeof pieces, cudaMemcpyDeviceToHost);
                    double n = 0;
                    for (unsigned v : pieces) n += v;
                    rate = n * kPiece / ms / 1e9;
                }
                std::sort(times.begin(), times.end());
                printf("work %d cycles, flight %3d KB, mode %d: %.3f us a round, stream %.2f TB/s\n", work, flight * 16, mode,
                       times[1] / p.rounds * 1e3, rate);
            }
}
