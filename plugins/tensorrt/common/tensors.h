// Tensors as TensorRT describes them, in whichever of its structures.
#pragma once

#include <NvInferRuntime.h>

namespace dijiang::trt {

struct Tensor {
    const nvinfer1::Dims* dims;
    nvinfer1::DataType type;
};

inline Tensor tensor_of(const nvinfer1::PluginTensorDesc& desc) { return {&desc.dims, desc.type}; }
inline Tensor tensor_of(const nvinfer1::DynamicPluginTensorDesc& tensor) { return tensor_of(tensor.desc); }

// Looks tensors up by their place, which counts inputs, then outputs.
template <typename Description>
auto tensors_of(const Description* in, int32_t inputs, const Description* out) {
    return [=](int32_t at) { return tensor_of(at < inputs ? in[at] : out[at - inputs]); };
}

// The same in the largest sizes that a profile allows.
inline auto largest_of(
    const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs, const nvinfer1::DynamicPluginTensorDesc* out) {
    return [=](int32_t at) {
        const nvinfer1::DynamicPluginTensorDesc& tensor = at < inputs ? in[at] : out[at - inputs];
        return Tensor{&tensor.max, tensor.desc.type};
    };
}

}  // namespace dijiang::trt
