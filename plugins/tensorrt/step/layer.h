// DijiangStep: check and run a whole step, and keep what its blocks meet through.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/layer.h"
#include "common/sync_memory.h"
#include "step/attributes.h"
#include "step/fields.h"

namespace dijiang::trt::step {

// The order of tensors. Inputs: input_ids, positions, seq_lens; a past state for each layer; the packed weights, the
// embedding and, if there are any, its scales and a table of learned positions. Outputs: logits; a present state for
// each layer. Integers are int32 or int64, all three alike. Weights come from constant layers, as int32, which no
// version of TensorRT converts or copies.
constexpr int32_t kInputIds = 0, kPositions = 1, kSeqLens = 2, kPastStates = 3;
constexpr int32_t kLogits = 0, kPresentStates = 1;

class Layer : public LayerBase<Attributes, kNodeFields, kFields> {
public:
    static constexpr const char* kName = step::kName;

    using LayerBase::LayerBase;

    int32_t outputs() const { return kPresentStates + attributes_.model.layers; }
    std::string output_type(int32_t, const nvinfer1::DataType*, int32_t, nvinfer1::DataType& type) const {
        type = nvinfer1::DataType::kFLOAT;
        return {};
    }
    std::string output_shape(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count,
        nvinfer1::IExprBuilder& builder, nvinfer1::DimsExprs& shape) const;
    bool supports(int32_t at, int32_t inputs, int32_t outputs, const nvinfer1::PluginTensorDesc& tensor,
        const nvinfer1::PluginTensorDesc& first) const;

    std::string configure(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
        const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const;
    std::string prepare(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t outputs);

    // On the GPU at hand, which must be one that the weights are packed for.
    std::string reserve();
    void release() noexcept { sync_.release(); }

    // A state that is not in place is copied first.
    std::string run(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
        const void* const* data, void* const* results, void* workspace, cudaStream_t stream) const;

private:
    int32_t inputs() const { return learned() + (attributes_.model.position_rows > 0 ? 1 : 0); }
    // Places: of the packed weights, the embedding behind them, its scales, and learned positions.
    int32_t packed() const { return kPastStates + attributes_.model.layers; }
    int32_t scales() const { return packed() + 2; }
    int32_t learned() const { return scales() + (has_scales() ? 1 : 0); }
    bool has_scales() const { return attributes_.model.embedding_format != DIJIANG_SAME; }
    bool is_state(int32_t at, int32_t inputs) const;
    std::string name(int32_t at) const;
    nvinfer1::DataType type_at(int32_t at, nvinfer1::DataType ids) const;
    nvinfer1::Dims shape_at(int32_t at, int64_t batch, int64_t lines) const;
    template <typename Look>
    std::string check(int32_t inputs, int32_t outputs, bool dynamic, Look look) const;

    SyncMemory sync_;
};

}  // namespace dijiang::trt::step
