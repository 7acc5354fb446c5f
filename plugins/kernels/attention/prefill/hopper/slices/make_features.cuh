// The first kernel: features of every chunk's keys and queries, weighted for the state, and decayed scores.
//
// A block takes a chunk of a head at a time; one group makes keys, the other queries and scores. They project in turn,
// so that one's exponentials run beside the other's products.
#pragma once

#include "attention/prefill/hopper/scores.cuh"
#include "attention/prefill/hopper/slices/shape.cuh"
#include "device/overlap.cuh"

namespace dijiang::prefill::hopper::slices {

// This block's half of P's rows, rounded to T, in two parts: a thread asks for one, and stores it when it has come.
template <typename T, int D> struct HalfOfProj {
    using S = FeatureShape<D>;
    static constexpr int kRows = D / S::kBlocks, kColumnPieces = D / 8;
    static constexpr int kParts = 2, kTurns = kRows * kColumnPieces / S::kThreads / kParts;
    static constexpr int kStep = S::kThreads / kColumnPieces;  // rows between a thread's pieces of 8 columns
    float4 asked[kTurns][2];
    int row, column;

    __device__ __forceinline__ HalfOfProj()
        : row(cluster_block() * kRows + threadIdx.x / kColumnPieces), column(threadIdx.x % kColumnPieces * 8) {}
    __device__ __forceinline__ void ask(const AttentionParams& p, int part) {
        const float4* from = reinterpret_cast<const float4*>(p.proj + (row + part * kTurns * kStep) * D + column);
#pragma unroll
        for (int j = 0; j < kTurns; ++j)
            asked[j][0] = from[j * (kStep * D / 4)], asked[j][1] = from[j * (kStep * D / 4) + 1];
    }
    __device__ __forceinline__ void store(char* proj, int part) const {
#pragma unroll
        for (int j = 0; j < kTurns; ++j) {
            const float4 x = asked[j][0], y = asked[j][1];
            *reinterpret_cast<uint4*>(proj + Item<D>::Tile::offset(D, row + (part * kTurns + j) * kStep, column)) =
                make_uint4(pack<T>(x.x, x.y), pack<T>(x.z, x.w), pack<T>(y.x, y.y), pack<T>(y.z, y.w));
        }
    }
    // One thread, when all have stored theirs: the half to the other block, a piece from each block of columns.
    static __device__ __forceinline__ void send(uint32_t proj, uint32_t barrier) {
        constexpr int kRow = Item<D>::Tile::kRow;
        const int rank = cluster_block();
#pragma unroll
        for (int i = 0; i < D / 64; ++i)
            copy_bulk_to_block(proj + (i * D + rank * kRows) * kRow, kRows * kRow, barrier, rank ^ 1);
    }
};

// As prepare_rotation, for more pairs than a warp turns at once.
template <int D> __device__ __forceinline__ void prepare_turns(const AttentionParams& p, float4* turns) {
    const int half = p.rotary_dim / 2;
    for (int i = threadIdx.x; i < half; i += FeatureShape<D>::kThreads) {
        const RotaryLane mine(half, i / 64 * 64);
        const Turns t = turns_per_token(p.inv_freq[i]);
        const float2 step = rotation_by(rotary_turn(t, static_cast<float>(mine.groups)));
        turns[i] = make_float4(t.hi, t.lo, step.x, step.y);
    }
}

// A fragment's pairs to an item's tile in device memory, in the order of feature_of: 16 bytes a lane.
template <typename Tile, int N>
__device__ __forceinline__ void store_features(char* tile, const uint32_t (&packed)[N][2]) {
    const int lane = opaque(lane_of());
    const uint32_t start = Tile::start(16 * warp_of() + lane / 4) ^ lane % 4 * 16;
#pragma unroll
    for (int n = 0; n < N; n += 4)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            *reinterpret_cast<uint4*>(tile + Tile::piece(start, kChunk, n) + i * (8 * Tile::kRow)) =
                make_uint4(packed[n][i], packed[n + 1][i], packed[n + 2][i], packed[n + 3][i]);
}
template <typename Tile, int N>
__device__ __forceinline__ void store_scores(char* tile, const uint32_t (&packed)[N][2]) {
    const uint32_t start = Tile::start(opaque(fragment_row())) + 2 * fragment_column();
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            *reinterpret_cast<uint32_t*>(tile + Tile::piece(start, kChunk, n) + i * (8 * Tile::kRow)) = packed[n][i];
}

// A chunk of a head: heads within chunks within rows.
struct Task {
    int row, head, chunk;
    int left, position;  // tokens from its first on, that one's position
    float decay;         // log2 of a token's
};

template <typename T, int D> struct TaskFinder {
    const AttentionParams& p;
    const char* memory;
    uint32_t memory_at;
    bool keys;

    __device__ __forceinline__ int count() const {
        return p.batch * ((p.length + kChunk - 1) / kChunk) * p.num_heads;
    }
    // The next task of this block from `work` on that has tokens; returns its number, or one from count() on.
    __device__ __forceinline__ int find(int work, Task& task) const {
        const int chunks = (p.length + kChunk - 1) / kChunk, all = count();
#pragma unroll 1
        for (; work < all; work += gridDim.x) {
            const int of_all = work / p.num_heads;
            task.head = work - of_all * p.num_heads;
            task.row = of_all / chunks;
            task.chunk = of_all - task.row * chunks;
            const int first = task.chunk * kChunk;
            // All three are asked for at once.
            int length = p.seq_lens[task.row], position = p.positions[task.row];
            float log_decay = p.log_decay[task.head];
            keep_before(position), keep_before(log_decay);
            task.left = min(max(length, 0), p.length) - first;
            if (task.left <= 0) continue;
            task.position = position + first;
            task.decay = fmaxf(log_decay, kLeastLogDecay) * kLog2E;
            break;
        }
        return work;
    }
    __device__ __forceinline__ void load(uint32_t rows, const Task& task) const {
        const int head = keys ? p.num_heads + task.head / (p.num_heads / p.num_kv_heads) : task.head;
        load_rows<D>(rows,
                     static_cast<const uint16_t*>(p.qkv) + task.row * p.qkv_batch_stride
                         + static_cast<int64_t>(task.chunk) * kChunk * p.qkv_token_stride + head * D,
                     p.qkv_token_stride, task.left);
    }
};

// All threads of both blocks.
template <typename T, int D>
__device__ __forceinline__ void make_items(const AttentionParams& p, char* items, char* memory, uint32_t memory_at,
                                           int group) {
    using S = FeatureShape<D>;
    using Tile = typename Item<D>::Tile;
    const bool keys = group == 0;
    const FeatureBarriers barriers{memory_at + S::kBarriers};
    const TaskFinder<T, D> finder{p, memory, memory_at, keys};
    const int meeting = 1 + group, half = p.rotary_dim / 2, all = finder.count();
    const RotaryLane low(half, 0), high(half, 64);
    const uint32_t rows = memory_at + S::kRows + group * S::kTile, for_scores = memory_at + S::kKeys;
    const uint32_t operands = operand_address(memory_at);
    char* const tile = memory + S::kRows + group * S::kTile;
    const float4* turns = reinterpret_cast<const float4*>(memory + S::kTurns);
    // Rows that this warp has loaded, as products shall find them.
    const auto rotate = [&](const Task& task) {
        wait_copies<0>();
        __syncwarp();
        rotate_rows<T, D>(low, half, turns, tile, task.position);
        rotate_rows<T, D>(high, half, turns, tile, task.position);
        show_to_products();
    };
    Task task;
    int work;
    {
        HalfOfProj<T, D> half_of_proj;
        half_of_proj.ask(p, 0);
        work = finder.find(blockIdx.x, task);  // while it comes
        if (work < all) finder.load(rows, task);
        half_of_proj.store(memory + S::kProj, 0);
        half_of_proj.ask(p, 1);
        prepare_turns<D>(p, reinterpret_cast<float4*>(memory + S::kTurns));
        half_of_proj.store(memory + S::kProj, 1);
        show_to_products();
        __syncthreads();
        wait_for_cluster();  // the other block has made its barriers
        if (threadIdx.x == 0) half_of_proj.send(memory_at + S::kProj, barriers.proj_full());
        __syncwarp();
    }
    if (work < all) rotate(task);
    await_phase(barriers.proj_full(), 0);
    __syncwarp();
    appear_in_cluster();  // nothing more is sent here: the other block may end
#pragma unroll 1
    for (int turn = 0; work < all; ++turn) {
        float logits[D / 8][4];
        uint32_t packed[D / 8][2];
        barrier_sync(meeting, kGroup);
        await_phase(barriers.projecting(1 - group), keys ? turn & 1 ^ 1 : turn & 1);
        begin_products();
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
            Wgmma<T, D>::template shared<0, 1>(logits, Tile::across(operands + S::kRows + group * S::kTile, kChunk, k),
                                               Tile::down(operands + S::kProj, D, 0, k), k > 0);
        end_products();
        warp_arrives(barriers.projecting(group));
        Task next;
        const int following = finder.find(work + gridDim.x, next);
        await_products<0>();
        barrier_sync(meeting, kGroup);  // nobody reads the rows any more
        if (following < all) finder.load(rows, next);
        softmax_rows<T, D / 8>(logits, packed);
        char* const item = items + Item<D>::offset(p, task.row, task.head, task.chunk);
        const int end = min(kChunk, task.left);
        if (keys) {
            await_phase(barriers.keys_empty(), turn & 1 ^ 1);
            store_fragment<Tile>(for_scores, packed);
            show_to_products();
            warp_arrives(barriers.keys_full());
            weigh_rows<T>(end, true, task.decay, packed);
            store_features<Tile>(item + Item<D>::kKeys, packed);
            if (following < all) rotate(next);
        } else {
            float sum[kChunk / 8][4];
            uint32_t weighted[D / 8][2], scores[kChunk / 8][2];
            await_phase(barriers.keys_full(), turn & 1);
            begin_products();
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                Wgmma<T, kChunk>::template registers<0>(sum, packed[2 * k][0], packed[2 * k][1], packed[2 * k + 1][0],
                                                        packed[2 * k + 1][1],
                                                        Tile::across(operands + S::kKeys, kChunk, k), k > 0);
            end_products();
            // They wait for the other group's, and this group has what to do.
#pragma unroll
            for (int n = 0; n < D / 8; ++n) weighted[n][0] = packed[n][0], weighted[n][1] = packed[n][1];
            weigh_rows<T>(end, false, task.decay, weighted);
            store_features<Tile>(item + Item<D>::kQueries, weighted);
            if (following < all) rotate(next);
            await_products<0>();
            warp_arrives(barriers.keys_empty());
            fade_scores<T>(sum, task.decay, scores);
            store_scores<Tile>(item + Item<D>::kScores, scores);
        }
        task = next;
        work = following;
    }
    __syncwarp();
    wait_for_cluster();  // what was sent from here has been read
}

template <typename T, int D>
__global__ void __launch_bounds__(FeatureShape<D>::kThreads, 1)
slice_features_kernel(const __grid_constant__ AttentionParams p, char* items) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using S = FeatureShape<D>;
    char* const memory = block_memory();
    const uint32_t memory_at = shared_address(memory);
    if (threadIdx.x == 0) FeatureBarriers{memory_at + S::kBarriers}.make(S::kProjBytes / S::kBlocks);
    appear_in_cluster();
    wait_for_previous_kernel();
    // Not before: the next kernel takes it that all before this one have ended.
    let_next_kernel_start();
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0);  // the same in all lanes, and known to be
    make_items<T, D>(p, items, memory, memory_at, group);
#endif
}

}  // namespace dijiang::prefill::hopper::slices
