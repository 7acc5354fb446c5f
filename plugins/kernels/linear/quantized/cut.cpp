// How products with quantised weights are cut, on the host.
#include <algorithm>

#include "host/errors.h"
#include "linear/outputs.h"
#include "linear/quantized/quantized.h"

namespace dijiang {
namespace quantized {
namespace {

using linear::ceiling;
using linear::kMoments;
using linear::kMostRows;
using linear::kReserved;
using linear::one_input;
using linear::tiles_of;

constexpr int32_t kMostBlocks = 2, kMostWarps = 16;  // of a launch on a multiprocessor, with the registers that the kernels have
constexpr int32_t kManyRows = 128, kHalfRows = 64;  // of a block of many

// What a multiprocessor takes for a chunk and a warp for one of its own, what each round of tiles and each warp of a block
// adds, and what a thread takes to stage eight elements, in clocks: as measured on an H100.
constexpr float kChunkClocks = 60, kOwnClocks = 1000, kRoundClocks = 2500, kWarpClocks = 80, kStageClocks = 500;

int32_t padded(const Term& term) { return term.chunks * chunk_elements(term.format); }

// What does not depend on the way to cut.
struct Work {
    int64_t tiles = 0;
    int32_t longest = 0;  // chunks of a tile
    int32_t pitch = 0;    // elements of a staged row
};

Work outline(const dijiang_linear_call& call, Params& params) {
    Work work;
    params.call = call;
    for (int32_t t = 0; t < call.term_count; ++t) {
        const int32_t format = format_of(call, t);
        params.terms[t] = {format, ceiling(call.terms[t].inner, chunk_elements(format))};
    }
    for (int32_t o = 0, term = 0; o < call.output_count; ++o) {
        OutputCut& cut = params.outputs[o];
        cut.term = term;
        int32_t chunks = 0, sum = 0, most = 0;
        for (; term < call.term_count && call.terms[term].output == o; ++term) {
            chunks += params.terms[term].chunks;
            sum += padded(params.terms[term]);
            most = std::max(most, padded(params.terms[term]));
        }
        cut.terms = term - cut.term;
        cut.shared_input = one_input(call.outputs[o], call.terms + cut.term, cut.terms);
        cut.staged = cut.shared_input ? most : sum;
        if (call.outputs[o].activation == DIJIANG_SWIGLU) params.any_gated = 1;
        work.longest = std::max(work.longest, chunks);
        work.pitch = std::max(work.pitch, staged_pitch(cut.staged));
        work.tiles += tiles_of(call.outputs[o]);
    }
    return work;
}

// A way to cut: rows of a block, how many warps share a tile's K, how many tiles a block has at a time, and how many
// blocks a multiprocessor has.
struct Shape {
    int32_t rows, warps, tiles, blocks;

