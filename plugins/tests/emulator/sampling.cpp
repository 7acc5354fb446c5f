// dijiang_sample on a CPU: its own kernel, on emulated threads of emulated clusters.
#include "cuda_on_cpu.h"

#include "sampling/sample.cuh"

// A valid call whose pointers are the host's. team: blocks of a row; staged: 1 keeps scores in shared memory.
extern "C" void emulate_sample(const dijiang_sampling_options* options, const dijiang_sample_buffers* buffers, int32_t team,
                               int32_t staged, int32_t backwards) {
    using namespace dijiang;
    SampleParams params{};
    params.buffers = *buffers;
    params.options_per_row = buffers->row_options != nullptr;
    if (!params.options_per_row) params.options = *options, params.numbers = numbers_of(*options, buffers->vocabulary);
    const int per_warp = 32 * ((buffers->vocabulary - 1) / (kThreads * team) + 1);
    const SampleCut cut = {team, per_warp, staged != 0 ? 4 * kWarps * per_warp : 0};
    if (sizeof(SampleMemory) + static_cast<size_t>(cut.staged_bytes) > emulator::kSharedMemory) std::abort();
    const std::unique_ptr<unsigned char[]> shared(new unsigned char[kMostTeam * emulator::kSharedMemory]);
    for (int row = 0; row < buffers->batch; ++row)
        emulator::run_cluster(
            static_cast<unsigned>(row * team), team, dim3(kThreads), shared.get(),
            [&] { sample_row(params, cut); }, backwards != 0);
}
