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

// How a ring is cut.
struct FloatCut {
    static constexpr int kPieces = step::kPieces, kMost = kMostSlots;
};
struct QuantisedCut {
    static constexpr int kPieces = 1, kMost = kMostRounds;
};
static_assert((FloatCut::kPieces + 1) * FloatCut::kMost * 8 <= kBarriers, "barriers");
static_assert((QuantisedCut::kPieces + 1) * QuantisedCut::kMost * 8 <= kBarriers, "barriers");

// Slots of weights. `full` hears of the bytes of each piece of a slot, `empty` of every warp that has left one.
template <typename Cut> struct Ring {
    static constexpr int kPieces = Cut::kPieces;
    uint8_t* bytes;
    uint64_t *full, *empty;
    uint32_t slots;

    __device__ __forceinline__ Ring(const Params& p, uint8_t* shared)
        : bytes(shared + p.memory.ring), full(reinterpret_cast<uint64_t*>(shared)), empty(full + kPieces * Cut::kMost),
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
template <typename Cut> class Asker {
public:
    __device__ __forceinline__ Asker(const Params& params, const Ring<Cut>& to, uint32_t* waits)
        : p(params), ring(to), waiting(waits), once(read_once()) {}

protected:
    const Params& p;
    const Ring<Cut> ring;
    uint32_t* const waiting;
    const uint64_t once;
    uint32_t slot = 0, parity = 1;  // the next

    __device__ __forceinline__ bool may_ask() {
        if (under_way < p.flight) return true;
        const int most = flag(waiting) ? p.flight : p.flight_busy;
        if (under_way >= most && mbarrier_done(ring.full + oldest, oldest_parity)) {
            --under_way;
            if (++oldest == ring.slots * Cut::kPieces) oldest = 0, oldest_parity ^= 1;
        }
        return under_way < most;
    }
    __device__ __forceinline__ void wait_for_slot() {
        await([&] { return mbarrier_done(ring.empty + slot, parity); });  // at once, the first time
    }
    __device__ __forceinline__ void wait_to_ask() {
        await([&] { return may_ask(); });
        ++under_way;
    }
    __device__ __forceinline__ void next_slot() {
        if (++slot == ring.slots) slot = 0, parity ^= 1;
    }

private:
    int under_way = 0;
    uint32_t oldest = 0, oldest_parity = 0;  // of the pieces under way
};

class Copier : Asker<FloatCut> {
public:
    __device__ __forceinline__ Copier(const Params& params, const Ring<FloatCut>& to, uint32_t* waits)
        : Asker(params, to, waits), from(p.packed + p.layout.begin(blockIdx.x) * kUnitBytes) {}

    // The next matrix in the stream, a batch after the other.
    __device__ __forceinline__ void copy(const Part& part) {
        const int batch = kBatch * part.chunks;
        for (int units = part.units; units > 0; units -= batch)
            for (int left = units < batch ? units : batch; left > 0; left -= kSlotUnits) copy_slot(left);
    }

private:
    const uint8_t* from;

    // So many units, or a slot full of them.
    __device__ __forceinline__ void copy_slot(int units) {
        wait_for_slot();
        for (int piece = 0; piece < kPieces; ++piece, units -= kPieceUnits) {
            uint64_t* const full = ring.full + slot * kPieces + piece;
            wait_to_ask();
            if (units <= 0) {
                mbarrier_arrive(full);
                continue;
            }
            const uint32_t bytes = (units < kPieceUnits ? units : kPieceUnits) * kUnitBytes;
            copy_piece(ring.bytes + size_t{slot} * kSlotBytes + piece * kPieceBytes, from, bytes, full, once);
            from += bytes;
        }
        next_slot();
    }
};

// A warp's way through the slots.
struct Cursor {
    uint64_t *const full, *const empty;
    uint8_t* const bytes;      // of the first slot
    const uint4* const units;  // and this lane's part of this warp's first unit there
    const uint32_t slots;
    uint32_t slot = 0, parity = 0;

    template <typename Cut> __device__ __forceinline__ explicit Cursor(const Ring<Cut>& r)
        : full(r.full), empty(r.empty), bytes(r.bytes), units(reinterpret_cast<const uint4*>(r.bytes) + threadIdx.x),
          slots(r.slots) {}

    // Waits for what a slot is next filled with, or was in the phase before that parity.
    template <int kPieces = step::kPieces> __device__ __forceinline__ void arrive(uint32_t which, uint32_t phase) const {
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
        leave(slot);
        next();
    }
    __device__ __forceinline__ void leave(uint32_t which) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + which);
    }
    __device__ __forceinline__ void next() {
        if (++slot == slots) slot = 0, parity ^= 1;
    }
};

}  // namespace step
}  // namespace dijiang
