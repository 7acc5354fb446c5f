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
    SelectMemory select;               // first, so that it has the block's address
    dijiang_sampling_options options;  // of the row, where each has its own
    SampleNumbers numbers;
    Arrivals arrivals;
    uint4 warps[kWarps], blocks[kMostTeam];  // reports
    DrawMemory draw;
};

// One launch's arguments, and where this block's memory is. Options of all rows are read where they lie.
struct Sampler {
    const SampleParams& params;
    const SampleCut& cut;
    SampleMemory& memory;

    __device__ Team team() const { return {cut.team}; }
    __device__ int row() const { return static_cast<int>(blockIdx.x) >> team().bits(); }
    template <typename Field> __device__ Field option(Field dijiang_sampling_options::*field) const {
        return params.options_per_row ? memory.options.*field : params.options.*field;
    }
    __device__ SampleNumbers numbers() const { return params.options_per_row ? memory.numbers : params.numbers; }
    __device__ bool greedy() const { return option(&dijiang_sampling_options::temperature) == 0; }
    __device__ Part part() const {
        constexpr int kStaging = sizeof(SampleMemory);
        return Part::make(params, cut, option(&dijiang_sampling_options::repetition_penalty), kStaging);
    }
    __device__ bool has_top_k() const {
        const int top_k = option(&dijiang_sampling_options::top_k);
        return top_k > 0 && top_k < params.buffers.vocabulary;
    }
    __device__ bool has_top_p() const { return option(&dijiang_sampling_options::top_p) < 1; }
    __device__ void write(int status, int token) const {
        const dijiang_sample_buffers& b = params.buffers;
        b.row_status[row()] = status;
        if (b.integers == DIJIANG_INT64) {
            static_cast<int64_t*>(b.tokens)[row()] = token;
        } else {
            static_cast<int32_t*>(b.tokens)[row()] = token;
        }
    }
};

__device__ __forceinline__ bool possible(const dijiang_sampling_options& o) {
    return o.temperature >= 0 && o.temperature <= DBL_MAX && o.top_p > 0 && o.top_p <= 1 && o.min_p >= 0 &&
           o.min_p <= 1 && o.repetition_penalty > 0 && o.repetition_penalty <= DBL_MAX && o.top_k >= 0;
}

// A row's own options; false if they cannot be. Those of all rows the host has looked at.
__device__ __forceinline__ bool read_options(const Sampler& it) {
    SampleMemory& memory = it.memory;
    if (threadIdx.x == 0) {
        memory.options = it.params.buffers.row_options[it.row()];
        memory.numbers = numbers_of(memory.options, it.params.buffers.vocabulary);
    }
    __syncthreads();
    return possible(memory.options) && (it.greedy() || it.params.buffers.draws != nullptr);
}

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
    __device__ uint4 words() const { return {key_of(best), static_cast<uint32_t>(best_id), key_of(least), wrong}; }
};

// Reads the logits, keeps the scores where there is room for them, and tells all threads of the team.
__device__ __forceinline__ Report survey(const Sampler& it) {
    SampleMemory& memory = it.memory;
    const Team team = it.team();
    const int lane = static_cast<int>(threadIdx.x % 32);
    Found found;
    {
        const Part part = it.part();
        float* const scores = part.scores();
        const bool kept = part.kept != 0, masked = part.masked();
        if (kept || !masked)
            part.each_read([&](int i, int id, float logit) {
                if (kept) scores[32 * i] = logit;
                if (!masked) found.see(id, logit);
            });
        if (masked) {
            float* to = scores;
            part.each([&](int id, float read) {
                float score = read;
                if (kept) {
                    if (id < part.last) *to = score = part.prepare(read, id);
                    to += 32;
                }
                found.see(id, score);
            });
        }
    }
    const Report mine = warp_report(found.words());
    if (lane == 0) memory.warps[threadIdx.x / 32] = mine.words();
    team.have_appeared();
    __syncthreads();
    if (threadIdx.x < 32) team.tell(memory.blocks, warp_report(memory.warps[lane]).words(), &memory.arrivals.reports);
    if (threadIdx.x == kThreads - 1 && !it.greedy()) {  // it takes a while, as the reports do
        const dijiang_sample_buffers& b = it.params.buffers;
        const uint64_t stream = b.streams == nullptr ? static_cast<uint64_t>(it.row()) : b.streams[it.row()];
        memory.draw.random =
            philox_first(it.option(&dijiang_sampling_options::seed), stream, static_cast<uint64_t>(b.draws[it.row()]));
    }
    team.await(&memory.arrivals.reports);
    return warp_report(lane < team.size ? memory.blocks[lane] : Report::none());
}

