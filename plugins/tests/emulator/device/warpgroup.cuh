// Groups of four warps: wgmma by the definitions of PTX's documentation, on the bytes that its descriptors name.
// Products are done when they are waited for, not before, or all at once (emulator::eager).
#pragma once

#include "device/tiles.cuh"

namespace emulator {
inline bool eager = false;
// A barrier in shared memory: a phase ends when all have arrived, and as many bytes as are expected. Bulk copies come
// as late as they may: when somebody waits for them.
struct Phases {
    int members = 0, left = 0;
    uint32_t turn = 0;
    int64_t bytes = 0;  // still expected; below 0: came before anybody said so
    std::deque<std::function<void()>> copies;
    void settle() {
        if (left < 0) std::abort();
        if (left == 0 && bytes == 0) left = members, ++turn;
    }
};
inline std::map<std::pair<const Block*, uint32_t>, Phases> phases;
inline Phases& phases_of(uint32_t barrier, const Block* of = block) { return phases.at({of, offset_of(barrier)}); }
struct Batch {
    std::vector<std::function<void()>> products;
};
using Thread = std::pair<const Block*, int>;
inline Thread this_thread() { return {block, block->current}; }
inline std::map<Thread, Batch> open_batch;
inline std::map<Thread, std::deque<Batch>> batches;

// The element of a descriptor's operand; `outer` along the 64 or N, `inner` along the 16.
template <typename T> float element(uint64_t descriptor, bool trans, int outer, int inner) {
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    const int kind = static_cast<int>(descriptor >> 62);
    if (kind == 0) std::abort();
    const uint32_t bits = kind == 1 ? 3 : kind == 2 ? 2 : 1, width = 8u << bits;  // elements of a row
    uint32_t at = start;
    const auto o = static_cast<uint32_t>(outer), i = static_cast<uint32_t>(inner);
    if (trans) at += o / width * leading + o % width * 2 + i / 8 * stride + i % 8 * 2 * width;
    else at += o / 8 * stride + o % 8 * 2 * width + i * 2;
    at ^= (at >> 7 & ((1u << bits) - 1)) << 4;
    if (at + 2 > kSharedMemory) std::abort();
    uint16_t raw;
    std::memcpy(&raw, shared_memory + at, 2);
    return dijiang::unpack<T>(raw).x;
}
// An operand of a group's product, [outer, inner]: read once, by the first of the group's threads to compute.
struct Operand {
    uint64_t descriptor;
    bool trans;
    int outer;
    std::vector<float> elements;
    template <typename T> const float* read() {
        if (elements.empty())
            for (int i = 0; i < 16 * outer; ++i)
                elements.push_back(element<T>(descriptor, trans, i / 16, i % 16));
        return elements.data();
    }
};
// The same for all of the group's threads, which meet after it.
inline std::shared_ptr<Operand> share_operand(int which, uint64_t descriptor, bool trans, int outer) {
    static std::map<std::pair<std::pair<const Block*, int>, int>, std::shared_ptr<Operand>> shared;
    std::shared_ptr<Operand>& it = shared[{{block, block->current / 128}, which}];
    if (block->current % 128 == 0) it = std::make_shared<Operand>(Operand{descriptor, trans, outer, {}});
    Meeting& all = block->named[64 + block->current / 128];
    all.members = 128;
    meet(all);
    return it;
}
inline void product(std::function<void()> f) {
    if (eager) f();
    else open_batch[this_thread()].products.push_back(std::move(f));
}
}  // namespace emulator

