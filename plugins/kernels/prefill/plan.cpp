#include "prefill/plan.h"

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

constexpr size_t kStaticShared = 2304;  // at most, of any kernel here
constexpr size_t kReserved = 2304;      // of a fused block: static variables and the runtime's 1 KB


// Grows with length, so that `needs` may look at the longest alone.
int most_segments(int64_t jobs, int chunks, int64_t room) {
    // Every segment reads what all before it found: many only where each has much to do itself.
    const int64_t most = std::min(16, std::max(8, chunks / 4));
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({most, room / jobs, chunks})));
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

Plan make_plan(const dijiang_geometry& geometry, int batch, int length, const dijiang_device& device) {
    const int64_t heads = geometry.num_heads, d = geometry.head_dim, tokens = int64_t{batch} * length;
    Plan plan{};
    plan.set = 1;
    plan.segments = 1;
    plan.segment_chunks = (length + kChunk - 1) / kChunk;
    const FusedShape shape = fused_shape(static_cast<int>(d));
    plan.multiprocessors = device.multiprocessors;
    const size_t room_left = static_cast<size_t>(device.shared_memory) - kStaticShared;
    const size_t sm_memory = static_cast<size_t>(device.shared_memory) + 1024;
    const size_t wide_features = shape.wide() ? size_t{2} * (256 + 128) * (256 + 8) : 0;
    const int least = shape.wide() ? 2 : 1;
    const bool fits = shape.bytes(1, least) <= room_left && wide_features <= room_left;
    const bool tuned = d <= 128 || d == 256;
    if (geometry.dtype != DIJIANG_FLOAT32 && tuned && fits) {
        plan.path = shape.wide() ? Path::wide : Path::fused;
        const int set = static_cast<int>(heads / std::gcd(heads, d));
        const bool inside = shape.wide() ? shape.own() % heads == 0 : d % shape.columns == 0;
        const bool whole = heads % shape.narrowest() == 0 && set <= shape.most_heads && inside
                           && shape.bytes(set, least) <= room_left;
        plan.raw = !whole;
        plan.set = whole ? set : 1;
        plan.threads = 32 * shape.warps() * plan.set;
        // Small heads share a multiprocessor by twos; a second stage where it does not prevent that.
        const auto pair = [&](int stages) { return 2 * (shape.bytes(1, stages) + kReserved) <= sm_memory; };
        const int resident = plan.set == 1 && d <= 80 && pair(1) ? 2 : 1;
        const bool two = plan.set == 1 && shape.bytes(1, 2) <= room_left && (resident == 1 || pair(2));
        plan.stages = two ? 2 : 1;
        plan.shared = shape.bytes(plan.set, plan.stages);
        const int64_t jobs = batch * (heads / plan.set) * (shape.wide() ? d / shape.own() : 1);
        const int64_t room = int64_t{device.multiprocessors} * resident;
        // Memory for `segments` even if rounding makes fewer of them: that number alone grows with length.
        const int chunks = plan.segment_chunks, segments = most_segments(jobs, chunks, room);
        plan.segment_chunks = (chunks + segments - 1) / segments;
        plan.segments = (chunks + plan.segment_chunks - 1) / plan.segment_chunks;
        plan.blocks = static_cast<int>(jobs * plan.segments);
        const int consumers = shape.consumers * plan.set;
        const size_t states = segments > 1 ? jobs * segments : 0;
        plan.states = 0;
        plan.workspace = aligned(states * consumers * sizeof(float) * (shape.columns * shape.size + 1));
        plan.sync = segments > 1 ? sizeof(uint32_t) * (2 + states * consumers) : 0;
        if (shape.wide()) {
            plan.features = plan.workspace;
            plan.workspace += aligned(size_t{2} * batch * (heads + geometry.num_kv_heads) * chunks * kChunk * d);
        }
        if (plan.raw) {
            plan.outputs = plan.workspace;
            plan.workspace += aligned(sizeof(float) * tokens * heads * d);
        }
        return plan;
    }
    plan.path = Path::generic;
    plan.raw = true;
    plan.outputs = aligned(sizeof(float) * tokens * (heads + geometry.num_kv_heads) * d);
    plan.workspace = plan.outputs + aligned(sizeof(float) * tokens * heads * d);
    return plan;
}

}  // namespace dijiang::prefill
