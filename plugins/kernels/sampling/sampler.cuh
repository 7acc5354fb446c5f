// A launch as its blocks see it: its arguments, their memory, what they report of a row.
#pragma once

#include "sampling/draw.cuh"
#include "sampling/select.cuh"

namespace dijiang {

// What a pass over a row, or some of it, finds: the best key, and the lowest id that has it.
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

// What follows from a row's options but the random number.
struct Choice {
    double top_p;
    uint64_t least_weight;  // that min-p keeps
    float rate;
    int top_k, has_top_p;  // top_k: 0 if it keeps all

    __device__ Choice(const dijiang_sampling_options& o, const SampleNumbers& numbers, int vocabulary)
        : top_p(o.top_p), least_weight(numbers.least_weight), rate(numbers.rate),
          top_k(o.top_k < vocabulary ? o.top_k : 0), has_top_p(o.top_p < 1 ? 1 : 0) {}

    __device__ bool filters() const { return top_k > 0 || has_top_p != 0; }
    // What top-p wants of tokens that weigh `total` together, 1 or more.
    __device__ uint64_t top_p_of(uint64_t total) const {
        const double share = ceil(top_p * static_cast<double>(total));
        return min(max(static_cast<uint64_t>(share), uint64_t{1}), total);
    }
};

constexpr int kFewBins = 256;
constexpr int kFewListed = 256;           // tokens of a row
constexpr int kFewLists = 4 * kFewListed;  // places for them in its blocks' lists

struct FewMemory {
    alignas(16) uint32_t counts[kFewBins];  // of this block's threads
    uint4 told[kMostTeam * 32];             // and of all blocks', in halves of words
    uint4 lengths[kMostTeam];               // of their lists
    uint64_t lists[kFewLists];
    Entry entries[kFewListed];
    uint64_t weights[kFewListed];  // of those that are kept
    SelectedRow row;
    uint64_t wanted;
    float end;
    uint32_t listed;
};

struct SampleMemory {
    dijiang_sampling_options options;  // of the row, where each has its own
    Choice choice;
    Arrivals arrivals;
    uint4 warps[kMostWarps], blocks[kMostTeam];  // reports
    DrawMemory draw;
    int staging;  // as in the cut, or 0 from when on scores are not kept any more
    FewMemory few;
    SelectMemory select;  // last: scores may take its place where it is hardly ever needed
};
constexpr int kSlimMemory = offsetof(SampleMemory, select), kFullMemory = sizeof(SampleMemory);
static_assert(kSlimMemory % 16 == 0);

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
    __device__ const Choice& choice() const { return memory.choice; }
    __device__ bool greedy() const { return option(&dijiang_sampling_options::temperature) == 0; }
    __device__ bool few() const { return are_few(choice().top_k, block_threads() * team().size); }
    __device__ Part ids() const {
        const int warp = fresh_thread() >> 5;
        return Part::make(team(), cut.per_warp, params.buffers.vocabulary, cut.staging, warp, 0, cut.per_warp);
    }
    __device__ Part part() const { return part_of(fresh_thread() >> 5, 0, cut.per_warp); }
    // Of another warp's ids some: `most` from `skipped` on, or fewer.
    __device__ Part part_of(int warp, int skipped, int most) const {
        Part it = Part::make(team(), cut.per_warp, params.buffers.vocabulary, memory.staging, warp, skipped, most);
        if (it.kept != 0) return it;
        it.find_logits(team(), params.buffers);
        it.penalise(option(&dijiang_sampling_options::repetition_penalty));
        return it;
    }
    // Which random number the row's is.
    __device__ RandomNumber number() const {
        const dijiang_sample_buffers& b = params.buffers;
        const uint64_t stream = b.streams == nullptr ? static_cast<uint64_t>(row()) : b.streams[row()];
        return {option(&dijiang_sampling_options::seed), stream, static_cast<uint64_t>(b.draws[row()])};
    }
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

}  // namespace dijiang