namespace dijiang {

template <typename T, int N> struct Wgmma {
    template <int kTransA, int kTransB>
    static void shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, int add) {
        float(*to)[4] = c;
        const int thread = emulator::block->current;
        const auto left = emulator::share_operand(0, a, kTransA, 64), right = emulator::share_operand(1, b, kTransB, N);
        emulator::product([=] {
            const float* const rows = left->template read<T>();
            multiply_add(to, thread, add, right->template read<T>(),
                         [=](int row, int k) { return rows[16 * row + k]; });
        });
        emulator::share_operand(2, 0, false, 0);
    }
    template <int kTransB>
    static void registers(float (&c)[N / 8][4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,
                          int add) {
        float(*to)[4] = c;
        const int thread = emulator::block->current, g = thread % 32 / 4;
        const uint32_t words[4] = {a0, a1, a2, a3};
        std::vector<float> rows(32);  // rows g and g + 8, 16 each
        const auto right = emulator::share_operand(1, b, kTransB, N);
        emulator::exchange(words, 4, [&](auto of) {
            for (int i = 0; i < 2; ++i)
                for (int k = 0; k < 16; ++k) {
                    const float2 both = unpack<T>(of(4 * g + k % 8 / 2, i + 2 * (k / 8)));
                    rows[static_cast<size_t>(16 * i + k)] = k % 2 == 0 ? both.x : both.y;
                }
        });
        emulator::product([=] {
            multiply_add(to, thread, add, right->template read<T>(),
                         [&](int row, int k) { return rows[static_cast<size_t>(row % 16 / 8 * 16 + k)]; });
        });
        emulator::share_operand(2, 0, false, 0);
    }

private:
    template <typename A> static void multiply_add(float (*c)[4], int thread, int add, const float* b, A&& a) {
        const int row = thread % 128 / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
        float left[2][16];
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 16; ++k) left[i][k] = a(row + 8 * i, k);
        for (int n = 0; n < N / 8; ++n)
            for (int j = 0; j < 2; ++j) {
                float sum[2] = {add ? c[n][j] : 0.0f, add ? c[n][2 + j] : 0.0f};
                const float* const right = b + 16 * (8 * n + column + j);
                for (int k = 0; k < 16; ++k) sum[0] += left[0][k] * right[k], sum[1] += left[1][k] * right[k];
                c[n][j] = sum[0], c[n][2 + j] = sum[1];
            }
    }
};

inline void begin_products() {}
inline void end_products() {
    emulator::Batch& open = emulator::open_batch[emulator::this_thread()];
    emulator::batches[emulator::this_thread()].push_back(std::move(open));
    open = {};
}
template <int kPending> void await_products() {
    std::deque<emulator::Batch>& mine = emulator::batches[emulator::this_thread()];
    while (mine.size() > kPending) {
        for (const auto& f : mine.front().products) f();
        mine.pop_front();
    }
}
inline void show_to_products() {}

inline void stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t words[5] = {address, a, b, c, d};
    const int lane = emulator::block->current % 32;
    if (address % 16 != 0) std::abort();
    emulator::exchange(words, 5, [&](auto of) {
        const uint32_t to = emulator::offset_of(of(lane, 0));  // the row of matrix lane / 8
        for (int piece = 0; piece < 4; ++piece) {
            const uint32_t word = of(lane % 8 * 4 + piece, 1 + lane / 8);
            std::memcpy(emulator::shared_memory + to + 4 * piece, &word, 4);
        }
    });
}

inline void make_barrier(uint32_t barrier, int arrivals) {
    emulator::phases[{emulator::block, emulator::offset_of(barrier)}] = {arrivals, arrivals, 0, 0, {}};
}
inline void arrive_at(uint32_t barrier) {
    emulator::Phases& it = emulator::phases_of(barrier);
    --it.left;
    it.settle();
}
inline void await_phase(uint32_t barrier, uint32_t parity) {
    emulator::Phases& it = emulator::phases_of(barrier);
    while ((it.turn & 1) == parity) {
        if (it.copies.empty()) {
            emulator::yield();
        } else {
            it.copies.front()();
            it.copies.pop_front();
            it.settle();
        }
    }
}
inline bool any_of(int id, int threads, bool mine) {
    static std::map<std::pair<const emulator::Block*, int>, bool> of_all;
    bool& any = of_all[{emulator::block, id}];
    const auto meet = [&] {
        emulator::Meeting& all = emulator::block->named[id];
        all.members = threads;
        emulator::meet(all);
    };
    if (mine) any = true;
    meet();
    const bool said = any;
    meet();
    any = false;
    meet();
    return said;
}
template <int kMost> void give_registers() {}
template <int kMost> void take_registers() {}
inline void store_release(unsigned* to, unsigned value) { *to = value; }
inline unsigned load_acquire(const unsigned* from) { return *from; }
inline char* block_memory() { return reinterpret_cast<char*>(emulator::shared_memory); }

}  // namespace dijiang
