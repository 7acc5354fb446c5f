// cuBLASLt: found when it is first needed, never linked. What is declared here are the names, numbers and layouts that
// its documentation gives for versions 11 to 13.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace dijiang {
namespace cublaslt {

using Handle = void*;
using Description = void*;  // of a product, of a matrix, of what an algorithm may need

struct Algorithm {
    uint64_t data[8];
};
struct Choice {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

constexpr int kSuccess = 0, kNotSupported = 15;                    // cublasStatus_t
constexpr int kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14;          // cudaDataType_t
constexpr int kComputeFloat32 = 68;                                // cublasComputeType_t
constexpr int kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8;    // cublasLtMatmulDescAttributes_t
constexpr uint32_t kRelu = 2, kAddBias = 4;  // cublasLtEpilogue_t; the last two together: 6. A bias is
// of D's type, one number for each of D's rows, and comes before ReLU; D is rounded last
constexpr int kTranspose = 1;                                      // cublasOperation_t
constexpr int kMostWorkspace = 1, kReductions = 3, kAlignmentOfA = 5;  // cublasLtMatmulPreferenceAttributes_t; B, C, D follow
constexpr uint32_t kSumsInFloat32 = 2;  // cublasLtReductionScheme_t: parts of a sum meet in float32, in their order

struct Library {
    std::string name;    // "libcublasLt.so.13", or a path
    size_t version = 0;  // 130100 is 13.1.0

    int (*create)(Handle*);
    size_t (*get_version)();
    int (*product_create)(Description*, int compute, int scale);
    int (*product_set)(Description, int attribute, const void* value, size_t size);
    int (*product_destroy)(Description);
    int (*matrix_create)(Description*, int type, uint64_t rows, uint64_t columns, int64_t column_stride);
    int (*matrix_destroy)(Description);
    int (*preference_create)(Description*);
    int (*preference_set)(Description, int attribute, const void* value, size_t size);
    int (*preference_destroy)(Description);
    int (*choose)(Handle, Description product, Description a, Description b, Description c, Description d,
                  Description preference, int wanted, Choice* choices, int* found);
    int (*multiply)(Handle, Description product, const void* alpha, const void* a, Description a_is, const void* b,
                    Description b_is, const void* beta, const void* c, Description c_is, void* d, Description d_is,
                    const Algorithm* algorithm, void* workspace, size_t workspace_size, cudaStream_t stream);
};

// What the process has, looked for once: the file that the environment's DIJIANG_CUBLASLT names ("none": none); what is
// loaded already; what the dynamic linker finds; the newest first. Null if there is none, and `missing` says why.
const Library* find(std::string& missing);

}  // namespace cublaslt
}  // namespace dijiang
