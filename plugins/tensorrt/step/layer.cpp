#include "step/layer.h"

#include <cuda_runtime_api.h>

#include <initializer_list>
#include <type_traits>
#include <vector>

#include "common/tensors.h"
#include "common/texts.h"

namespace dijiang::trt::step {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int64_t kLine = 128;  // bytes of a row of a tensor that holds packed weights, or scales

Dims dims_of(std::initializer_list<int64_t> sizes) {
    Dims dims{};
    for (const int64_t size : sizes) dims.d[dims.nbDims++] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(size);
    return dims;
}

bool is_integer(DataType type) {
#if NV_TENSORRT_MAJOR >= 10
    if (type == DataType::kINT64) return true;
#endif
    return type == DataType::kINT32;
}

bool is_wide(DataType type) { return is_integer(type) && type != DataType::kINT32; }

// Of one rank, with the same sizes where both are known.
bool fits(const Dims& got, const Dims& right, bool dynamic) {
    if (got.nbDims != right.nbDims) return false;
    for (int32_t i = 0; i < got.nbDims; ++i) {
        if (dynamic && (got.d[i] == -1 || right.d[i] == -1)) continue;
        if (got.d[i] != right.d[i]) return false;
    }
    return true;
}

}  // namespace

bool Layer::is_state(int32_t at, int32_t inputs) const {
    return at < inputs ? at >= kPastStates && at < packed() : at >= inputs + kPresentStates;
}

std::string Layer::name(int32_t at) const {
    const int32_t inputs = this->inputs();
    static const char* const kFirst[] = {"input_ids", "positions", "seq_lens"};
    if (at >= inputs) {
        const int32_t output = at - inputs;
        return "output " + std::to_string(output) +
               (output == kLogits ? " (logits)" : " (present_state of layer " + std::to_string(output - kPresentStates) + ")");
    }
    const std::string number = "input " + std::to_string(at);
    if (at < kPastStates) return number + " (" + kFirst[at] + ")";
    if (at < packed()) return number + " (past_state of layer " + std::to_string(at - kPastStates) + ")";
    if (at == packed()) return number + " (packed)";
    if (at == packed() + 1) return number + " (embedding)";
    return number + (at == scales() && has_scales() ? " (embedding_scales)" : " (position_embedding)");
}

DataType Layer::type_at(int32_t at, DataType ids) const {
    if (at < kPastStates) return ids;
    return at >= packed() && at < inputs() ? DataType::kINT32 : DataType::kFLOAT;
}

// Lines: of the packed weights.
Dims Layer::shape_at(int32_t at, int64_t batch, int64_t lines) const {
    const dijiang_step_model& m = attributes_.model;
    const int32_t inputs = this->inputs();
    if (is_state(at, inputs)) return dims_of({batch, m.num_heads, m.head_dim, m.head_dim});
    if (at == inputs + kLogits) return dims_of({batch, 1, m.vocabulary});
    if (at == kInputIds) return dims_of({batch, 1});
    if (at < kPastStates) return dims_of({batch});
    if (at == packed()) return dims_of({lines, kLine / 4});
    if (at == packed() + 1) {
        const int32_t per_word = m.embedding_format == DIJIANG_INT4 ? 8 : m.embedding_format == DIJIANG_INT8 ? 4 : 2;
        return dims_of({m.vocabulary, m.hidden / per_word});
    }
    if (at == scales() && has_scales()) {
        const int64_t bytes = int64_t{m.vocabulary} * (m.hidden / 32) * 2;
        return dims_of({(bytes + kLine - 1) / kLine, kLine / 4});
    }
    return dims_of({m.position_rows, m.hidden / 2});
}

std::string Layer::output_shape(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count,
    nvinfer1::IExprBuilder& builder, nvinfer1::DimsExprs& shape) const {
    if (output < 0 || output >= outputs() || input_count != this->inputs())
        return "got " + std::to_string(input_count) + " inputs; expected " + std::to_string(this->inputs());
    if (output != kLogits) {
        shape = inputs[kPastStates + output - kPresentStates];
        return {};
    }
    if (inputs[kInputIds].nbDims != 2)
        return "input_ids has " + std::to_string(inputs[kInputIds].nbDims) + " dimensions; expected 2";
    shape = inputs[kInputIds];
    shape.nbDims = 3;
    shape.d[2] = builder.constant(attributes_.model.vocabulary);
    return {};
}

bool Layer::supports(int32_t at, int32_t inputs, int32_t outputs, const PluginTensorDesc& tensor,
    const PluginTensorDesc& first) const {
    if (inputs != this->inputs() || outputs != this->outputs() || at < 0 || at >= inputs + outputs) return false;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    return at == kInputIds ? is_integer(tensor.type) : tensor.type == type_at(at, first.type);
}

