// dijiang_sample: one token per row in one launch. A team of blocks reads the row once into shared memory where that
// fits, and looks at it there as often as the filters need.
#pragma once

#include "device/overlap.cuh"
#include "sampling/few.cuh"
#include "sampling/filter.cuh"

namespace dijiang {

__device__ __forceinline__ bool possible(const dijiang_sampling_options& o) {
    return o.temperature >= 0 && o.temperature <= DBL_MAX && o.top_p > 0 && o.top_p <= 1 && o.min_p >= 0 &&
           o.min_p <= 1 && o.repetition_penalty > 0 && o.repetition_penalty <= DBL_MAX && o.top_k >= 0;
}

// A row's own options; false if they cannot be. Those of all rows the host has looked at.
__device__ __forceinline__ bool read_options(const Sampler& it) {
    SampleMemory& memory = it.memory;
    if (threadIdx.x == 0) {
        const int vocabulary = it.params.buffers.vocabulary;
        memory.options = it.params.buffers.row_options[it.row()];
        memory.choice = Choice(memory.options, numbers_of(memory.options, vocabulary), vocabulary);
    }
    __syncthreads();
    return possible(memory.options) && (it.greedy() || it.params.buffers.draws != nullptr);
}

// What a thread has found so far.
struct Found {
    float best = -INFINITY, least = INFINITY;  // NaN if there is one
    int best_id = -1;

