// Prefill's kernels for compute capability 9.0 on a CPU.
#include "cuda_on_cpu.h"

#include "attention/prefill/hopper/slices/kernel.cuh"
#include "attention/prefill/hopper/spans/kernel.cuh"

namespace dijiang::prefill {
namespace {

constexpr int kMostBlocks = 4;  // of a cluster
alignas(1024) unsigned char shared[kMostBlocks * emulator::kSharedMemory];

template <typename T, int D, bool kSpans = false> void run(const AttentionParams& p, const Schedule& schedule, bool backwards) {
    emulator::shared_memory = shared;
    const hopper::Cut cut = {schedule.segments, schedule.segment_chunks,
                             reinterpret_cast<float*>(static_cast<char*>(p.workspace) + schedule.states)};
    emulator::grid = dim3(static_cast<unsigned>(schedule.blocks));
    for (unsigned x = 0; x < emulator::grid.x; ++x)
        emulator::run_block({x, 0, 0}, dim3(static_cast<unsigned>(schedule.threads)),
                            [&] {
                                if constexpr (kSpans) hopper::spans::spans_kernel<T, D>(p, cut);
                                else hopper::hopper_kernel<T, D>(p, cut);
                            },
                            backwards);
}

template <typename T> void run_slices(const AttentionParams& p, const Schedule& schedule, bool backwards) {
    using namespace hopper::slices;
    char* const workspace = static_cast<char*>(p.workspace);
    char* const items = workspace + schedule.features;
    const SliceCut cut = {{schedule.segments, schedule.segment_chunks,
                           reinterpret_cast<float*>(workspace + schedule.states)},
                          items};
    const auto over = [&](int blocks, int cluster, int threads, auto&& kernel) {
        emulator::grid = dim3(static_cast<unsigned>(blocks));
        for (int first = 0; first < blocks; first += cluster)
            emulator::run_cluster(static_cast<unsigned>(first), cluster, dim3(static_cast<unsigned>(threads)), shared,
                                  kernel, backwards);
    };
    using F = FeatureShape<256>;
    using S = Slice<256>;
    over(schedule.feature_blocks, F::kBlocks, F::kThreads, [&] { slice_features_kernel<T, 256>(p, items); });
    over(schedule.blocks, S::kBlocks, S::kThreads, [&] { slices_kernel<T, 256>(p, cut); });
}

}  // namespace
}  // namespace dijiang::prefill

// Bytes that are enough for the calls of the tests.
extern "C" int64_t workspace_of_prefill() { return 48 << 20; }

// A call whose pointers are the host's, cut as for a GPU of so many multiprocessors. Returns the blocks, 0 if it is
// not for this kernel. backwards, eager: the order of threads, and of products.
extern "C" int32_t emulate_prefill(const dijiang::AttentionParams* p, int32_t dtype, int32_t multiprocessors,
                                   int32_t backwards, int32_t eager) {
    using namespace dijiang::prefill;
    dijiang_geometry geometry{};
    geometry.num_heads = p->num_heads, geometry.num_kv_heads = p->num_kv_heads, geometry.head_dim = p->head_dim;
    geometry.rotary_dim = p->rotary_dim, geometry.dtype = dtype, geometry.table_rows = p->table_rows;
    const Schedule schedule = make_schedule(geometry, p->batch, p->length, {90, multiprocessors, 227 << 10, 0});
    if (schedule.path != Path::hopper && schedule.path != Path::spans && schedule.path != Path::slices) return 0;
    if (schedule.workspace > static_cast<size_t>(workspace_of_prefill()) || schedule.sync > 4096) std::abort();
    emulator::eager = eager != 0;
    const bool half = dtype == DIJIANG_FLOAT16;
    const int d = p->head_dim;
    if (schedule.path == Path::slices)
        (half ? run_slices<__half> : run_slices<__nv_bfloat16>)(*p, schedule, backwards != 0);
    else (d == 64   ? (half ? run<__half, 64, true> : run<__nv_bfloat16, 64, true>)
     : d == 80 ? (half ? run<__half, 80> : run<__nv_bfloat16, 80>)
               : (half ? run<__half, 128> : run<__nv_bfloat16, 128>))(*p, schedule, backwards != 0);
    return schedule.blocks;
}
