// How products of few rows are cut, on the host.
#include <algorithm>

#include "host/errors.h"
#include "linear/outputs.h"

namespace dijiang {
namespace linear {
namespace {

constexpr int32_t kUsualWarps = 12;  // most of a block of several tiles
constexpr int32_t kUsualChunks = 10;  // of each warp: eight are under way before the first is needed
constexpr int32_t kThreadsPerMultiprocessor = 2 * kMostThreads;  // with the registers that the kernels have

// A way to cut: how many warps share a tile's K and how many tiles a block has at a time.
struct Shape {
    int32_t rows, warps_per_tile, tiles_per_block;
};

void cut(const dijiang_device& device, const Shape& shape, Launch& launch) {
    Params& params = launch.params;
    const dijiang_linear_call& call = params.call;
    launch.threads = 32 * shape.warps_per_tile * shape.tiles_per_block;
    params.rows_per_block = shape.rows;
    launch.row_blocks = ceiling(call.rows, shape.rows);
    int32_t term = 0, pitch = 0;
    int64_t tiles = 0;
    params.any_gated = 0;
    for (int32_t o = 0; o < call.output_count; ++o) {
        OutputCut& cut = params.outputs[o];
        cut.term = term;
        int32_t inner = 0;
        for (; term < call.term_count && call.terms[term].output == o; ++term) inner += call.terms[term].inner;
        cut.terms = term - cut.term;
        const dijiang_linear_term* const terms = call.terms + cut.term;
        cut.shared_input = one_input(call.outputs[o], terms, cut.terms);
        cut.staged = cut.shared_input ? terms[0].inner : inner;
        cut.warps_per_tile = shape.warps_per_tile;
        cut.tiles_per_block = shape.tiles_per_block;
        pitch = std::max(pitch, staged_pitch(cut.staged));
        tiles += tiles_of(call.outputs[o]);
        if (call.outputs[o].activation == DIJIANG_SWIGLU) params.any_gated = 1;
    }
    params.staged_offset = 16 * kAhead * launch.threads;
    params.sums_offset = params.staged_offset + 2 * shape.rows * pitch;
    const int32_t sums = 2 * (shape.rows > 8 ? 4 : 2) * (params.any_gated != 0 ? 2 : 1);
    launch.shared_memory = params.sums_offset + std::max(4 * sums * launch.threads, kMoments);

    // As many rounds as let all blocks run at once.
    const int32_t resident = std::max(1, std::min((device.shared_memory + kReserved) / (launch.shared_memory + kReserved),
                                                  kThreadsPerMultiprocessor / launch.threads));
    const int64_t at_once = int64_t{device.multiprocessors} * resident * shape.tiles_per_block;
    const int32_t rounds = ceiling(tiles, at_once);
    launch.blocks = 0;
    for (int32_t o = 0; o < call.output_count; ++o) {
        OutputCut& cut = params.outputs[o];
        cut.rounds = rounds;
        cut.blocks = ceiling(tiles_of(call.outputs[o]), int64_t{rounds} * shape.tiles_per_block);
        cut.first_block = launch.blocks;
        launch.blocks += cut.blocks;
    }
    // How much of the multiprocessors' time is work, were each tile's time its chunks.
    launch.share = static_cast<float>(tiles) / static_cast<float>(at_once * rounds);
}

}  // namespace

dijiang_status cut(const dijiang_linear_call& call, const dijiang_device& device, Launch& launch) {
    int32_t most_chunks = 1;
    for (int32_t t = 0; t < call.term_count; ++t) {
        int32_t chunks = call.terms[t].inner / kChunk;
        if (t > 0 && call.terms[t].output == call.terms[t - 1].output) chunks += call.terms[t - 1].inner / kChunk;
        most_chunks = std::max(most_chunks, chunks);
    }
    launch = {};
    launch.params.call = call;
    const int32_t most_warps =
        std::clamp((most_chunks + kUsualChunks / 2) / kUsualChunks, 1, kMostThreads / 32);
    // Rows that do not fit make the weights be read again, but with few warps nothing is fast.
    for (int32_t rows = std::min(call.rows, kMostRows); rows > 0; rows = rows > 8 ? 8 : rows / 2) {
        Launch best = {};
        const int32_t least_warps = rows > 1 ? (most_warps + 1) / 2 : 1;
        for (int32_t warps = most_warps; warps >= least_warps; --warps)
            for (int32_t tiles = 1; tiles * warps <= std::max(kUsualWarps, warps); ++tiles) {
                cut(device, {rows, warps, tiles}, launch);
                if (launch.shared_memory > device.shared_memory) continue;
                // Clearly better only: fewer tiles to a block begin and end earlier, more warps wait less.
                if (best.threads == 0 || launch.share > 1.05f * best.share) best = launch;
            }
        if (best.threads == 0) continue;
        launch = best;
        return DIJIANG_OK;
    }
    return fail(DIJIANG_UNSUPPORTED,
                "the input is too wide for this GPU; one row needs %d bytes of shared memory; expected %d at most",
                launch.shared_memory, device.shared_memory);
}

std::string describe(const Launch& launch) {
    std::string text = "linear blocks=" + std::to_string(launch.blocks) +
                       " threads=" + std::to_string(launch.threads) +
                       " rows=" + std::to_string(launch.params.rows_per_block) +
                       " passes=" + std::to_string(launch.row_blocks) +
                       " shared=" + std::to_string(launch.shared_memory) + " warps=";
    return text + std::to_string(launch.params.outputs[0].warps_per_tile) +
           " tiles=" + std::to_string(launch.params.outputs[0].tiles_per_block) +
           " rounds=" + std::to_string(launch.params.outputs[0].rounds);
}

}  // namespace linear
}  // namespace dijiang
