// What racecheck makes of named barriers that one side passes with bar.arrive (producers and consumers).
//
// The kernel has no race: consumers pass bar.sync before they read what producers wrote before their bar.arrive
// (PTX ISA, barrier.cta: the producer and consumer model). If racecheck reports one, it does not follow
// bar.arrive, and its reports about kernels that use it say nothing.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void produce_and_consume(const float* input, float* output) {
    __shared__ float tile[2][64];
    const int lane = threadIdx.x % 64;
    if (threadIdx.x < 64) {  // producers
        for (int i = 0; i < 8; ++i) {
            if (i >= 2) asm volatile("bar.sync %0, 128;" ::"r"(3 + i % 2) : "memory");
            tile[i % 2][lane] = input[64 * i + lane];
            asm volatile("bar.arrive %0, 128;" ::"r"(1 + i % 2) : "memory");
        }
    } else {  // consumers
        float sum = 0.0f;
        for (int i = 0; i < 8; ++i) {
            asm volatile("bar.sync %0, 128;" ::"r"(1 + i % 2) : "memory");
            sum += tile[i % 2][63 - lane];
            if (i < 6) asm volatile("bar.arrive %0, 128;" ::"r"(3 + i % 2) : "memory");
        }
        output[lane] = sum;
    }
}

int main() {
    float *input = nullptr, *output = nullptr;
    if (cudaMalloc(&input, 512 * 4) != cudaSuccess || cudaMalloc(&output, 64 * 4) != cudaSuccess) return 3;
    cudaMemset(input, 0, 512 * 4);
    produce_and_consume<<<4, 128>>>(input, output);
    const cudaError_t error = cudaDeviceSynchronize();
    std::printf("%s\n", cudaGetErrorString(error));
    return error != cudaSuccess;
}
