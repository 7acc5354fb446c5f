// Elements of the three types as float32 and back; pairs of 16-bit elements in one register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dijiang {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Four neighbouring elements.
template <typename T> struct alignas(4 * sizeof(T)) Quad {
    T x, y, z, w;
};

template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T> __device__ __forceinline__ float2 unpack(uint32_t both);
template <> __device__ __forceinline__ float2 unpack<__half>(uint32_t both) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
}
template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t both) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
}

// Four numbers rounded to T.
template <typename T> __device__ __forceinline__ float4 rounded(const float4& x) {
    const float2 low = unpack<T>(pack<T>(x.x, x.y)), high = unpack<T>(pack<T>(x.z, x.w));
    return {low.x, low.y, high.x, high.y};
}

// Products of pairs, and the larger magnitudes of pairs.
template <typename T> struct Pair;
template <> struct Pair<__half> { using type = __half2; };
template <> struct Pair<__nv_bfloat16> { using type = __nv_bfloat162; };
template <typename T> __device__ __forceinline__ uint32_t multiply(uint32_t x, uint32_t y) {
    using P = typename Pair<T>::type;
    const P product = __hmul2(*reinterpret_cast<const P*>(&x), *reinterpret_cast<const P*>(&y));
    return *reinterpret_cast<const uint32_t*>(&product);
}
__device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y) {
    const __half2 most = __hmax2(__habs2(*reinterpret_cast<const __half2*>(&x)),
                                 __habs2(*reinterpret_cast<const __half2*>(&y)));
    return *reinterpret_cast<const uint32_t*>(&most);
}

}  // namespace dijiang
