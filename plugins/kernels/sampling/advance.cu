// dijiang_advance: what a decode loop counts between two steps, for all rows in one block.
#include "sampling/sampling.h"

namespace dijiang {
namespace {

constexpr int kAdvanceThreads = 256;

template <typename Integer>
__device__ bool advance_row(const dijiang_advance_buffers& b, int64_t row) {
    Integer* const seq_lens = static_cast<Integer*>(b.seq_lens);
    const int64_t token = static_cast<const Integer*>(b.tokens)[row];
    const bool good = (b.row_status == nullptr || b.row_status[row] == DIJIANG_ROW_OK) && token >= 0 &&
                      token < b.vocabulary;
    bool goes_on = b.finished[row] == 0 && good;
    if (goes_on) {
        for (int i = 0; i < b.stop_count; ++i) goes_on = goes_on && b.stop_ids[i] != token;
        if (b.history != nullptr) {
            const int32_t length = b.history_lens[row];
            if (length >= 0 && length < b.history_max) {
                static_cast<Integer*>(b.history)[row * b.history_row_stride + length] =
                    static_cast<Integer>(token);
                b.history_lens[row] = length + 1;
            }
            goes_on = goes_on && length + 1 < b.history_max;
        }
        if (b.seen != nullptr) b.seen[row * b.seen_row_stride + token / 32] |= 1u << (token % 32);
        if (b.draws != nullptr) b.draws[row] += 1;
    }
    if (b.positions != nullptr) static_cast<Integer*>(b.positions)[row] += seq_lens[row];
    if (seq_lens != nullptr) seq_lens[row] = goes_on ? 1 : 0;
    if (b.input_ids != nullptr)
        static_cast<Integer*>(b.input_ids)[row] = static_cast<Integer>(goes_on ? token : b.pad_id);
    b.finished[row] = goes_on ? 0 : 1;
    return goes_on;
}

__global__ void __launch_bounds__(kAdvanceThreads)
    advance_kernel(const __grid_constant__ dijiang_advance_buffers b) {
    __shared__ int active;
    if (threadIdx.x == 0) active = 0;
    __syncthreads();
    int mine = 0;
    for (int64_t row = threadIdx.x; row < b.batch; row += kAdvanceThreads)
        mine += (b.integers == DIJIANG_INT64 ? advance_row<int64_t>(b, row) : advance_row<int32_t>(b, row))
                    ? 1
                    : 0;
    if (b.active == nullptr) return;
    if (mine > 0) atomicAdd(&active, mine);
    __syncthreads();
    if (threadIdx.x == 0) *b.active = active;
}

}  // namespace

cudaError_t launch_advance(const dijiang_advance_buffers& buffers, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(kAdvanceThreads);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, advance_kernel, buffers);
}

}  // namespace dijiang
