#include "attention/prefill/schedule.h"

#include <algorithm>
#include <numeric>

namespace dijiang::prefill {
namespace {

// The kernel's Shape<D> (fused_shape.cuh), as far as the host needs it.
struct FusedShape {
    int size, columns, consumers, producers, most_heads;
    bool wide() const { return size == 256; }
    int own() const { return columns * consumers; }
    int narrowest() const { return wide() ? 8 : 16; }
    int warps() const { return consumers + producers; }
    size_t tile() const { return size_t{2} * kChunk * (size + 8); }
    size_t proj() const { return wide() ? 0 : size_t{2} * size * (size + 8); }
    size_t head(int stages) const {
        const size_t values = 2 * kChunk * (own() + 8), scores = 2 * kChunk * (kChunk + 8), terms = 4 * 6 * kChunk * 4;
        return (wide() ? 0 : 2) * tile() + 2 * values + terms + stages * (2 * tile() + scores);
    }
    size_t stats() const { return size_t{2} * 2 * kChunk * (own() / narrowest()) * 4; }
    // Per block. The moments are there for whoever normalises.
    size_t bytes(int set, int stages) const { return proj() + set * (head(stages) + stats()); }
};

FusedShape fused_shape(int d) {
    if (d <= 64) return {64, 16, 4, 4, 2};
    if (d <= 80) return {80, 16, 5, 4, 2};
    if (d <= 128) return {128, 16, 8, 4, 1};
    return {256, 16, 4, 4, 1};
}

#ifdef DIJIANG_SM90A
constexpr bool kHopperCode = true;
#else
constexpr bool kHopperCode = false;  // this library was not compiled for it
#endif
constexpr int kSpan = 4;  // chunks that a block takes at a time, each by warps with flags of their own (hopper/spans/)
constexpr size_t kStaticShared = 2304;  // at most, of any kernel here
constexpr size_t kReserved = 2304;      // of a fused block: static variables and the runtime's 1 KB


// Grows with length, so that `needs` may look at the longest alone.
int most_segments(int64_t jobs, int chunks, int64_t room) {
    // Every segment reads what all before it found: many only where each has much to do itself.
    const int64_t most = std::min(16, std::max(8, chunks / 4));
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({most, room / jobs, chunks})));
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// The kernel's hopper::Shape<D> (hopper/shape.cuh), as far as the host needs it.
struct HopperShape {
    int heads;            // per block
    size_t state_floats;  // of a head, as a group's registers
};
HopperShape hopper_shape(int64_t d) {
    return {d == 80 ? 2 : 1, static_cast<size_t>((d + 63) / 64 * (d / 8) * 4 * 128)};
}

// Heads of 256, whose kernels are hopper::slices::FeatureShape and Slice (hopper/slices/shape.cuh).
struct SliceShape {
    static constexpr int kSlices = 4;         // of a head, one a block
    static constexpr int kFeatureBlocks = 2;  // of a cluster of the kernel before
    static constexpr size_t kSlot = size_t{4} * 64 * 256;  // bytes: a block's part of a state
    static constexpr size_t kItem = size_t{2} * kChunk * (256 + 256 + kChunk);  // of a chunk and head
};

// Two heads of 80 in a block pay only where blocks fill the GPU and no sequence is cut (docs/performance.md).
bool hopper_pays(const dijiang_geometry& geometry, int batch, const dijiang_device& device) {
    return geometry.head_dim != 80 || int64_t{batch} * geometry.num_heads > device.multiprocessors;
}

// Are there products of four warps for it, and whole groups of GroupNorm in a block, of whole tiles of 8 columns?
bool hopper_takes(const dijiang_geometry& geometry, const dijiang_device& device) {
    constexpr int kShared = 227 << 10;
    const int64_t heads = geometry.num_heads, d = geometry.head_dim;
    const bool sizes = d == 64 || d == 80 || d == 128 || d == 256;
    const bool groups = heads == 16 || heads == 32 || (heads == 8 && d != 80);
    return kHopperCode && device.compute_capability == 90 && device.shared_memory >= kShared && sizes && groups
           && geometry.dtype != DIJIANG_FLOAT32 && geometry.table_rows == 0 && geometry.rotary_dim % 4 == 0;
}

// Cuts `chunks` for at most `segments`; whole `unit`s. Memory is for `segments` even if rounding makes fewer of them:
// that number alone grows with length.
void cut_in_segments(Schedule& schedule, int chunks, int segments, int unit) {
    schedule.segment_chunks = (chunks + segments - 1) / segments;
    unit = std::min(schedule.segment_chunks, unit);
    schedule.segment_chunks = (schedule.segment_chunks + unit - 1) / unit * unit;
    schedule.segments = (chunks + schedule.segment_chunks - 1) / schedule.segment_chunks;
}

Schedule schedule_slices(const dijiang_geometry& geometry, int batch, int chunks, const dijiang_device& device) {
    Schedule schedule{};
    schedule.path = Path::slices;
    schedule.set = 1;
    schedule.threads = 384;
    const int64_t heads = int64_t{batch} * geometry.num_heads, jobs = heads * SliceShape::kSlices;
    const int room = kSliceCluster > 2 ? device.multiprocessors * 7 / 8 : device.multiprocessors;
    const int segments = most_segments(jobs, chunks, room);
    cut_in_segments(schedule, chunks, segments, 1);
    schedule.blocks = static_cast<int>(jobs * schedule.segments);
    const int64_t even = std::max(device.multiprocessors, SliceShape::kFeatureBlocks) / SliceShape::kFeatureBlocks;
    const int64_t clusters = (heads * chunks + SliceShape::kFeatureBlocks - 1) / SliceShape::kFeatureBlocks;
    schedule.feature_blocks = static_cast<int>(std::min(even, clusters) * SliceShape::kFeatureBlocks);
    const size_t slots = segments > 1 ? jobs * segments : 0;
    schedule.sync = segments > 1 ? sizeof(uint32_t) * (2 + slots) : 0;
    schedule.features = aligned(slots * SliceShape::kSlot);
    schedule.workspace = schedule.features + aligned(heads * chunks * SliceShape::kItem);
    return schedule;
}

}  // namespace

