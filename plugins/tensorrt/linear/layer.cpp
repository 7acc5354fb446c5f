#include "linear/layer.h"

#include "common/texts.h"

namespace dijiang::trt::linear {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

const char* const kKinds[] = {"input", "weight", "scale", "bias", "norm_weight", "norm_bias", "residual", "output"};

bool of_term(Kind kind) {
    return kind == Kind::input || kind == Kind::weight || kind == Kind::scale || kind == Kind::bias;
}

// A size that one tensor says and the others must repeat; -1 while it is unknown.
bool agree(int64_t got, int64_t& size, bool dynamic) {
    if (got == -1 && dynamic) return true;
    if (got < 0) return false;
    if (size < 0) size = got;
    return got == size;
}

}  // namespace

Layer::Layer(const Attributes& attributes) : LayerBase(attributes) {
    const auto add = [this](Kind kind, int32_t index) { places_[inputs_++] = {kind, index}; };
    for (int32_t t = 0; t < attributes.terms; ++t) {
        add(Kind::input, t);
        add(Kind::weight, t);
        if (is_stored(attributes.term_weight_format[t])) add(Kind::scale, t);
        if (attributes.term_bias[t] != 0) add(Kind::bias, t);
    }
    for (int32_t o = 0; o < attributes.outputs; ++o) {
        if (attributes.output_norm[o] != DIJIANG_NORM_NONE) add(Kind::norm_weight, o);
        if (attributes.output_norm_bias[o] != 0) add(Kind::norm_bias, o);
        if (attributes.output_residual[o] != 0) add(Kind::residual, o);
    }
    for (int32_t o = 0; o < attributes.outputs; ++o) places_[inputs_ + o] = {Kind::output, o};
}

int32_t Layer::input_of(int32_t output) const {
    for (int32_t at = 0; at < inputs_; ++at)
        if (places_[at].kind == Kind::input && attributes_.term_output[places_[at].index] == output) return at;
    return 0;
}

int32_t Layer::weight_of(int32_t output) const { return input_of(output) + 1; }

DataType Layer::type() const {
#if NV_TENSORRT_MAJOR >= 10
    if (attributes_.dtype == DIJIANG_BFLOAT16) return DataType::kBF16;
#endif
    return DataType::kHALF;
}

DataType Layer::type_at(int32_t at) const {
    switch (places_[at].kind) {
        case Kind::weight: return DataType::kINT32;
        case Kind::scale: return DataType::kHALF;
        case Kind::bias:
        case Kind::norm_weight:
        case Kind::norm_bias: return DataType::kFLOAT;
        default: return type();
    }
}

std::string Layer::output_shape(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t input_count,
    nvinfer1::IExprBuilder& builder, nvinfer1::DimsExprs& shape) const {
    if (output < 0 || output >= attributes_.outputs || input_count != inputs_)
        return "got " + std::to_string(input_count) + " inputs; expected " + std::to_string(inputs_);
    const nvinfer1::DimsExprs &input = inputs[input_of(output)], &weight = inputs[weight_of(output)];
    if (input.nbDims != 3 || weight.nbDims < 2)
        return "the input of output " + std::to_string(output) + " has " + std::to_string(input.nbDims) +
               " dimensions and its weight " + std::to_string(weight.nbDims) + "; expected 3 and 2 or 3";
    shape = input;
    const int32_t width = attributes_.output_width[output];
    shape.d[2] = width > 0 ? builder.constant(width) : weight.d[0];
    return {};
}

bool Layer::supports(int32_t at, int32_t inputs, int32_t outputs, const PluginTensorDesc& tensor,
    const PluginTensorDesc&) const {
    return inputs == inputs_ && outputs == attributes_.outputs && at >= 0 && at < inputs + outputs &&
           tensor.format == nvinfer1::TensorFormat::kLINEAR && tensor.type == type_at(at);
}

std::string Layer::name(int32_t at) const {
    const Place it = places_[at];
    const bool output = at >= inputs_;
    return std::string(output ? "output " : "input ") + std::to_string(output ? at - inputs_ : at) + " (" +
           kKinds[static_cast<int>(it.kind)] + " of " +
           (of_term(it.kind) ? "term " : "output ") +
           std::to_string(it.index) + ")";
}

