// The stream of a block's weights through a ring in shared memory: one thread copies, all other warps take.
#pragma once

#include "step/instructions.cuh"
#include "step/step.h"

namespace dijiang {
namespace step {

// Chunks of 2^shift units. `full` hears of a chunk's bytes, `empty` of every warp that has left it.
struct Ring {
    uint8_t* bytes;
    uint64_t *full, *empty;
    uint32_t shift, slots;

    __device__ __forceinline__ Ring(const Params& p, uint8_t* shared)
        : bytes(shared + p.memory.ring), full(reinterpret_cast<uint64_t*>(shared)), empty(full + kMostSlots),
          shift(p.chunk_shift), slots(p.slots) {}
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < slots; ++i) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, kWarps);
        }
        mbarriers_ready();
    }
};

// Asks for one chunk after the other, as slots become free. No more than `flight` are under way: behind a long queue of
// weights every small message between blocks would wait.
__device__ inline void copy_stream(const Params& p, const Ring& ring) {
    const uint8_t* from = p.packed + p.layout.begin(blockIdx.x) * kUnitBytes;
    const uint32_t units = static_cast<uint32_t>(p.layout.stream_units(blockIdx.x)), each = 1u << ring.shift;
    uint32_t slot = 0, parity = 1, old_slot = 0, old_parity = 0;
    for (uint32_t at = 0, chunk = 0; at < units; at += each, ++chunk) {
        if (chunk >= ring.slots) await([&] { return mbarrier_done(ring.empty + slot, parity); });
        if (chunk >= static_cast<uint32_t>(p.flight)) {
            await([&] { return mbarrier_done(ring.full + old_slot, old_parity); });
            if (++old_slot == ring.slots) old_slot = 0, old_parity ^= 1;
        }
        const uint32_t left = units - at, bytes = (left < each ? left : each) * kUnitBytes;
        mbarrier_expect(ring.full + slot, bytes);
        bulk_copy(ring.bytes + (size_t{slot} << ring.shift) * kUnitBytes, from + size_t{at} * kUnitBytes, bytes,
                  ring.full + slot);
        if (++slot == ring.slots) slot = 0, parity ^= 1;
    }
}

// A warp's way through the stream. It goes through every chunk, whether it takes units of it or not.
struct Cursor {
    const Ring ring;
    uint32_t base = 0;  // units of the matrices before
    uint32_t chunk = 0, slot = 0, parity = 0;
    bool landed = false;

    __device__ __forceinline__ explicit Cursor(const Ring& r) : ring(r) {}

    __device__ __forceinline__ bool same_chunk(uint32_t unit, uint32_t other) const {
        return unit >> ring.shift == other >> ring.shift;
    }
    // Goes on to a unit's chunk, and waits until it is there.
    __device__ __forceinline__ void reach(uint32_t unit) {
        while (unit >> ring.shift != chunk) leave();
        arrive();
    }
    // This lane's part of a unit of the chunk that was reached.
    __device__ __forceinline__ uint4 read(uint32_t unit) const {
        const uint32_t within = (slot << ring.shift) + (unit & ((1u << ring.shift) - 1));
        return reinterpret_cast<const uint4*>(ring.bytes + size_t{within} * kUnitBytes)[threadIdx.x % 32];
    }
    // Behind a matrix of that many units.
    __device__ __forceinline__ void finish(uint32_t units) {
        base += units;
        while ((chunk + 1) << ring.shift <= base) leave();
    }

private:
    __device__ __forceinline__ void arrive() {
        if (landed) return;
        await([&] { return mbarrier_done(ring.full + slot, parity); });
        landed = true;
    }
    // Only a chunk that has landed may be left, or a warp without work could leave a slot twice before others once.
    __device__ __forceinline__ void leave() {
        arrive();
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(ring.empty + slot);
        landed = false;
        ++chunk;
        if (++slot == ring.slots) slot = 0, parity ^= 1;
    }
};

}  // namespace step
}  // namespace dijiang
