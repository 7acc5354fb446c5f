// dijiang_sample: one token per row in one launch. A team of blocks reads the row once into shared memory where that
// fits, and looks at it there as often as the filters need.
#pragma once

#include "device/overlap.cuh"
#include "sampling/few.cuh"

namespace dijiang {

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
        {
            const float range = fminf(-softmax.exponent(score_of(found.least_key)), -softmax.least_exponent);
            const float per_bin = range > 0 ? fminf(kBins / range, FLT_MAX) : 0.0f;
            if (threadIdx.x == 0) memory.select.row = {softmax, found.best(), per_bin};
            __syncthreads();
        }
        if (it.has_top_k() && it.option(&dijiang_sampling_options::top_k) <= kFew) {
            if (choose_of_few(it)) return;
            __syncthreads();
            clear(memory.select);
            __syncthreads();
        }
        filter(it);
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