template <typename Look>
std::string Layer::check(int32_t inputs, int32_t outputs, bool dynamic, Look look) const {
    if (inputs != this->inputs() || outputs != this->outputs())
        return "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs; expected " +
               std::to_string(this->inputs()) + " and " + std::to_string(this->outputs());
    const Tensor ids = look(kInputIds);
    if (!is_integer(ids.type)) return name(kInputIds) + " is " + type_name(ids.type) + "; expected int32 or int64";
    size_t bytes = 0;
    std::string wrong = packed_bytes(attributes_, bytes);
    if (!wrong.empty()) return wrong;
    const int64_t batch = ids.dims->nbDims == 2 ? ids.dims->d[0] : -1;
    for (int32_t at = 0; at < inputs + outputs; ++at) {
        const Tensor tensor = look(at);
        const DataType type = type_at(at, ids.type);
        const Dims right = shape_at(at, batch, static_cast<int64_t>(bytes) / kLine);
        if (tensor.type != type || !fits(*tensor.dims, right, dynamic))
            return name(at) + " is " + type_name(tensor.type) + " " + shape_of(*tensor.dims) + "; expected " +
                   type_name(type) + " " + shape_of(right) + (dynamic ? " (-1: any size)" : "");
    }
    if (batch > attributes_.rows)
        return "got " + std::to_string(batch) + " rows; expected at most " + std::to_string(attributes_.rows);
    return {};
}

std::string Layer::configure(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out,
    int32_t outputs) const {
    const std::string wrong = check(inputs, outputs, true, tensors_of(in, inputs, out));
    if (!wrong.empty()) return wrong;
    const Dims& most = in[kInputIds].max;
    if (most.nbDims == 2 && most.d[0] > attributes_.rows)
        return "the profile allows " + std::to_string(most.d[0]) + " rows; expected at most " +
               std::to_string(attributes_.rows);
    return {};
}

std::string Layer::prepare(
    const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out, int32_t outputs) {
    const std::string wrong = check(inputs, outputs, false, tensors_of(in, inputs, out));
    return wrong.empty() ? reserve() : wrong;
}

std::string Layer::reserve() {
    dijiang_step_size size{};
    const std::string wrong = status_text(dijiang_step_sizes(&attributes_.model, attributes_.rows, nullptr, &size));
    if (!wrong.empty()) return wrong;
    if (size.blocks != attributes_.blocks)
        return "the plan's weights are packed for a GPU with another number of multiprocessors; got weights for " +
               std::to_string(attributes_.blocks) + " blocks; expected " + std::to_string(size.blocks) +
               ": build the engine on this GPU";
    return sync_.reserve(size.sync);
}

std::string Layer::run(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* data,
    void* const* results, void*, cudaStream_t stream) const {
    const dijiang_step_model& m = attributes_.model;
    const std::string wrong = check(inputs(), outputs(), false, tensors_of(in, inputs(), out));
    if (!wrong.empty()) return wrong;
    if (sync_.data() == nullptr) return "there is no memory for the step's blocks to meet through: see earlier errors";
    const int64_t rows = in[kInputIds].dims.d[0];
    const size_t bytes = sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(m.num_heads) *
                         static_cast<size_t>(m.head_dim) * static_cast<size_t>(m.head_dim);
    std::vector<float*> states(static_cast<size_t>(m.layers));
    for (int32_t layer = 0; layer < m.layers; ++layer) {
        const void* past = data[kPastStates + layer];
        void* present = results[kPresentStates + layer];
        states[static_cast<size_t>(layer)] = static_cast<float*>(present);
        if (past == present) continue;
        const cudaError_t error = cudaMemcpyAsync(present, past, bytes, cudaMemcpyDeviceToDevice, stream);
        if (error != cudaSuccess) return std::string("cannot copy a state: ") + cudaGetErrorString(error);
    }
    dijiang_step_buffers buffers{};  // strides 0: dense
    buffers.packed = data[packed()];
    buffers.embedding = data[packed() + 1];
    if (has_scales()) buffers.embedding_scales = data[scales()];
    if (m.position_rows > 0) buffers.position_embedding = data[learned()];
    buffers.input_ids = data[kInputIds];
    buffers.positions = data[kPositions];
    buffers.seq_lens = data[kSeqLens];
    buffers.states = states.data();
    buffers.logits = static_cast<float*>(results[kLogits]);
    buffers.sync = sync_.data();
    buffers.sync_size = sync_.size();
    buffers.rows = static_cast<int32_t>(rows);
    buffers.integers = is_wide(in[kInputIds].type) ? DIJIANG_INT64 : DIJIANG_INT32;
    return status_text(dijiang_step(&m, &buffers, stream));
}

}  // namespace dijiang::trt::step