    __device__ void see(int id, float score) {
        if (score > best) best_id = id;
        best = max_or_nan(best, score);
        least = fminf(least, score > -INFINITY ? score : INFINITY);
    }
    __device__ uint4 words() const {
        return {key_of(best), static_cast<uint32_t>(best_id), key_of(least), best < INFINITY ? 0u : 1u};
    }
};

// Reads the logits, keeps the scores where there is room for them, and tells all threads of the team. best: what this
// thread's best score is.
__device__ __forceinline__ Report survey(const Sampler& it, Part part, float& best) {
    SampleMemory& memory = it.memory;
    const Team team = it.team();
    const int lane = static_cast<int>(threadIdx.x % 32);
    // One thread makes the random number, while others wait: it takes most of a microsecond. What it is made of is on
    // its way with the logits.
    const bool makes_random = static_cast<int>(threadIdx.x) == block_threads() - 1 && !it.greedy();
    RandomNumber number{};
    if (makes_random) number = it.number();
    Found found;
    {
        part.penalise(it.option(&dijiang_sampling_options::repetition_penalty));
        float* const scores = part.scores();
        const bool kept = part.kept != 0, masked = part.masked();
        if (kept || !masked)
            part.each_read([&](int i, int id, float logit, bool there) {
                if (kept && there) scores[32 * i] = logit;
                found.see(id, logit);
            });
        if (masked) {
            found = Found{};
            float* to = scores;
            part.each_one([&](int id, const float (&read)[1]) {
                float score = read[0];
                if (kept) {
                    if (id < part.last) *to = score = part.prepare(score, id);
                    to += 32;
                }
                found.see(id, score);
            });
        }
    }
    best = found.best;
    const Report mine = warp_report(found.words());
    if (lane == 0) memory.warps[threadIdx.x / 32] = mine.words();
    team.have_appeared();
    __syncthreads();
    if (threadIdx.x < 32) {
        const uint4 words = lane < block_warps() ? memory.warps[lane] : Report::none();
        team.tell(memory.blocks, warp_report(words).words(), &memory.arrivals.reports);
    }
    if (makes_random && (!it.choice().filters() || it.few()))  // filters of many tokens wait for longer later
        memory.draw.random = number.bits();
    team.await(&memory.arrivals.reports);
    return warp_report(lane < team.size ? memory.blocks[lane] : Report::none());
}

// Writes the token: of those from `kept_from` on that have as much weight as min-p wants.
__device__ __forceinline__ void draw(const Sampler& it, const Softmax& softmax, uint64_t kept_from, bool listed,
                                     bool filtered) {
    constexpr int kSliced = 1024;  // ids of a warp; fewer it looks at as fast alone
    DrawMemory& memory = it.memory.draw;
    const Team team = it.team();
    const uint64_t least_weight = it.choice().least_weight;
    const auto weight_of_token = [&](int id, float score) -> uint64_t {
        const uint64_t weight = softmax.weight_at(softmax.exponent(score));
        return (place_of(score, id) >= kept_from) & (weight >= least_weight) ? weight : 0;  // no branches
    };
    const int lane = fresh_lane(), warp = fresh_thread() >> 5;
    uint64_t weight = 0;  // of a block, in parts
    int block = lane;
    if (listed) {
        share_out(it, kept_from);
        if (lane < block_warps()) weight = memory.shares[lane];
        block = lane >> (warp_bits() - team.bits());
    } else {
        // Where a filter has told sums in vain, the reports' place serves, which all blocks have read long ago.
        uint4* const sums = filtered ? it.memory.blocks : memory.sums;
        uint64_t* const arrival = &it.memory.arrivals.sums[filtered ? 1 : 0];
        uint64_t sum = 0;
        it.part().each([&](int id, const auto& scores) {
            constexpr int kCount = sizeof scores / sizeof *scores;
#pragma unroll
            for (int j = 0; j < kCount; ++j) sum += weight_of_token(id + 32 * j, scores[j]);
        });
        tell_sums(team, memory, sums, arrival, sum, 0);
        team.await(arrival);
        if (lane < team.size) weight = weight_of(sums[lane]);
    }
    // All that was sent to this block is here: it may leave.
    uint64_t place = place_below(warp_sum(weight), memory.random);
    if (!lies_in(weight, block, team.rank(), place)) return;
    if (listed) add_listed(it, kept_from);
    const uint64_t* const warps = listed ? memory.finally : memory.warps;
    int chosen = index_at(warps, place), slice = it.cut.per_warp, number = 0;
    if (slice < kSliced) {
        if (chosen != warp) return;
    } else {  // the whole block looks for it among the ids of that warp
        slice = 32 * ((slice / 32 - 1) / block_warps() + 1);
        uint64_t sum = 0;
        it.part_of(chosen, warp * slice, slice).each([&](int id, const auto& scores) {
            constexpr int kCount = sizeof scores / sizeof *scores;
#pragma unroll
            for (int j = 0; j < kCount; ++j) sum += weight_of_token(id + 32 * j, scores[j]);
        });
        sum = warp_sum(sum);
        if (lane == 0) memory.shares[warp] = sum;  // as they were all have read them
        __syncthreads();
        number = index_at(memory.shares, place);
        if (number != warp) return;
    }
    const int token = id_at(it.part_of(chosen, number * slice, slice), place, weight_of_token);
    if (lane == 0) it.write(DIJIANG_ROW_OK, token);
}

// What filters need takes the scores' place.
__device__ __forceinline__ void forget_scores(SampleMemory& memory) {
    __syncthreads();
    if (threadIdx.x == 0) memory.staging = 0;
    clear(memory.select);
    __syncthreads();
}

__device__ __forceinline__ void sample_row(const SampleParams& params, const SampleCut& cut) {
    SampleMemory& memory = *reinterpret_cast<SampleMemory*>(shared_bytes());
    const Sampler it = {params, cut, memory};
    const Team team = it.team();
    if (threadIdx.x == 0) {
        memory.staging = cut.staging;
        memory.few.listed = 0;
        if (!params.options_per_row) memory.choice = Choice(params.options, params.numbers, params.buffers.vocabulary);
        if (team.size > 1) memory.arrivals.make(team.size, kBins, kFewBins);
    }
    team.appear();
    let_next_kernel_start();
    if (static_cast<int>(threadIdx.x) < kFewBins) memory.few.counts[threadIdx.x] = 0;
    if (!cut.slim) clear(memory.select);
    Part part = it.ids();
    part.find_logits(team, params.buffers);
    keep_before(part.logits);
    wait_for_previous_kernel();
    const bool reports = team.rank() == 0 && threadIdx.x == 0;
    if (params.options_per_row && !read_options(it)) {
        team.have_appeared();
        if (reports) it.write(DIJIANG_ROW_BAD_OPTIONS, -1);
        return;
    }
    float best;
    const Report found = survey(it, part, best);
    if (found.wrong != 0 || found.nothing() || it.greedy()) {
        const int status = found.wrong != 0    ? DIJIANG_ROW_NOT_FINITE
                           : found.nothing() ? DIJIANG_ROW_NOTHING_ALLOWED
                                             : DIJIANG_ROW_OK;
        if (reports) it.write(status, status == DIJIANG_ROW_OK ? static_cast<int>(found.best_id) : -1);
        return;
    }
    Softmax softmax = Softmax::make(score_of(found.best_key), it.choice().rate, params.buffers.vocabulary);
    bool listed = false, filtered = false;
    uint64_t kept_from = 0;
    if (it.choice().filters()) {
        const float range = fminf(-softmax.exponent(score_of(found.least_key)), -softmax.least_exponent);
        const float per_bin = range > 0 ? fminf(__fdividef(float{kBins}, range), FLT_MAX) : 0.0f;
        SelectedRow row = {softmax, found.best(), per_bin};
        if (it.few()) {
            if (choose_of_few(it, row, best)) return;
            if (cut.slim) forget_scores(memory);
            row = memory.few.row;
        }
        listed = filter(it, row);
        filtered = true;
        softmax = memory.select.row.softmax;  // not kept in registers meanwhile
        kept_from = memory.select.place;
    }
    draw(it, softmax, kept_from, listed, filtered);
}

}  // namespace dijiang
