// A product by cuBLASLt: result = input weight^T [+ bias] [+ added], or ReLU of it, with sums in float32, rounded once.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "dijiang/kernels.h"

namespace dijiang {
namespace many {

constexpr size_t kLibraryWorkspace = size_t{32} << 20;  // bytes that an algorithm may have, a multiple of 256

// All that an algorithm is chosen by, dense but for the strides from row to row. Every address is a multiple of 16.
struct Shape {
    int32_t dtype;         // T: of input and weight, of result and added too unless `wide`
    int32_t wide;          // 1: they are float32
    int32_t adds;          // 1: added, of the result's stride, is there; with `wide` it is the result itself
    int32_t biased, relu;  // 1: a bias is there, ReLU is last; not with `wide`
    int32_t rows, width, inner;
    int32_t result_stride;  // elements

    bool operator<(const Shape& other) const;
};

class Product;  // a shape with its algorithm, on one device

// The algorithm for a shape on the current device: chosen once, so that equal calls have equal bits, then remembered.
// Null, with a status of DIJIANG_OK, if there is no cuBLASLt or it has none; `why` says which.
dijiang_status prepare(const Shape&, std::shared_ptr<const Product>&, std::string& why);

// Only enqueues. bias: T [width]. workspace: kLibraryWorkspace bytes, a multiple of 256.
dijiang_status multiply(const Product&, const void* input, const void* weight, const void* bias, const void* added,
                        void* result, void* workspace, cudaStream_t stream);

}  // namespace many
}  // namespace dijiang