    int32_t threads() const { return 32 * warps * tiles; }
};

// Bytes of a block: the ring, the staged rows, the warps' sums.
int32_t staged_offset(const Shape& shape) { return kAhead * kSlot * shape.warps * shape.tiles; }
int32_t sums_offset(const Work& work, const Shape& shape) { return staged_offset(shape) + 2 * shape.rows * work.pitch; }
int32_t shared_memory(const Params& params, const Work& work, const Shape& shape) {
    const int32_t sums = 2 * (shape.rows > 8 ? 4 : 2) * (params.any_gated != 0 ? 2 : 1);
    return sums_offset(work, shape) + std::max(4 * sums * shape.threads(), kMoments);
}

// As many rounds as let all blocks run at once.
int32_t rounds_of(const dijiang_device& device, const Params& params, const Work& work, const Shape& shape) {
    return ceiling(work.tiles * ceiling(params.call.rows, shape.rows),
                   int64_t{device.multiprocessors} * shape.blocks * shape.tiles);
}

// Expected, in clocks.
float cost_of(const dijiang_device& device, const Params& params, const Work& work, const Shape& shape) {
    const int32_t rounds = rounds_of(device, params, work, shape);
    const auto load = static_cast<float>(rounds * shape.blocks * shape.tiles * work.longest);
    const auto own = static_cast<float>(rounds * ceiling(work.longest, shape.warps));
    const auto staged = static_cast<float>(shape.rows * work.pitch) / static_cast<float>(8 * shape.threads());
    return std::max(kChunkClocks * load, kOwnClocks * own) + kRoundClocks * static_cast<float>(rounds) +
           kWarpClocks * static_cast<float>(shape.warps * shape.tiles) + kStageClocks * staged;
}

bool fits(const dijiang_device& device, const Params& params, const Work& work, const Shape& shape) {
    return shape.blocks * (shared_memory(params, work, shape) + kReserved) <= device.shared_memory + kReserved;
}

// The cheapest shape that fits; no threads if none does.
Shape cheapest(const dijiang_device& device, const Params& params, const Work& work) {
    Shape best = {};
    float least = 0;
    // Fewer rows to a block make the weights be read again, but more of them fit a multiprocessor.
    for (int32_t rows = std::min(params.call.rows, kMostRows); rows > 0; rows = rows > 8 ? 8 : rows / 2)
        for (int32_t warps = 1; warps <= std::min(work.longest, kMostThreads / 32); ++warps)
            for (int32_t tiles = 1; tiles * warps <= kMostThreads / 32; ++tiles)
                for (int32_t blocks = 1; blocks <= kMostBlocks && blocks * tiles * warps <= kMostWarps; ++blocks) {
                    const Shape shape = {rows, warps, tiles, blocks};
                    if (!fits(device, params, work, shape)) break;
                    const float cost = cost_of(device, params, work, shape);
                    if (best.rows == 0 || cost < 0.98f * least) best = shape, least = cost;
                }
    return best;
}

bool cut_few(const dijiang_device& device, const Work& work, Launch& launch) {
    Params& params = launch.params;
    const Shape shape = cheapest(device, params, work);
    if (shape.rows == 0) {
        launch.shared_memory = shared_memory(params, work, {1, 1, 1, 1});
        return false;
    }
    launch.threads = shape.threads();
    launch.row_blocks = ceiling(params.call.rows, shape.rows);
    launch.shared_memory = shared_memory(params, work, shape);
    params.warps_per_tile = shape.warps;
    params.tiles_per_block = shape.tiles;
    params.rows_per_block = shape.rows;
    params.staged_offset = staged_offset(shape);
    params.sums_offset = sums_offset(work, shape);
    const int32_t rounds = rounds_of(device, params, work, shape);
    for (int32_t o = 0; o < params.call.output_count; ++o) {
        OutputCut& cut = params.outputs[o];
        cut.rounds = rounds;
        cut.blocks = ceiling(tiles_of(params.call.outputs[o]), int64_t{rounds} * shape.tiles);
        cut.first_block = launch.blocks;
        launch.blocks += cut.blocks;
    }
    return true;
}

// The kernel for many rows has no norms, and takes two factors' weights together.
bool can_be_many(const Params& params) {
    for (int32_t o = 0; o < params.call.output_count; ++o) {
        const OutputCut& cut = params.outputs[o];
        if (params.call.outputs[o].norm != DIJIANG_NORM_NONE) return false;
        if (params.call.outputs[o].activation == DIJIANG_SWIGLU &&
            (cut.shared_input == 0 || params.terms[cut.term].format != params.terms[cut.term + 1].format))
            return false;
    }
    return params.call.rows > kMostRows;
}

bool cut_many(const dijiang_device& device, Launch& launch) {
    Params& params = launch.params;
    int32_t elements = 0;
    for (int32_t t = 0; t < params.call.term_count; ++t)
        elements = std::max(elements, chunk_elements(params.terms[t].format));
    launch.many = true;
    launch.threads = 128;
    launch.blocks = 0;
    for (int32_t o = 0; o < params.call.output_count; ++o) {
        OutputCut& cut = params.outputs[o];
        cut.first_block = launch.blocks;
        cut.blocks = ceiling(tiles_of(params.call.outputs[o]), params.call.outputs[o].activation == DIJIANG_SWIGLU ? 8 : 16);
        launch.blocks += cut.blocks;
    }
    // Two blocks to a multiprocessor, or all its parts are not busy.
    const int64_t tiles = int64_t{launch.blocks} * ceiling(params.call.rows, kManyRows);
    params.rows_per_block = tiles >= 2 * device.multiprocessors ? kManyRows : kHalfRows;
    launch.row_blocks = ceiling(params.call.rows, params.rows_per_block);
    params.sums_offset = params.rows_per_block * elements * 2;
    params.staged_offset = params.sums_offset + 16 * kSlot;
    launch.shared_memory = std::max(2 * params.staged_offset, 4 * params.rows_per_block * kPitch);
    return launch.blocks <= 65535 && launch.shared_memory <= device.shared_memory;
}

}  // namespace

dijiang_status cut(const dijiang_linear_call& call, const dijiang_device& device, Launch& launch) {
    launch = {};
    const Work work = outline(call, launch.params);
    if (can_be_many(launch.params)) {
        Launch many = launch;
        if (cut_many(device, many)) {
            launch = many;
            return DIJIANG_OK;
        }
    }
    if (cut_few(device, work, launch)) return DIJIANG_OK;
    return fail(DIJIANG_UNSUPPORTED,
                "the input is too wide for this GPU; one row needs %d bytes of shared memory; expected %d at most",
                launch.shared_memory, device.shared_memory);
}

std::string describe(const Launch& launch) {
    if (launch.many)
        return "quantized many blocks=" + std::to_string(launch.blocks * launch.row_blocks) +
               " rows=" + std::to_string(launch.params.rows_per_block) +
               " shared=" + std::to_string(launch.shared_memory);
    return "quantized few blocks=" + std::to_string(launch.blocks) + " threads=" + std::to_string(launch.threads) +
           " rows=" + std::to_string(launch.params.rows_per_block) + " passes=" + std::to_string(launch.row_blocks) +
           " shared=" + std::to_string(launch.shared_memory) +
           " warps=" + std::to_string(launch.params.warps_per_tile) +
           " tiles=" + std::to_string(launch.params.tiles_per_block) +
           " rounds=" + std::to_string(launch.params.outputs[0].rounds);
}

}  // namespace quantized
}  // namespace dijiang
