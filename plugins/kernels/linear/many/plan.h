// How a call of many rows is cut: its weights are widened to T where they are quantised, piece by piece, and cuBLASLt
// multiplies. What it cannot do exactly - biases that T does not have, activations, two factors - is done from float32
// sums; biases of T's numbers are added by it, before it rounds.
#pragma once

#include <string>
#include <vector>

#include "dijiang/linear.h"

namespace dijiang {
namespace many {

constexpr int32_t kLeastRows = 17;       // from here on, with a workspace
constexpr int32_t kRowsAtOnce = 8192;
constexpr int32_t kColumns = 128;        // pieces are multiples of it
constexpr int32_t kEpilogueColumns = 8;  // of other widths the library rounds before it adds a bias
constexpr int32_t kMostJobs = 8;         // weights that are widened in one launch
constexpr int64_t kMostWeights = int64_t{32} << 20, kMostSums = int64_t{32} << 20;  // bytes, unless one piece has more

// Output elements from `column` on, of one output.
struct Piece {
    int32_t output, column, columns;
    int64_t weights[2];  // where each term's widened weights begin, in bytes; -1: they are T already
};

struct Output {
    int32_t term, terms;
    bool direct;   // the library's result is the output: one term, no activation but ReLU, a bias of T's numbers at most
    int64_t bias;  // where that bias is, made T, in bytes; -1: there is none
};

struct Plan {
    int32_t rows_at_once = 0;
    int64_t inputs = 0, weights = 0, biases = 0, sums = 0;  // bytes of the workspace's parts, multiples of 256;
                                                            // sums: of one term
    bool two_sums = false;
    Output outputs[DIJIANG_LINEAR_MAX_OUTPUTS] = {};
    std::vector<std::vector<Piece>> groups;  // whose weights are widened together

    int64_t bytes() const;  // with the library's own
};

// Elements from one row of float32 sums to the next.
constexpr int64_t sums_stride(int64_t columns) { return (columns + 7) / 8 * 8; }

// Of a valid call of at least kLeastRows rows; equal calls have equal plans. any_bias: as if each term had a bias.
Plan plan(const dijiang_linear_call& call, bool any_bias = false);

// Is it worth it? Quantised weights of few rows are read faster by the kernel that multiplies them as they are, if its
// blocks are many and have little to do each.
bool pays(const dijiang_linear_call& call, const dijiang_device& device);

// Bytes that a call needs whatever its pointers are; more rows never need less. 0 below kLeastRows.
int64_t workspace(const dijiang_linear_call& call);

std::string describe(const dijiang_linear_call& call, const Plan& plan);

}  // namespace many
}  // namespace dijiang
