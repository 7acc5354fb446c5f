// dijiang_sample: one token per row in one launch. A team of blocks reads the row once into shared memory
// where that fits, and looks at it there as often as the filters need.
#include <algorithm>

#include "sampling/philox.cuh"
#include "sampling/select.cuh"

namespace dijiang {
namespace {

// What a pass over the row finds.
struct Report {
    uint64_t best;   // the highest place; 0: nothing may be chosen
    float least;     // the lowest finite score
    uint32_t wrong;  // 1: a NaN or +inf

    __device__ Report with(const Report& other) const {
        return {max(best, other.best), fminf(least, other.least), wrong | other.wrong};
    }
};

__device__ __noinline__ Report warp_report(Report report) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2)
        report = report.with({__shfl_xor_sync(~0u, report.best, by), __shfl_xor_sync(~0u, report.least, by),
                              __shfl_xor_sync(~0u, report.wrong, by)});
    return report;
}

struct Memory {
    Report warps[kWarps], block;
    uint64_t weight;  // of this block's kept tokens
    uint64_t random, least_weight, target;
    Softmax softmax;
    dijiang_sampling_options options;  // not in registers, which are scarce
    SelectMemory select;
};

// Reads the logits, keeps the scores in `staging` unless that is null, and tells all threads of the team. A
// greedy choice needs no lowest score.
template <bool kGreedy>
__device__ Report survey(const Team& team, const Part& part, float* staging, Memory& memory) {
    float best = -INFINITY, least = INFINITY;
    int best_id = -1;
    uint32_t wrong = 0;
    part.each<kGreedy ? 8 : 4>([&](int id, float score) {
        if (!kGreedy && staging != nullptr && id < part.end) staging[id - part.begin] = score;
        wrong |= score < INFINITY ? 0u : 1u;
        if (score > best) {
            best = score;
            best_id = id;
        }
        if (!kGreedy && score > -INFINITY) least = fminf(least, score);
    });
    const Report mine = warp_report({best_id < 0 ? 0 : place_of(best, best_id), least, wrong});
    if (threadIdx.x % 32 == 0) memory.warps[threadIdx.x / 32] = mine;
    __syncthreads();
    Report all = warp_report(memory.warps[threadIdx.x % 32]);
    if (team.size == 1) return all;
    if (threadIdx.x == 0) memory.block = all;
    team.sync();
    for (int rank = 0; rank < team.size; ++rank) all = all.with(*team.of(&memory.block, rank));
    return all;
}

// Inversion: the first id at which the running sum of weights exceeds a random place. -1 in threads that did
// not find it.
template <typename Weight>
__device__ int draw(const Team& team, const Part& part, Memory& memory, uint64_t random, Weight&& weight_of) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    Tally* const sums = memory.select.scratch;
    int first = part.begin, last = part.end, share = part.per_warp;
    uint64_t place = 0;
    // Sum the share of each warp, find the share with the place, cut that into shares, until one has 32 ids.
#pragma unroll 1
    for (bool whole = true;; whole = false) {
        uint64_t sum = 0;
        const int from = first + warp * share;
        part.each(from, min(from + share, last), [&](int id, float score) { sum += weight_of(id, score); });
#pragma unroll
        for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
        if (lane == 0) sums[warp] = {0, sum};
        __syncthreads();
        const uint64_t own = sums[lane].weight, running = warp_running(sums[lane]).weight;
        if (whole) {
            const uint64_t block = __shfl_sync(~0u, running, 31);
            uint64_t before = 0, total = block;
            if (team.size > 1) {
                if (threadIdx.x == 0) memory.weight = block;
                team.sync();
                total = 0;
#pragma unroll 1
                for (int rank = 0; rank < team.size; ++rank) {
                    const uint64_t other = *team.of(&memory.weight, rank);
                    if (rank < team.rank) before += other;
                    total += other;
                }
                team.sync();  // from here on blocks may leave
            }
            place = place_below(total, random);
            if (place < before || place - before >= block) return -1;
            place -= before;
        }
        const int owner = __ffs(static_cast<int>(__ballot_sync(~0u, running > place))) - 1;
        place -= __shfl_sync(~0u, running - own, owner);
        first += owner * share;
        last = min(first + share, last);
        if (share == 32) break;
        share = 32 * ((share + kThreads - 1) / kThreads);
        __syncthreads();  // the sums are written again
    }
    int chosen = -1;
    part.each(first, last, [&](int id, float score) {
        const uint64_t running = warp_running({0, weight_of(id, score)}).weight;
        const uint32_t beyond = __ballot_sync(~0u, running > place);
        if (warp == 0 && lane == __ffs(static_cast<int>(beyond)) - 1) chosen = id;
    });
    return chosen;
}

__device__ void write_token(const dijiang_sample_buffers& b, int row, int token) {
    if (b.integers == DIJIANG_INT64) {
        static_cast<int64_t*>(b.tokens)[row] = token;
    } else {
        static_cast<int32_t*>(b.tokens)[row] = token;
    }
}

