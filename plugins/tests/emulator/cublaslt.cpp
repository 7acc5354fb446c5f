// A cuBLASLt for tests on a CPU: the functions that kernels/linear/many uses, for matrices in the host's memory. It
// multiplies what it is asked to, in double, and refuses what the real one would: a missing setting, a wrong address.
//
// Defined for a test: OLD_VERSION (10.2), NO_MATMUL (it lacks cublasLtMatmul), NO_ALGORITHM_FOR (a width that it has no
// algorithm for), FAILS_TO_CREATE.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kInvalidValue = 7, kNotSupported = 15;
constexpr int kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14;

struct Product {
    int compute, scale, transpose_a = 0;
    uint32_t epilogue = 1;
    const void* bias = nullptr;
};
struct Matrix {
    int type;
    uint64_t rows, columns;
    int64_t stride;

    double get(const void* data, uint64_t row, uint64_t column) const {
        const uint64_t at = row + column * static_cast<uint64_t>(stride);
        if (type == kFloat32) return static_cast<const float*>(data)[at];
        if (type == kFloat16) return __half2float(static_cast<const __half*>(data)[at]);
        return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    }
    void set(void* data, uint64_t row, uint64_t column, double x) const {
        const uint64_t at = row + column * static_cast<uint64_t>(stride);
        const auto y = static_cast<float>(x);
        if (type == kFloat32) static_cast<float*>(data)[at] = y;
        else if (type == kFloat16) static_cast<__half*>(data)[at] = __float2half_rn(y);
        else static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(y);
    }
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = 7, alignment[4] = {256, 256, 256, 256};
};
struct Choice {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

int handles = 0;

bool aligned(const void* address, uintptr_t by) { return reinterpret_cast<uintptr_t>(address) % by == 0; }

}  // namespace

extern "C" {

int choices_made = 0;  // for tests: how often an algorithm was chosen

#ifdef OLD_VERSION
size_t cublasLtGetVersion() { return 10200; }
#else
size_t cublasLtGetVersion() { return 130100; }
#endif

int cublasLtCreate(void** handle) {
#ifdef FAILS_TO_CREATE
    return 1;
#endif
    *handle = &handles;
    return 0;
}
int cublasLtMatmulDescCreate(Product** made, int compute, int scale) {
    *made = new Product{compute, scale};
    return 0;
}
int cublasLtMatmulDescSetAttribute(Product* it, int attribute, const void* value, size_t size) {
    if (attribute == 3 && size == 4) std::memcpy(&it->transpose_a, value, 4);
    else if (attribute == 7 && size == 4) std::memcpy(&it->epilogue, value, 4);
    else if (attribute == 8 && size == 8) std::memcpy(&it->bias, value, 8);
    else return kInvalidValue;
    return 0;
}
int cublasLtMatmulDescDestroy(Product* it) {
    delete it;
    return 0;
}
int cublasLtMatrixLayoutCreate(Matrix** made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    if (stride < static_cast<int64_t>(rows)) return kInvalidValue;
    *made = new Matrix{type, rows, columns, stride};
    return 0;
}
int cublasLtMatrixLayoutDestroy(Matrix* it) {
    delete it;
    return 0;
}
int cublasLtMatmulPreferenceCreate(Preference** made) {
    *made = new Preference;
    return 0;
}
int cublasLtMatmulPreferenceSetAttribute(Preference* it, int attribute, const void* value, size_t size) {
    if (attribute == 1 && size == 8) std::memcpy(&it->workspace, value, 8);
    else if (attribute == 3 && size == 4) std::memcpy(&it->reductions, value, 4);
    else if (attribute >= 5 && attribute <= 8 && size == 4) std::memcpy(&it->alignment[attribute - 5], value, 4);
    else return kInvalidValue;
    return 0;
}
int cublasLtMatmulPreferenceDestroy(Preference* it) {
    delete it;
    return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void* handle, const Product* product, const Matrix* a, const Matrix* b, const Matrix* c,
                                   const Matrix* d, const Preference* preference, int wanted, Choice* choices, int* found) {
    ++choices_made;
    *found = 0;
    if (handle != &handles || wanted < 1 || product->compute != 68 || product->scale != 0 || product->transpose_a != 1)
        return kInvalidValue;
    if (a->rows != b->rows || d->rows != a->columns || d->columns != b->columns || c->type != d->type) return kInvalidValue;
    const bool biased = (product->epilogue & 4) != 0;
    if (product->epilogue != 1 && ((product->epilogue & ~6u) != 0 || d->type == kFloat32 || d->rows % 8 != 0))
        return kInvalidValue;
    if (biased != (product->bias != nullptr)) return kInvalidValue;
    if (preference->reductions != 2) return kInvalidValue;  // parts of sums in another type, or in any order
    for (const uint32_t alignment : preference->alignment)
        if (alignment != 16) return kInvalidValue;  // 256 is more than callers promise
#ifdef NO_ALGORITHM_FOR
    if (d->rows == NO_ALGORITHM_FOR) return kNotSupported;
#endif
    *choices = {};
    choices->algorithm[0] = 42;
    choices->workspace = preference->workspace;
    *found = 1;
    return 0;
}
#ifndef NO_MATMUL
int cublasLtMatmul(void* handle, const Product* product, const float* alpha, const void* a, const Matrix* a_is, const void* b,
                   const Matrix* b_is, const float* beta, const void* c, const Matrix* c_is, void* d, const Matrix* d_is,
                   const uint64_t* algorithm, void* workspace, size_t workspace_size, void*) {
    if (handle != &handles || algorithm[0] != 42 || !aligned(workspace, 256)) return kInvalidValue;
    for (const void* address : {a, b, c, static_cast<const void*>(d)})
        if (!aligned(address, 16)) return kInvalidValue;
    if ((product->epilogue & 4) != 0 && !aligned(product->bias, 16)) return kInvalidValue;
    std::memset(workspace, 0xff, workspace_size);
    for (uint64_t column = 0; column < d_is->columns; ++column)
        for (uint64_t row = 0; row < d_is->rows; ++row) {
            double sum = 0;
            for (uint64_t k = 0; k < a_is->rows; ++k) sum += a_is->get(a, k, row) * b_is->get(b, k, column);
            const double bias = (product->epilogue & 4) != 0 ? d_is->get(product->bias, row, 0) : 0;
            const double all = *alpha * sum + bias + (*beta == 0 ? 0 : *beta * c_is->get(c, row, column));
            d_is->set(d, row, column, (product->epilogue & 2) != 0 && all < 0 ? 0 : all);
        }
    return 0;
}
#endif

}  // extern "C"
