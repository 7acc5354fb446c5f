// dijiang_sample on a CPU: its own kernel, on emulated threads of emulated clusters.
#include "cuda_on_cpu.h"

#include "sampling/sample.cuh"

// A valid call whose pointers are the host's. threads: of a block; team: blocks of a row; staged: 1 keeps scores in
// shared memory, 2 where filters of many tokens have theirs, if a launch may do that.
extern "C" void emulate_sample(const dijiang_sampling_options* options, const dijiang_sample_buffers* buffers,
                               int32_t threads, int32_t team, int32_t staged, int32_t backwards) {
    using namespace dijiang;
    SampleParams params{};
    params.buffers = *buffers;
    params.options_per_row = buffers->row_options != nullptr;
    if (!params.options_per_row) params.options = *options, params.numbers = numbers_of(*options, buffers->vocabulary);
    const int per_warp = 32 * ((buffers->vocabulary - 1) / (threads * team) + 1);
    const int32_t top_k = options->top_k < buffers->vocabulary ? options->top_k : 0;
    const bool slim = staged == 2 && !params.options_per_row &&
                      (are_few(top_k, threads * team) || (top_k == 0 && options->top_p == 1));
    const int staging = staged == 0 ? 0 : slim ? kSlimMemory : kFullMemory;
    const int bytes = std::max(kFullMemory, staging + threads / 8 * per_warp);
    const SampleCut cut = {threads, team, per_warp, staging, bytes, slim};
    if (static_cast<size_t>(cut.bytes) > emulator::kSharedMemory) std::abort();
    const std::unique_ptr<unsigned char[]> shared(new unsigned char[kMostTeam * emulator::kSharedMemory]);
    for (int row = 0; row < buffers->batch; ++row)
        emulator::run_cluster(
            static_cast<unsigned>(row * team), team, dim3(static_cast<unsigned>(threads)), shared.get(),
            [&] { sample_row(params, cut); }, backwards != 0);
}
