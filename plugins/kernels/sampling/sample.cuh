// dijiang_sample: one token per row in one launch. A team of blocks reads the row once into shared memory where that
// fits, and looks at it there as often as the filters need.
#pragma once

#include "device/overlap.cuh"
#include "sampling/draw.cuh"
#include "sampling/select.cuh"

namespace dijiang {

// What a pass over a row, or some of it, finds. Keys and ids have an order of their own: the best key, of the lowest id.
struct Report {
    uint32_t best_key, best_id;
    uint32_t least_key;  // of the finite scores
    uint32_t wrong;      // not 0: a NaN or +inf

    explicit __device__ Report(const uint4& words)
        : best_key(words.x), best_id(words.y), least_key(words.z), wrong(words.w) {}
    __device__ uint4 words() const { return {best_key, best_id, least_key, wrong}; }
    __device__ uint64_t best() const { return uint64_t{best_key} << 32 | ~best_id; }
    __device__ bool nothing() const { return best_key <= kLowestKey; }
    static __device__ uint4 none() { return {0, ~0u, ~0u, 0}; }
};

__device__ __forceinline__ Report warp_report(const uint4& words) {
    const Report mine(words);
    const uint32_t key = __reduce_max_sync(~0u, mine.best_key);
    return Report({key, __reduce_min_sync(~0u, mine.best_key == key ? mine.best_id : ~0u),
                   __reduce_min_sync(~0u, mine.least_key), __reduce_or_sync(~0u, mine.wrong)});
}

struct SampleMemory {
    dijiang_sampling_options options;
    Part part;
    Arrivals arrivals;
    uint4 warps[kWarps], blocks[kMostTeam];  // reports
    DrawMemory draw;
    SampleNumbers numbers;
    SelectMemory select;
};

// What a thread has found so far.
struct Found {
    float best = -INFINITY, least = INFINITY;
    int best_id = -1;
    uint32_t wrong = 0;

    __device__ void see(int id, float score) {
        wrong |= score < INFINITY ? 0u : 1u;
        if (score > best) {
            best = score;
            best_id = id;
        }
        least = fminf(least, score > -INFINITY ? score : INFINITY);
    }
    __device__ Report report() const {
        return Report({key_of(best), static_cast<uint32_t>(best_id), key_of(least), wrong});
    }
};

// Reads the logits, keeps the scores where there is room for them, and tells all threads of the team. A greedy choice
// does not need them again.
__device__ Report survey(const Team& team, const Part& part, bool greedy, const SampleParams& params, int row,
                         SampleMemory& memory) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int first = part.begin + warp * part.per_warp, last = min(first + part.per_warp, part.end);
    const bool masked = part.allowed != nullptr || part.seen != nullptr;
    Found found;
    if (part.staged != nullptr || !masked)
        part.each_read(first, last, [&](int id, float logit) {
            if (part.staged != nullptr && id < last) part.staged[id - part.begin] = logit;
            if (!masked) found.see(id, logit);
        });
    if (masked) {
        part.each(first, last, [&](int id, float read) {
            const float score = part.staged != nullptr && id < last ? part.prepare(read, id) : read;
            if (part.staged != nullptr && id < last) part.staged[id - part.begin] = score;
            found.see(id, score);
        });
    }
    const Report mine = warp_report(found.report().words());
    if (lane == 0) memory.warps[warp] = mine.words();
    team.have_appeared();
    __syncthreads();
    if (threadIdx.x < 32) team.tell(memory.blocks, warp_report(memory.warps[lane]).words(), &memory.arrivals.reports);
    if (!greedy && threadIdx.x == kThreads - 1) {  // it takes a while, as the reports do
        const dijiang_sample_buffers& b = params.buffers;
        const uint64_t stream = b.streams == nullptr ? static_cast<uint64_t>(row) : b.streams[row];
        memory.draw.random = philox_first(memory.options.seed, stream, static_cast<uint64_t>(b.draws[row]));
    }
    team.await(&memory.arrivals.reports);
    return warp_report(lane < team.size ? memory.blocks[lane] : Report::none());
}

__device__ __forceinline__ void write_token(const dijiang_sample_buffers& b, int row, int token) {
    if (b.integers == DIJIANG_INT64) {
        static_cast<int64_t*>(b.tokens)[row] = token;
    } else {
        static_cast<int32_t*>(b.tokens)[row] = token;
    }
}

__device__ __forceinline__ bool possible(const dijiang_sampling_options& o) {
    return o.temperature >= 0 && o.temperature <= DBL_MAX && o.top_p > 0 && o.top_p <= 1 && o.min_p >= 0 &&
           o.min_p <= 1 && o.repetition_penalty > 0 && o.repetition_penalty <= DBL_MAX && o.top_k >= 0;
}