// Keeps the best tokens until their number, or their weight, reaches memory.target >= 1; all if that is not to be reached.
// At most once for each filter, 0 first; the second keeps no more than the first.
__device__ __forceinline__ void select(const Sampler& it, int filter, bool by_count) {
    SelectMemory& memory = it.memory.select;
    if (amount(memory.all, by_count) < memory.target) {
        __syncthreads();  // the next filter has another target
        return;
    }
    reach(memory, memory.running, {}, by_count);
    const bool many = memory.inside.count > kListed;
    if (many) {
        if (threadIdx.x == 0) memory.part = it.part();
        __syncthreads();
        narrow(memory, it.cut.per_warp, it.cut.team, by_count);
    }
    const int bin = memory.bin;
    list_places(it.part(), it.team(), it.memory.arrivals, memory, filter, [&](float exponent, float score, int id) {
        if (!many) return memory.row.bin_at(exponent) == bin;
        const uint64_t place = place_of(score, id);
        return place >= memory.low_place && place <= memory.high_place;
    });
    cut_list(memory, by_count);
}

// top-k, and then top-p of what that left: memory.select.place is where the tokens begin that are kept.
__device__ __forceinline__ void filter(const Sampler& it, const Softmax& softmax, const Report& found) {
    SelectMemory& memory = it.memory.select;
    {
        const float range = fminf(-softmax.exponent(score_of(found.least_key)), -softmax.least_exponent);
        const SelectedRow row = {softmax, found.best(), range > 0 ? fminf(kBins / range, FLT_MAX) : 0.0f};
        if (threadIdx.x == 0) memory.row = row;
        histogram(it.part(), softmax, memory, [&](float exponent, float, int) { return row.bin_at(exponent); });
    }
    add_up(it.team(), it.memory.arrivals, memory);
    if (threadIdx.x < 32) {
        const Tally all = warp_sum(memory.running[32 * threadIdx.x + 31]);
        if (threadIdx.x == 0) memory.all = all, memory.kept = all.weight;
    }
#pragma unroll 1
    for (int number = 0; number < kFilters; ++number) {
        const bool by_count = number == 0;
        if (by_count ? !it.has_top_k() : !it.has_top_p()) continue;
        if (threadIdx.x == 0) {
            const uint64_t total = memory.kept;
            const double share = ceil(it.option(&dijiang_sampling_options::top_p) * static_cast<double>(total));
            const uint64_t weight = min(max(static_cast<uint64_t>(share), uint64_t{1}), total);
            memory.target =
                by_count ? static_cast<uint64_t>(it.option(&dijiang_sampling_options::top_k)) : weight;
        }
        __syncthreads();
        select(it, number, by_count);
    }
}

__device__ __forceinline__ void sample_row(const SampleParams& params, const SampleCut& cut) {
    SampleMemory& memory = *reinterpret_cast<SampleMemory*>(shared_bytes());
    const Sampler it = {params, cut, memory};
    const Team team = it.team();
    if (threadIdx.x == 0) {
        memory.select.listed[0] = memory.select.listed[1] = 0;
        memory.select.place = 0;
        if (team.size > 1) memory.arrivals.make(team.size, kBins);
    }
    team.appear();
    let_next_kernel_start();
    clear(memory.select);
    wait_for_previous_kernel();
    const bool reports = team.rank() == 0 && threadIdx.x == 0;
    if (params.options_per_row && !read_options(it)) {
        team.have_appeared();
        if (reports) it.write(DIJIANG_ROW_BAD_OPTIONS, -1);
        return;
    }
    const Report found = survey(it);
    if (found.wrong != 0 || found.nothing() || it.greedy()) {
        const int status = found.wrong != 0    ? DIJIANG_ROW_NOT_FINITE
                           : found.nothing() ? DIJIANG_ROW_NOTHING_ALLOWED
                                             : DIJIANG_ROW_OK;
        if (reports) it.write(status, status == DIJIANG_ROW_OK ? static_cast<int>(found.best_id) : -1);
        return;
    }
    Softmax softmax = Softmax::make(score_of(found.best_key), it.numbers().rate, params.buffers.vocabulary);
    if (it.has_top_k() || it.has_top_p()) {
        filter(it, softmax, found);
        softmax = memory.select.row.softmax;  // not kept in registers meanwhile
    }
    const uint64_t least_weight = it.numbers().least_weight, kept_from = memory.select.place;
    const int token = draw(team, it.part(), memory.draw, &memory.arrivals.weights, [&](int id, float score) -> uint64_t {
        if (place_of(score, id) < kept_from) return 0;
        const uint64_t weight = softmax.weight(score);
        return weight >= least_weight ? weight : 0;
    });
    if (token >= 0) it.write(DIJIANG_ROW_OK, token);
}

}  // namespace dijiang