bool Layer::agree_weight(
    int32_t term, const Dims& dims, int64_t& n, int64_t& k, bool dynamic, std::string& right) const {
    const int32_t format = attributes_.term_weight_format[term];
    const auto parts = [](int64_t size, int64_t by) { return size < 0 ? -1 : (size + by - 1) / by; };
    if (format == DIJIANG_SAME) {
        int64_t half = k < 0 ? -1 : k / 2;
        const bool good = dims.nbDims == 2 && agree(dims.d[0], n, dynamic) && agree(dims.d[1], half, dynamic);
        if (k < 0 && half > 0) k = 2 * half;
        right = "[" + std::to_string(n) + ", " + std::to_string(k < 0 ? -1 : k / 2) + "]";
        return good;
    }
    const bool stored = is_stored(format), four = format == DIJIANG_INT4 || format == kStoredInt4;
    const int64_t width = attributes_.output_width[attributes_.term_output[term]];
    if (!stored && !agree(width, n, false)) return false;
    int64_t rows = stored ? n : parts(n, 8), along = parts(k, stored ? 32 : four ? 128 : 64);
    const int64_t words = stored ? (four ? 4 : 8) : four ? 144 : 136;
    const bool good = dims.nbDims == 3 && agree(dims.d[0], rows, dynamic) && agree(dims.d[1], along, dynamic) &&
                      dims.d[2] == words;
    if (stored && n < 0) n = rows;
    if (stored && k < 0 && along > 0) k = 32 * along;
    right = "[" + std::to_string(rows) + ", " + std::to_string(along) + ", " + std::to_string(words) + "]";
    return good;
}

template <typename Look>
std::string Layer::examine(int32_t inputs, int32_t outputs, bool dynamic, Look look, dijiang_linear_call& call) const {
    if (inputs != inputs_ || outputs != attributes_.outputs)
        return "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs; expected " +
               std::to_string(inputs_) + " and " + std::to_string(attributes_.outputs);
    int64_t batch = -1, length = -1, inner[kMostTerms], width[kMostOutputs];
    for (int64_t& size : inner) size = -1;
    for (int64_t& size : width) size = -1;
    // Twice, since what comes first may only be known from what comes later.
    for (int32_t round = 0; round < 2; ++round)
        for (int32_t at = 0; at < inputs + outputs; ++at) {
            const Tensor tensor = look(at);
            const Place it = places_[at];
            int64_t& n = width[of_term(it.kind) ? attributes_.term_output[it.index] : it.index];
            int64_t& k = inner[of_term(it.kind) ? it.index : places_[input_of(it.index)].index];
            const Dims& dims = *tensor.dims;
            bool good = tensor.type == type_at(at);
            std::string right;
            switch (it.kind) {
                case Kind::weight: good = agree_weight(it.index, dims, n, k, dynamic, right) && good; break;
                case Kind::scale: {
                    int64_t blocks = k < 0 ? -1 : k / 32;
                    good = good && dims.nbDims == 2 && agree(dims.d[0], n, dynamic) && agree(dims.d[1], blocks, dynamic);
                    right = "[" + std::to_string(n) + ", " + std::to_string(blocks) + "]";
                    break;
                }
                case Kind::bias:
                case Kind::norm_weight:
                case Kind::norm_bias: {
                    int64_t& size = it.kind == Kind::bias ? n : k;
                    good = good && dims.nbDims == 1 && agree(dims.d[0], size, dynamic);
                    right = "[" + std::to_string(size) + "]";
                    break;
                }
                default: {
                    int64_t& size = it.kind == Kind::input ? k : n;
                    good = good && dims.nbDims == 3 && agree(dims.d[0], batch, dynamic) &&
                           agree(dims.d[1], length, dynamic) && agree(dims.d[2], size, dynamic);
                    right = "[" + std::to_string(batch) + ", " + std::to_string(length) + ", " + std::to_string(size) +
                            "]";
                }
            }
            if (!good)
                return name(at) + " is " + type_name(tensor.type) + " " + shape_of(dims) + "; expected " +
                       type_name(type_at(at)) + " " + right + (dynamic ? " (-1: any size)" : "");
        }
    for (int32_t t = 0; t < attributes_.terms; ++t)
        if (is_stored(attributes_.term_weight_format[t]))
            return "the weights of term " + std::to_string(t) +
                   " are as bundles store them; expected packed ones: `dijiang-export build-engine` packs them";
    call = call_of(attributes_);
    const bool known = batch >= 0 && length >= 0;
    if (known && length > 0 && batch > INT32_MAX / length)
        return "got " + std::to_string(batch) + " x " + std::to_string(length) + " rows; expected fewer than 2^31";
    const int64_t rows = known ? batch * length : 1;
    call.rows = static_cast<int32_t>(rows);
    for (int32_t t = 0; t < attributes_.terms; ++t)
        call.terms[t].inner = inner[t] < 0 ? DIJIANG_LINEAR_INNER_STEP : static_cast<int32_t>(inner[t]);
    for (int32_t o = 0; o < attributes_.outputs; ++o)
        call.outputs[o].width = width[o] < 0 ? 1 : static_cast<int32_t>(width[o]);
    return {};
}

