#include "attention/tensors.h"

#include <vector>

#include "common/texts.h"

namespace dijiang::trt::attention {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr const char* kNames[kInputsWithTables] = {"qkv", "gate", "past_state", "positions", "seq_lens",
    "proj", "norm_weight", "norm_bias", "inv_freq", "log_decay", "gain", "read_scale"};
constexpr const char* kOutputNames[kOutputs] = {"output", "present_state"};

bool to_dtype(DataType type, dijiang_dtype& dtype) {
    switch (type) {
        case DataType::kFLOAT: dtype = DIJIANG_FLOAT32; return true;
        case DataType::kHALF: dtype = DIJIANG_FLOAT16; return true;
#if NV_TENSORRT_MAJOR >= 10
        case DataType::kBF16: dtype = DIJIANG_BFLOAT16; return true;
#endif
        default: return false;
    }
}

constexpr const char* kTypesOfT =
#if NV_TENSORRT_MAJOR >= 10
    "float32, float16 or bfloat16";
#else
    "float32 or float16";
#endif

// The type of tensor `at`, T being the type of qkv.
DataType expected_type(int32_t at, int32_t inputs, DataType t) {
    if (at == kQkv || at == kGate || at == inputs + kOutput) return t;
    return at == kPositions || at == kSeqLens ? DataType::kINT32 : DataType::kFLOAT;
}

std::string tensor_name(int32_t at, int32_t inputs) {
    return at < inputs ? "input " + std::to_string(at) + " (" + kNames[at] + ")"
                       : "output " + std::to_string(at - inputs) + " (" + kOutputNames[at - inputs] + ")";
}

std::string shape_text(const std::vector<int64_t>& sizes) {
    std::string text = "[";
    for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
    return text + "]";
}

std::vector<int64_t> sizes_of(const Dims& dims) {
    return dims.nbDims > 0 ? std::vector<int64_t>(dims.d, dims.d + dims.nbDims) : std::vector<int64_t>();
}

// Reads sizes that no attribute says: each tensor that has one either tells it or has to agree.
class Sizes {
public:
    explicit Sizes(bool dynamic) : dynamic_(dynamic) {}

    // What `wanted` points to is still -1 where unknown.
    bool match(const std::vector<int64_t>& got, const std::vector<int64_t*>& wanted) const {
        if (got.size() != wanted.size()) return false;
        for (size_t i = 0; i < got.size(); ++i) {
            if (got[i] < 0) {
                if (!dynamic_ || got[i] != -1) return false;
            } else if (*wanted[i] < 0) {
                *wanted[i] = got[i];
            } else if (*wanted[i] != got[i]) {
                return false;
            }
        }
        return true;
    }

private:
    bool dynamic_;
};

}  // namespace

bool right_count(int32_t inputs, int32_t outputs) noexcept {
    return (inputs == kInputs || inputs == kInputsWithTables) && outputs == kOutputs;
}

bool supports(int32_t at, int32_t inputs, int32_t outputs, const nvinfer1::PluginTensorDesc& tensor,
    const nvinfer1::PluginTensorDesc& first) noexcept {
    if (!right_count(inputs, outputs) || at < 0 || at >= inputs + outputs) return false;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    dijiang_dtype dtype;
    return to_dtype(first.type, dtype) && tensor.type == expected_type(at, inputs, first.type);
}

std::string output_type(int32_t output, const DataType* input_types, int32_t inputs, DataType& type) {
    type = output == kOutput && inputs > 0 ? input_types[kQkv] : DataType::kFLOAT;
    if (!right_count(inputs, kOutputs)) {
        return "got " + std::to_string(inputs) + " inputs; expected 10, or 12 with trained tables";
    }
    dijiang_dtype dtype;
    if (to_dtype(input_types[kQkv], dtype)) return {};
    return tensor_name(kQkv, inputs) + " is " + type_name(input_types[kQkv]) + "; expected " + kTypesOfT;
}

std::string output_shape(
    int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count, nvinfer1::DimsExprs& shape) {
    if (!right_count(input_count, kOutputs) || output < 0 || output >= kOutputs) {
        return "got " + std::to_string(input_count) + " inputs; expected 10, or 12 with trained tables";
    }
    if (inputs[kGate].nbDims != 3 || inputs[kPastState].nbDims != 4) {
        return "gate has " + std::to_string(inputs[kGate].nbDims) + " dimensions and past_state " +
               std::to_string(inputs[kPastState].nbDims) + "; expected 3 and 4";
    }
    shape = inputs[output == kOutput ? kGate : kPastState];
    return {};
}

std::string examine(const Attributes& attributes, const Tensor* tensors, int32_t inputs, int32_t outputs,
    bool dynamic, Call& call) {
    if (!right_count(inputs, outputs)) {
        return "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
               " outputs; expected 10 inputs, or 12 with trained tables, and 2 outputs";
    }
    dijiang_dtype dtype;
    if (!to_dtype(tensors[kQkv].type, dtype)) {
        return tensor_name(kQkv, inputs) + " is " + type_name(tensors[kQkv].type) + "; expected " + kTypesOfT;
    }
    const bool tables = inputs == kInputsWithTables;
    int64_t batch = -1, length = -1, rows = -1;
    int64_t heads = attributes.num_heads, size = attributes.head_dim, width = heads * size;
    int64_t qkv_width = (heads + 2 * static_cast<int64_t>(attributes.num_kv_heads)) * size;
    int64_t frequencies = attributes.rotary_dim == 0 ? 1 : attributes.rotary_dim / 2;
    std::vector<std::vector<int64_t*>> wanted = {{&batch, &length, &qkv_width}, {&batch, &length, &width},
        {&batch, &heads, &size, &size}, {&batch}, {&batch}, {&size, &size}, {&width}, {&width},
        {&frequencies}, {&heads}};
    if (tables) {
        wanted[kLogDecay] = {&rows, &heads};
        wanted.push_back({&rows, &heads});
        wanted.push_back({&rows, &heads});
    }
    wanted.push_back({&batch, &length, &width});
    wanted.push_back({&batch, &heads, &size, &size});

    const Sizes sizes(dynamic);
    for (int32_t at = 0; at < inputs + outputs; ++at) {
        const DataType type = expected_type(at, inputs, tensors[kQkv].type);
        const std::vector<int64_t> got = sizes_of(*tensors[at].dims);
        if (sizes.match(got, wanted[at]) && tensors[at].type == type) continue;
        std::vector<int64_t> right;
        for (const int64_t* value : wanted[at]) right.push_back(*value);
        return tensor_name(at, inputs) + " is " + type_name(tensors[at].type) + " " + shape_text(got) +
               "; expected " + type_name(type) + " " + shape_text(right) + (dynamic ? " (-1: any size)" : "");
    }
    if (batch > INT32_MAX || length > INT32_MAX || rows > INT32_MAX) {
        return tensor_name(kQkv, inputs) + " is larger than 2^31 - 1 rows or tokens";
    }
    if (tables && rows == 0) return tensor_name(kLogDecay, inputs) + " has no rows; expected one or more";
    call.geometry = geometry_of(attributes, dtype, tables && rows > 0 ? static_cast<int32_t>(rows) : 0);
    call.batch = static_cast<int32_t>(batch);
    call.length = static_cast<int32_t>(length);
    return {};
}

}  // namespace dijiang::trt::attention