__device__ bool possible(const dijiang_sampling_options& o) {
    return o.temperature >= 0 && o.temperature <= DBL_MAX && o.top_p > 0 && o.top_p <= 1 && o.min_p >= 0 &&
           o.min_p <= 1 && o.repetition_penalty > 0 && o.repetition_penalty <= DBL_MAX && o.top_k >= 0;
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const __grid_constant__ SampleParams params, const __grid_constant__ SampleCut cut) {
    extern __shared__ float staging[];
    __shared__ Memory memory;
    const dijiang_sample_buffers& b = params.buffers;
    const Team team = Team::mine(cut.team);
    const int row = static_cast<int>(blockIdx.x) / cut.team;
    if (threadIdx.x == 0) memory.options = params.options_per_row ? b.row_options[row] : params.options;
    __syncthreads();
    const dijiang_sampling_options& options = memory.options;
    const bool reports = team.rank == 0 && threadIdx.x == 0;
    const bool greedy = options.temperature == 0;
    const auto refuse = [&](int status) {
        if (!reports) return;
        b.row_status[row] = status;
        write_token(b, row, -1);
    };
    if (!possible(options) || (!greedy && b.draws == nullptr)) return refuse(DIJIANG_ROW_BAD_OPTIONS);

    Part part{};
    part.logits = b.logits + row * b.logits_row_stride;
    part.allowed = b.allowed == nullptr ? nullptr : b.allowed + row * b.allowed_row_stride;
    part.seen =
        b.seen == nullptr || options.repetition_penalty == 1 ? nullptr : b.seen + row * b.seen_row_stride;
    part.penalty = &options.repetition_penalty;
    part.per_warp = cut.per_warp;
    part.begin = min(team.rank * kWarps * cut.per_warp, b.vocabulary);
    part.end = min(part.begin + kWarps * cut.per_warp, b.vocabulary);
    float* const staged = cut.staged_bytes > 0 && !greedy ? staging : nullptr;

    // A part of its own warp, which has the fewest logits to read: the number takes a while.
    if (!greedy && threadIdx.x == kThreads - 1) {
        const uint64_t stream = b.streams == nullptr ? static_cast<uint64_t>(row) : b.streams[row];
        memory.random = philox_first(options.seed, stream, static_cast<uint64_t>(b.draws[row]));
    }
    const Report found =
        greedy ? survey<true>(team, part, nullptr, memory) : survey<false>(team, part, staged, memory);
    if (found.wrong != 0 || found.best == 0 || greedy) {
        if (found.wrong != 0) {
            refuse(DIJIANG_ROW_NOT_FINITE);
        } else if (found.best == 0) {
            refuse(DIJIANG_ROW_NOTHING_ALLOWED);
        } else if (reports) {
            b.row_status[row] = DIJIANG_ROW_OK;
            write_token(b, row, static_cast<int>(~static_cast<uint32_t>(found.best)));
        }
        team.sync();  // others may still read this block's report
        return;
    }
    part.staged = staged;
    if (threadIdx.x == 0) {
        const float best = score_of(static_cast<uint32_t>(found.best >> 32));
        memory.softmax = Softmax::make(best, options.temperature, b.vocabulary);
        const double least = ceil(options.min_p * ldexp(1.0, memory.softmax.shift));
        memory.least_weight = max(static_cast<uint64_t>(least), uint64_t{1});
    }
    __syncthreads();
    const Softmax softmax = memory.softmax;
    uint64_t kept_from = 0;
    const bool some = options.top_k > 0 && options.top_k < b.vocabulary;
    if (some || options.top_p < 1) {
        Selector selector(team, part, softmax, memory.select, found.best, found.least);
        uint64_t total = selector.total;
#pragma unroll 1
        for (bool by_count : {true, false}) {  // top-k, then top-p of what that left
            if (by_count ? !some : options.top_p >= 1) continue;
            if (threadIdx.x == 0) {
                const double share = ceil(options.top_p * static_cast<double>(total));
                const uint64_t weight = min(max(static_cast<uint64_t>(share), uint64_t{1}), total);
                memory.target = by_count ? static_cast<uint64_t>(options.top_k) : weight;
            }
            __syncthreads();
            const Cut found = selector.select(memory.target, by_count);
            kept_from = max(kept_from, found.first);
            if (found.first != 0) total = found.weight;
        }
    }
    const uint64_t least_weight = memory.least_weight;
    __syncthreads();
    const int token = draw(team, part, memory, memory.random, [&](int id, float score) -> uint64_t {
        if (place_of(score, id) < kept_from) return 0;
        const uint64_t weight = softmax.weight(score);
        return weight >= least_weight ? weight : 0;
    });
    if (token < 0) return;
    b.row_status[row] = DIJIANG_ROW_OK;
    write_token(b, row, token);
}

int most_staged(const dijiang_device& device) {
    constexpr int kMemory = (sizeof(Memory) + 127) / 128 * 128;  // the compiler aligns what follows
    return device.shared_memory - kMemory;
}

}  // namespace

SampleCut cut_sample(int32_t batch, int32_t vocabulary, const dijiang_device& device, bool greedy) {
    constexpr int kEnough = 2048;  // ids for a block; fewer do not pay for another one
    const auto per_warp = [&](int team) { return 32 * ((vocabulary - 1) / (kThreads * team) + 1); };
    int team = 1;
    const bool clusters = device.compute_capability >= 90;
    while (clusters && team < kMostTeam && vocabulary / team > kEnough &&
           int64_t{2} * team * batch <= device.multiprocessors)
        team *= 2;
    SampleCut cut{team, per_warp(team), 0};
    const int64_t bytes = int64_t{4} * kWarps * cut.per_warp;
    if (!greedy && bytes <= most_staged(device)) cut.staged_bytes = static_cast<int>(bytes);
    return cut;
}

cudaError_t launch_sample(const SampleParams& params, const SampleCut& cut, const dijiang_device& device,
                          cudaStream_t stream) {
    // Always the same value, because threads that launch at the same time share it.
    const cudaError_t error =
        cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_staged(device));
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cut.team);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(params.buffers.batch * cut.team));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(cut.staged_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cut.team > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, sample_kernel, params, cut);
}

}  // namespace dijiang
