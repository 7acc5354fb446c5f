// What both shells do the same way: check, size and run one layer.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "attention/attributes.h"
#include "attention/tensors.h"
#include "common/sync_memory.h"

namespace dijiang::trt {

// One plugin object's data. TensorRT clones plugins per execution context and runs each clone in one thread
// at a time, so nothing here is locked. Every function returns "" or what is wrong.
class Layer {
public:
    explicit Layer(const Attributes& attributes, const Limits& limits = {})
        : attributes_(attributes), limits_(limits) {}

    const Attributes& attributes() const { return attributes_; }
    const Limits& limits() const { return limits_; }

    // Checks a configuration whose sizes may be unknown (-1), and widens the limits by the largest call that
    // it allows.
    std::string configure(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs);

    // Checks a call's exact sizes and reserves what it needs.
    std::string prepare(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
        const nvinfer1::PluginTensorDesc* out, int32_t outputs);

    // Reserves what the largest call that the plan allows needs, whatever its type; nothing if that is
    // unknown.
    std::string reserve();
    void release() { sync_.release(); }

    // Bytes of workspace for calls of up to `call`'s size on this GPU.
    static std::string workspace(const Call& call, size_t& bytes);

    // The same for a plan: on every GPU that it may run on.
    static std::string workspace_of_plan(const Call& call, size_t& bytes);

    // Enqueues the call: no allocation, no synchronisation.
    std::string run(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        int32_t inputs, const void* const* data, void* const* results, void* workspace,
        cudaStream_t stream) const;

private:
    std::string reserve(const dijiang_geometry& geometry);

    Attributes attributes_;
    Limits limits_;
    SyncMemory sync_;
};

// Checks a dynamic description; its batch and length are the largest that qkv may have (its `max`, or what is
// there).
std::string examine_largest(const Attributes& attributes, const nvinfer1::DynamicPluginTensorDesc* in,
    int32_t inputs, const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs, Call& call);

// Checks exact sizes.
std::string examine(const Attributes& attributes, const nvinfer1::PluginTensorDesc* in, int32_t inputs,
    const nvinfer1::PluginTensorDesc* out, int32_t outputs, Call& call);

}  // namespace dijiang::trt
