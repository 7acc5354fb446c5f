// The stream of a block's weights through a ring in shared memory: one thread or warp copies, all others take.
#pragma once

#include "step/instructions.cuh"
#include "step/step.h"

namespace dijiang {
namespace step {

// A block's rows of a matrix.
struct Part {
    int32_t first, groups, chunks, units;
};

// Slots of weights. `full` hears of the bytes of each piece of a slot, `empty` of every warp that has left one.
struct Ring {
    uint8_t* bytes;
    uint64_t *full, *empty;
    uint32_t slots;

    __device__ __forceinline__ Ring(const Params& p, uint8_t* shared)
        : bytes(shared + p.memory.ring), full(reinterpret_cast<uint64_t*>(shared)), empty(full + kPieces * kMostSlots),
          slots(p.slots) {}
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < slots; ++i) {
            for (int piece = 0; piece < kPieces; ++piece) mbarrier_init(full + i * kPieces + piece, kCopiers);
            mbarrier_init(empty + i, kWarps);
        }
        mbarriers_ready();
    }
};

// Asks for one piece after the other, as slots become free. Only so many are under way: messages between blocks wait behind
// them. While this block waits for one, they are fewer.
class Copier {
public:
    __device__ __forceinline__ Copier(const Params& params, const Ring& to, uint32_t* waits)
        : p(params), ring(to), waiting(waits), once(read_once()), from(p.packed + p.layout.begin(blockIdx.x) * kUnitBytes) {}

    // The next matrix in the stream, a batch after the other.
    __device__ __forceinline__ void copy(const Part& part) {
        const int batch = kBatch * part.chunks;
        for (int units = part.units; units > 0; units -= batch)
            for (int left = units < batch ? units : batch; left > 0; left -= kSlotUnits) copy_slot(left);
    }

private:
    const Params& p;
    const Ring ring;
    uint32_t* const waiting;
    const uint64_t once;
    const uint8_t* from;
    int under_way = 0;
    uint32_t slot = 0, parity = 1, oldest = 0, oldest_parity = 0;  // oldest: of the pieces under way

    __device__ __forceinline__ bool may_ask() {
        if (under_way < p.flight) return true;
        const int most = flag(waiting) ? p.flight : p.flight_busy;
        if (under_way >= most && mbarrier_done(ring.full + oldest, oldest_parity)) {
            --under_way;
            if (++oldest == ring.slots * kPieces) oldest = 0, oldest_parity ^= 1;
        }
        return under_way < most;
    }
    // So many units, or a slot full of them.
    __device__ __forceinline__ void copy_slot(int units) {
        await([&] { return mbarrier_done(ring.empty + slot, parity); });  // at once, the first time
        for (int piece = 0; piece < kPieces; ++piece, units -= kPieceUnits) {
            uint64_t* const full = ring.full + slot * kPieces + piece;
            await([&] { return may_ask(); });
            ++under_way;
            if (units <= 0) {
                mbarrier_arrive(full);
                continue;
            }
            const uint32_t bytes = (units < kPieceUnits ? units : kPieceUnits) * kUnitBytes;
            copy_piece(ring.bytes + size_t{slot} * kSlotBytes + piece * kPieceBytes, from, bytes, full, once);
            from += bytes;
        }
        if (++slot == ring.slots) slot = 0, parity ^= 1;
    }
};

// A warp's way through the slots.
struct Cursor {
    uint64_t *const full, *const empty;
    const uint4* const units;  // this lane's part of this warp's first unit in the first slot
    const uint32_t slots;
    uint32_t slot = 0, parity = 0;

    __device__ __forceinline__ explicit Cursor(const Ring& r)
        : full(r.full), empty(r.empty), units(reinterpret_cast<const uint4*>(r.bytes) + threadIdx.x), slots(r.slots) {}

    // Waits for what a slot is next filled with, or was in the phase before that parity.
    __device__ __forceinline__ void arrive(uint32_t which, uint32_t phase) const {
        await([&] {
            bool there = true;
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) there &= mbarrier_done(full + which * kPieces + piece, phase);
            return there;
        });
    }
    // This lane's part of this warp's i-th unit of a slot.
    __device__ __forceinline__ uint4 read(uint32_t which, int i) const { return units[which * (kSlotBytes / 16) + i * kThreads]; }
    __device__ __forceinline__ void leave() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + slot);
        if (++slot == slots) slot = 0, parity ^= 1;
    }
};

}  // namespace step
}  // namespace dijiang