std::string Layer::configure(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out,
    int32_t outputs) const {
    dijiang_linear_call call;
    std::string wrong = examine(inputs, outputs, true, tensors_of(in, inputs, out), call);
    if (!wrong.empty()) return wrong;
    const dijiang_device device = reference_device();
    return status_text(dijiang_linear_plan(&call, &device, nullptr, 0));
}

std::string Layer::prepare(
    const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out, int32_t outputs) const {
    dijiang_linear_call call;
    std::string wrong = examine(inputs, outputs, false, tensors_of(in, inputs, out), call);
    if (!wrong.empty()) return wrong;
    return status_text(dijiang_linear_plan(&call, nullptr, nullptr, 0));
}

template <typename Look>
std::string Layer::workspace(int32_t inputs, int32_t outputs, Look look, size_t& bytes) const {
    bytes = 0;
    dijiang_linear_call call;
    std::string wrong = examine(inputs, outputs, false, look, call);
    if (!wrong.empty()) return wrong;
    wrong = status_text(dijiang_linear_workspace_size(&call, &bytes));
    if (bytes > 0) bytes += kAlignment;
    return wrong;
}

std::string Layer::workspace(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out, int32_t outputs,
    size_t& bytes) const {
    return workspace(inputs, outputs, tensors_of(in, inputs, out), bytes);
}

std::string Layer::workspace(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out,
    int32_t outputs, size_t& bytes) const {
    return workspace(inputs, outputs, largest_of(in, inputs, out), bytes);
}

std::string Layer::run(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* data,
    void* const* results, void* workspace, cudaStream_t stream) const {
    dijiang_linear_call call;
    std::string wrong = examine(inputs_, attributes_.outputs, false, tensors_of(in, inputs_, out), call);
    if (!wrong.empty()) return wrong;
    for (int32_t at = 0; at < inputs_; ++at) {
        const Place it = places_[at];
        const auto* numbers = static_cast<const float*>(data[at]);
        switch (it.kind) {
            case Kind::input: call.terms[it.index].input = data[at]; break;
            case Kind::weight: call.terms[it.index].weight = data[at]; break;
            case Kind::scale: break;  // stored weights are never run: configure and the call refuse them
            case Kind::bias: call.terms[it.index].bias = numbers; break;
            case Kind::norm_weight: call.outputs[it.index].norm_weight = numbers; break;
            case Kind::norm_bias: call.outputs[it.index].norm_bias = numbers; break;
            default: call.outputs[it.index].residual = data[at];
        }
    }
    for (int32_t o = 0; o < attributes_.outputs; ++o) call.outputs[o].output = results[o];
    size_t bytes = 0;
    if (attributes_.workspace == kReserved && workspace != nullptr) {
        wrong = status_text(dijiang_linear_workspace_size(&call, &bytes));
        if (!wrong.empty()) return wrong;
        const auto address = reinterpret_cast<uintptr_t>(workspace);
        workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }
    return status_text(dijiang_linear_with_workspace(&call, bytes == 0 ? nullptr : workspace, bytes, stream));
}

}  // namespace dijiang::trt::linear
