// Do two strided tensors share a byte? Plain arithmetic on the host.
#pragma once

#include <cstdint>

namespace dijiang {

// `outer` x `inner` rows of `width` bytes each. Strides in bytes; a stride whose count is 1 means nothing.
struct Region {
    const char* name;
    uintptr_t begin;  // 0: absent
    int64_t width;
    int64_t inner, inner_stride;
    int64_t outer, outer_stride;
    bool written;
};

// Bytes from the first to behind the last.
inline int64_t extent(const Region& r) {
    return r.width + (r.inner - 1) * r.inner_stride + (r.outer - 1) * r.outer_stride;
}

// Seen modulo `period`, does r stay inside one window from its first byte on? Then `window` is how long that
// is.
inline bool window_of(const Region& r, int64_t period, int64_t& window) {
    if (r.outer > 1 && r.outer_stride % period != 0) return false;
    const bool inner_repeats = r.inner == 1 || r.inner_stride % period == 0;
    window = inner_repeats ? r.width : r.width + (r.inner - 1) * r.inner_stride;
    return window <= period;
}

// True only if no byte belongs to both. Tensors that interleave, such as two columns of one matrix, are
// recognised when a stride of either repeats in both; stranger patterns count as overlapping.
inline bool disjoint(const Region& a, const Region& b) {
    if (a.begin == 0 || b.begin == 0) return true;
    const uintptr_t a_end = a.begin + static_cast<uintptr_t>(extent(a));
    const uintptr_t b_end = b.begin + static_cast<uintptr_t>(extent(b));
    if (a_end <= b.begin || b_end <= a.begin) return true;
    const int64_t periods[] = {a.inner > 1 ? a.inner_stride : 0, a.outer > 1 ? a.outer_stride : 0,
                               b.inner > 1 ? b.inner_stride : 0, b.outer > 1 ? b.outer_stride : 0};
    for (const int64_t period : periods) {
        int64_t a_window = 0, b_window = 0;
        if (period <= 0 || !window_of(a, period, a_window) || !window_of(b, period, b_window)) continue;
        const bool ahead = b.begin >= a.begin;
        const int64_t apart = static_cast<int64_t>(ahead ? b.begin - a.begin : a.begin - b.begin) % period;
        const int64_t shift = ahead || apart == 0 ? apart : period - apart;  // where b begins in a's window
        if (shift >= a_window && period - shift >= b_window) return true;
    }
    return false;
}

}  // namespace dijiang
