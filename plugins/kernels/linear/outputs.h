// What cutting products asks of a call, whatever its weights are.
#pragma once

#include "linear/linear.h"

namespace dijiang {
namespace linear {

constexpr int32_t kMostRows = 16;    // of a block of few rows: what an mma has
constexpr int32_t kReserved = 1024;  // bytes of shared memory of each block, by CUDA
constexpr int32_t kMoments = kMostRows * 8;  // bytes of the norm's means and scales, where the sums will be

inline int32_t ceiling(int64_t x, int64_t by) { return static_cast<int32_t>((x + by - 1) / by); }

inline int32_t tiles_of(const dijiang_linear_output& output) { return ceiling(output.width, kTile); }

// Do both terms read the same tensor? A call is also described where there are none yet: then what usually is so counts.
inline bool one_input(const dijiang_linear_output& output, const dijiang_linear_term* terms, int32_t count) {
    if (count != 2 || terms[0].inner != terms[1].inner) return false;
    if (terms[0].input != nullptr) return terms[0].input == terms[1].input;
    return output.activation == DIJIANG_SWIGLU || output.norm != DIJIANG_NORM_NONE;
}

}  // namespace linear
}  // namespace dijiang