// top-k, and then top-p of what that left: memory.select.place is where the tokens begin that are kept.
__device__ __forceinline__ void filter(const Team& team, const Part& part, const Softmax& softmax, SampleMemory& memory,
                                       const Report& found, int vocabulary) {
    SelectMemory& select_memory = memory.select;
    const Selection row(team, memory.arrivals, part, softmax, found.best(), score_of(found.least_key));
    row.histogram(select_memory, [&](float exponent, uint64_t) { return row.bin_at(exponent); });
    if (threadIdx.x == 0) select_memory.selected = row;
    accumulate(select_memory.running, {}, row.add_up(select_memory), select_memory.scratch);
    if (threadIdx.x == 0) select_memory.kept = select_memory.running[kBins - 1].weight;
#pragma unroll 1
    for (int number = 0; number < kFilters; ++number) {
        const bool by_count = number == 0;
        const dijiang_sampling_options& options = memory.options;
        if (by_count ? options.top_k == 0 || options.top_k >= vocabulary : options.top_p >= 1) continue;
        if (threadIdx.x == 0) {
            const uint64_t total = select_memory.kept;
            const double share = ceil(options.top_p * static_cast<double>(total));
            const uint64_t weight = min(max(static_cast<uint64_t>(share), uint64_t{1}), total);
            select_memory.target = by_count ? static_cast<uint64_t>(options.top_k) : weight;
        }
        __syncthreads();
        select(select_memory, number, by_count);
    }
}

__device__ __forceinline__ void sample_row(const SampleParams& params, const SampleCut& cut, SampleMemory& memory,
                                           float* staging) {
    const dijiang_sample_buffers& b = params.buffers;
    const Team team{cut.team};
    const int row = static_cast<int>(blockIdx.x) >> team.bits();
    if (threadIdx.x == 0) {
        memory.select.listed[0] = memory.select.listed[1] = 0;
        memory.select.place = 0;
        if (team.size > 1) memory.arrivals.make(team.size, kBins);
    }
    team.appear();
    let_next_kernel_start();
    clear(memory.select);
    wait_for_previous_kernel();
    if (threadIdx.x == 0) {
        memory.options = params.options_per_row ? b.row_options[row] : params.options;
        memory.numbers = params.options_per_row ? numbers_of(memory.options, b.vocabulary) : params.numbers;
        const int begin = min(team.rank() * kWarps * cut.per_warp, b.vocabulary);
        memory.part = {b.logits + row * b.logits_row_stride,
                       b.allowed == nullptr ? nullptr : b.allowed + row * b.allowed_row_stride,
                       b.seen == nullptr || memory.options.repetition_penalty == 1 ? nullptr
                                                                                   : b.seen + row * b.seen_row_stride,
                       memory.options.repetition_penalty, cut.staged_bytes > 0 ? staging : nullptr, begin,
                       min(begin + kWarps * cut.per_warp, b.vocabulary), cut.per_warp};
    }
    __syncthreads();
    const dijiang_sampling_options& options = memory.options;
    const bool reports = team.rank() == 0 && threadIdx.x == 0;
    const bool greedy = options.temperature == 0;
    const auto refuse = [&](int status) {
        if (!reports) return;
        b.row_status[row] = status;
        write_token(b, row, -1);
    };
    // Others the host has looked at.
    if (params.options_per_row && (!possible(options) || (!greedy && b.draws == nullptr))) {
        team.have_appeared();
        return refuse(DIJIANG_ROW_BAD_OPTIONS);
    }

    const Part& part = memory.part;
    const Report found = survey(team, part, greedy, params, row, memory);
    if (found.wrong != 0) return refuse(DIJIANG_ROW_NOT_FINITE);
    if (found.nothing()) return refuse(DIJIANG_ROW_NOTHING_ALLOWED);
    if (greedy) {
        if (!reports) return;
        b.row_status[row] = DIJIANG_ROW_OK;
        return write_token(b, row, static_cast<int>(found.best_id));
    }
    Softmax softmax = Softmax::make(score_of(found.best_key), memory.numbers.rate, b.vocabulary);
    const bool filters = (options.top_k > 0 && options.top_k < b.vocabulary) || options.top_p < 1;
    if (filters) {
        filter(team, part, softmax, memory, found, b.vocabulary);
        softmax = memory.select.selected.softmax;  // not kept in registers meanwhile
    }
    const uint64_t least_weight = memory.numbers.least_weight, kept_from = memory.select.place;
    const int token = draw(team, part, memory.draw, &memory.arrivals.weights, [&](int id, float score) -> uint64_t {
        if (place_of(score, id) < kept_from) return 0;
        const uint64_t weight = softmax.weight(score);
        return weight >= least_weight ? weight : 0;
    });
    if (token < 0) return;
    b.row_status[row] = DIJIANG_ROW_OK;
    write_token(b, row, token);
}

}  // namespace dijiang