Schedule make_schedule(const dijiang_geometry& geometry, int batch, int length, const dijiang_device& device) {
    const int64_t heads = geometry.num_heads, d = geometry.head_dim, tokens = int64_t{batch} * length;
    Schedule schedule{};
    schedule.set = 1;
    schedule.segments = 1;
    schedule.segment_chunks = (length + kChunk - 1) / kChunk;
    if (hopper_takes(geometry, device) && d == 256)
        return schedule_slices(geometry, batch, schedule.segment_chunks, device);
    if (hopper_takes(geometry, device) && hopper_pays(geometry, batch, device)) {
        const HopperShape hopper = hopper_shape(d);
        const bool spans = d == 64;
        schedule.path = spans ? Path::spans : Path::hopper;
        schedule.set = hopper.heads;
        schedule.threads = 512;
        const int64_t jobs = batch * (heads / schedule.set);
        const int chunks = schedule.segment_chunks, segments = most_segments(jobs, chunks, device.multiprocessors);
        cut_in_segments(schedule, chunks, segments, spans ? kSpan : 1);
        schedule.blocks = static_cast<int>(jobs * schedule.segments);
        const size_t states = segments > 1 ? jobs * segments : 0;
        schedule.workspace = aligned(states * hopper.heads * hopper.state_floats * sizeof(float));
        schedule.sync = segments > 1 ? sizeof(uint32_t) * (2 + (spans ? kSpan : 1) * states) : 0;
        return schedule;
    }
    const FusedShape shape = fused_shape(static_cast<int>(d));
    schedule.multiprocessors = device.multiprocessors;
    const size_t room_left = static_cast<size_t>(device.shared_memory) - kStaticShared;
    const size_t sm_memory = static_cast<size_t>(device.shared_memory) + 1024;
    const size_t wide_features = shape.wide() ? size_t{2} * (256 + 128) * (256 + 8) : 0;
    const int least = shape.wide() ? 2 : 1;
    const bool fits = shape.bytes(1, least) <= room_left && wide_features <= room_left;
    const bool tuned = d <= 128 || d == 256;
    if (geometry.dtype != DIJIANG_FLOAT32 && tuned && fits) {
        schedule.path = shape.wide() ? Path::wide : Path::fused;
        const int set = static_cast<int>(heads / std::gcd(heads, d));
        const bool inside = shape.wide() ? shape.own() % heads == 0 : d % shape.columns == 0;
        const bool whole = heads % shape.narrowest() == 0 && set <= shape.most_heads && inside
                           && shape.bytes(set, least) <= room_left;
        schedule.raw = !whole;
        schedule.set = whole ? set : 1;
        schedule.threads = 32 * shape.warps() * schedule.set;
        // Small heads share a multiprocessor by twos; a second stage where it does not prevent that.
        const auto pair = [&](int stages) { return 2 * (shape.bytes(1, stages) + kReserved) <= sm_memory; };
        const int resident = schedule.set == 1 && d <= 80 && pair(1) ? 2 : 1;
        const bool two = schedule.set == 1 && shape.bytes(1, 2) <= room_left && (resident == 1 || pair(2));
        schedule.stages = two ? 2 : 1;
        schedule.shared = shape.bytes(schedule.set, schedule.stages);
        const int64_t jobs = batch * (heads / schedule.set) * (shape.wide() ? d / shape.own() : 1);
        const int64_t room = int64_t{device.multiprocessors} * resident;
        const int chunks = schedule.segment_chunks, segments = most_segments(jobs, chunks, room);
        cut_in_segments(schedule, chunks, segments, 1);
        schedule.blocks = static_cast<int>(jobs * schedule.segments);
        const int consumers = shape.consumers * schedule.set;
        const size_t states = segments > 1 ? jobs * segments : 0;
        schedule.states = 0;
        schedule.workspace = aligned(states * consumers * sizeof(float) * (shape.columns * shape.size + 1));
        schedule.sync = segments > 1 ? sizeof(uint32_t) * (2 + states * consumers) : 0;
        if (shape.wide()) {
            schedule.features = schedule.workspace;
            schedule.workspace += aligned(size_t{2} * batch * (heads + geometry.num_kv_heads) * chunks * kChunk * d);
        }
        if (schedule.raw) {
            schedule.outputs = schedule.workspace;
            schedule.workspace += aligned(sizeof(float) * tokens * heads * d);
        }
        return schedule;
    }
    schedule.path = Path::generic;
    schedule.raw = true;
    schedule.outputs = aligned(sizeof(float) * tokens * (heads + geometry.num_kv_heads) * d);
    schedule.workspace = schedule.outputs + aligned(sizeof(float) * tokens * heads * d);
    return schedule;
}

}  // namespace dijiang::prefill
