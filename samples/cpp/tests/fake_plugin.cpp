// A plugin's exports, run by the fake CUDA: the rules of dijiang/sampling.h for one row, without its
// mathematics. Sampling takes an id that shows which random number was drawn.
#include <dijiang/sampling.h>

#include <cmath>
#include <cstring>

#include "fake_cuda.h"

#ifndef FAKE_ABI
#define FAKE_ABI DIJIANG_ABI_VERSION
#endif

namespace {

template <typename Body>
void with_integers(int integers, Body&& body) {
    if (integers == DIJIANG_INT64) {
        body(int64_t{});
    } else {
        body(int32_t{});
    }
}

}  // namespace

extern "C" {

int32_t dijiang_abi_version(void) { return FAKE_ABI; }
const char* dijiang_version(void) { return "0.1.0"; }
const char* dijiang_last_error(void) { return "the fake refuses"; }
#ifndef FAKE_KERNELS_ONLY
DIJIANG_API void getCreators(void) {}
#endif

dijiang_status dijiang_sample(const dijiang_sampling_options* options, const dijiang_sample_buffers* buffers,
                              dijiang_stream stream) {
    if (buffers->batch != 1 || buffers->vocabulary < 1) return DIJIANG_INVALID_ARGUMENT;
    fake_enqueue(stream, [o = *options, b = *buffers] {
        int64_t best = -1;
        *b.row_status = DIJIANG_ROW_OK;
        for (int64_t id = 0; id < b.vocabulary; ++id) {
            if (b.allowed != nullptr && (b.allowed[id / 32] >> (id % 32) & 1) == 0) continue;
            if (!std::isfinite(b.logits[id])) *b.row_status = DIJIANG_ROW_NOT_FINITE;
            if (best < 0 || b.logits[id] > b.logits[best]) best = id;
        }
        if (o.temperature > 0) {
            best =
                (best + static_cast<int64_t>(o.seed) * 11 + static_cast<int64_t>(*b.streams) * 5 + *b.draws) %
                b.vocabulary;
        }
        if (*b.row_status != DIJIANG_ROW_OK) best = -1;
        with_integers(b.integers, [&](auto zero) { *static_cast<decltype(zero)*>(b.tokens) = best; });
    });
    return DIJIANG_OK;
}

dijiang_status dijiang_advance(const dijiang_advance_buffers* buffers, dijiang_stream stream) {
    if (buffers->finished == nullptr || buffers->history != nullptr) return DIJIANG_INVALID_ARGUMENT;
    fake_enqueue(stream, [b = *buffers] {
        with_integers(b.integers, [&](auto zero) {
            using I = decltype(zero);
            const I token = *static_cast<const I*>(b.tokens);
            bool on = *b.finished == 0 && *b.row_status == DIJIANG_ROW_OK;
            if (on) {
                *b.draws += 1;
                for (int32_t i = 0; i < b.stop_count; ++i) on = on && token != b.stop_ids[i];
            }
            *static_cast<I*>(b.positions) += *static_cast<I*>(b.seq_lens);
            *static_cast<I*>(b.seq_lens) = on ? 1 : 0;
            *static_cast<I*>(b.input_ids) = on ? token : b.pad_id;
            *b.finished = on ? 0 : 1;
        });
    });
    return DIJIANG_OK;
}

}  // extern "C"
