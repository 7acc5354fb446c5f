// Steps of small models in one launch, for compute-sanitizer (sanitize.py).
//
// What the numbers are is the business of tests/kernels/test_step_gpu.py. Here logits and states must be finite, and
// several steps that follow each other without waiting, on a stream and in a CUDA graph, must give the same bits.
#include <cstring>
#include <memory>
#include <vector>

#include "dijiang/step.h"
#include "sanitizer_tools.h"

namespace {

using namespace sanitizer;

struct Shape {
    const char* name;
    int hidden, inner, vocabulary, heads, kv_heads, head_dim, rotary;
    int norm, activation, parallel, table_rows, position_rows;
};
const Shape kShapes[] = {
    {"neox", 64, 128, 101, 4, 4, 16, 4, DIJIANG_LAYER_NORM, DIJIANG_GELU, 1, 0, 0},
    {"llama", 96, 160, 77, 6, 3, 16, 16, DIJIANG_RMS_NORM, DIJIANG_SWIGLU, 0, 0, 0},
    {"opt", 64, 96, 50, 2, 2, 32, 0, DIJIANG_LAYER_NORM, DIJIANG_RELU, 0, 0, 20},
    {"tables", 160, 128, 60, 2, 1, 80, 20, DIJIANG_LAYER_NORM, DIJIANG_GELU_TANH, 1, 5, 0},
};
const Shape kLarge = {"neox, wide", 1024, 4096, 3001, 16, 16, 64, 16, DIJIANG_LAYER_NORM, DIJIANG_GELU, 1, 0, 0};
// One row of it with quantised weights has a kernel of its own (plugins/kernels/step/quantised/layout.h).
const Shape kWider = {"neox, wider", 1056, 1088, 101, 4, 4, 32, 8, DIJIANG_LAYER_NORM, DIJIANG_GELU, 1, 0, 0};

// Which matrices are int8, layer by layer, where all are quantised.
enum class Weights { kFloat, kInt8, kInt4, kMixed };

// A model with random weights, and the memory of its steps.
class Model {
public:
    Model(const Shape& shape, int dtype, int rows, int layers, Weights weights)
        : shape_(shape), rows_(rows), quantised_(weights != Weights::kFloat) {
        model_ = {layers, shape.hidden, shape.inner, shape.vocabulary, shape.heads, shape.kv_heads, shape.head_dim,
                  shape.rotary, dtype, shape.norm, shape.activation, shape.parallel, shape.table_rows,
                  shape.position_rows, shape.position_rows ? 2 : 0, 1e-5f, 1e-5f, quantised_, DIJIANG_SAME, DIJIANG_SAME, {}, 0};
        if (quantised_) {
            model_.head_format = weights == Weights::kInt4 ? DIJIANG_INT4 : DIJIANG_INT8;
            model_.embedding_format = weights == Weights::kInt8 ? DIJIANG_INT8 : DIJIANG_INT4;
            for (int layer = 0; layer < layers; ++layer)
                model_.int8_matrices[layer] = weights == Weights::kInt8 ? 255 : weights == Weights::kInt4 ? 0 : 0x54 >> layer;
        }
        require(dijiang_step_sizes(&model_, rows, nullptr, &size_), "dijiang_step_sizes");
        packed_ = std::make_unique<Device>(size_.packed);
        sync_ = std::make_unique<Device>(std::vector<uint8_t>(size_.sync));
        const size_t h = shape.hidden, m = shape.inner, width = size_t(shape.heads) * shape.head_dim, d = shape.head_dim;
        const size_t qkv = width + 2 * shape.kv_heads * d, terms = size_t(shape.heads) * std::max(shape.table_rows, 1);
        const bool gated = shape.activation == DIJIANG_SWIGLU, tables = shape.table_rows > 0;
        for (int layer = 0; layer < layers; ++layer) {
            std::vector<float> decay = normal(terms, 0.1f);
            for (float& x : decay) x = -std::fabs(x);
            const dijiang_step_layer tensors = {
                matrix(qkv * h), matrix(width * h), matrix(h * width), matrix(m * h), gated ? matrix(m * h) : nullptr, matrix(h * m),
                single(qkv), single(h), single(m), gated ? single(m) : nullptr, single(h), single(h), single(h), single(h),
                single(h), single(d * d), single(width), single(width), keep(decay), tables ? single(terms) : nullptr,
                tables ? single(terms) : nullptr};
            require(dijiang_step_pack_layer(&model_, layer, &tensors, packed_->as(), size_.packed, nullptr), "pack");
            const size_t kv = shape.kv_heads * d;
            const size_t counts[] = {width * h, kv * h, kv * h, width * h, h * width, m * h, gated ? m * h : 0, h * m};
            for (int i = 0; quantised_ && i < 8; ++i)
                if (counts[i] > 0) pack_quantised(layer, i, counts[i], model_.int8_matrices[layer] >> i & 1);
            start_.push_back(normal(rows * width * d, 1));
            states_.push_back(std::make_unique<Device>(start_.back()));
            pointers_.push_back(states_.back()->as<float>());
        }
        if (quantised_) pack_quantised(0, DIJIANG_STEP_HEAD, shape.vocabulary * h, model_.head_format == DIJIANG_INT8);
        const dijiang_step_ends ends = {matrix(shape.vocabulary * h), single(h), single(h), shape.rotary ? single(shape.rotary / 2) : nullptr};
        require(dijiang_step_pack_ends(&model_, &ends, packed_->as(), size_.packed, nullptr), "pack");
        require(cudaDeviceSynchronize(), "pack");
        logits_ = std::make_unique<Device>(size_t(4) * rows * shape.vocabulary);
        std::vector<int> ids, positions, lens;
        for (int row = 0; row < rows; ++row) {
            ids.push_back(7 * row + 1);
            positions.push_back(3 * row);
            lens.push_back(row != 1);
        }
        inputs_[0] = std::make_unique<Device>(ids);
        inputs_[1] = std::make_unique<Device>(positions);
        inputs_[2] = std::make_unique<Device>(lens);
        const size_t embedded = shape.vocabulary * h;
        const bool eight = model_.embedding_format == DIJIANG_INT8;
        buffers_ = {packed_->as(), quantised_ ? values(embedded, eight) : half(embedded),
                    quantised_ ? scales(embedded) : nullptr, shape.position_rows ? half(shape.position_rows * h) : nullptr,
                    inputs_[0]->as(), inputs_[1]->as(), inputs_[2]->as(), pointers_.data(), 0, logits_->as<float>(), 0,
                    sync_->as(), size_.sync, rows, DIJIANG_INT32};
    }

    bool good(int steps) {
        const auto expected = on_a_stream(steps, true);
        bool same = finite(*logits_, DIJIANG_FLOAT32);
        for (const auto& state : states_) same = finite(*state, DIJIANG_FLOAT32) && same;
        same = on_a_stream(steps, false) == expected && same;
        same = in_a_graph(steps) == expected && same;
        std::printf("%-4s %s%s dtype %d rows %d layers %d blocks %d\n", same ? "ok" : "BAD", shape_.name,
                    quantised_ ? " quantised" : "", model_.dtype, rows_,
                    model_.layers, size_.blocks);
        std::fflush(stdout);
        return same;
    }

private:
    const void* half(size_t count) {
        kept_.push_back(std::make_unique<Device>(typed(normal(count, 0.1f), model_.dtype)));
        return kept_.back()->as();
    }
    const void* matrix(size_t count) { return quantised_ ? nullptr : half(count); }
    const void* values(size_t count, bool eight) {
        std::vector<uint8_t> bytes(eight ? count : count / 2);
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng());
        kept_.push_back(std::make_unique<Device>(bytes));
        return kept_.back()->as();
    }
    const void* scales(size_t count) {
        kept_.push_back(std::make_unique<Device>(typed(normal(count / 32, 0.01f), DIJIANG_FLOAT16)));
        return kept_.back()->as();
    }
    void pack_quantised(int layer, int matrix, size_t count, bool eight) {
        require(dijiang_step_pack_matrix(&model_, layer, matrix, values(count, eight), scales(count), packed_->as(), size_.packed,
                                         nullptr), "pack");
    }
    const float* keep(const std::vector<float>& values) {
        kept_.push_back(std::make_unique<Device>(values));
        return kept_.back()->as<float>();
    }
    const float* single(size_t count) { return keep(normal(count, 0.5f)); }

    void begin() {
        for (size_t i = 0; i < states_.size(); ++i)
            require(cudaMemcpy(states_[i]->as(), start_[i].data(), states_[i]->bytes(), cudaMemcpyHostToDevice), "begin");
        require(cudaDeviceSynchronize(), "begin");
    }
    std::vector<std::vector<float>> result() {
        std::vector<std::vector<float>> all = {logits_->copy<float>()};
        for (const auto& state : states_) all.push_back(state->copy<float>());
        return all;
    }
    void enqueue(cudaStream_t stream) {
        require(dijiang_step(&model_, &buffers_, reinterpret_cast<dijiang_stream>(stream)), "dijiang_step");
    }
    std::vector<std::vector<float>> on_a_stream(int steps, bool wait) {
        begin();
        cudaStream_t stream = nullptr;
        require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
        for (int i = 0; i < steps; ++i) {
            enqueue(stream);
            if (wait) require(cudaStreamSynchronize(stream), "a step");
        }
        require(cudaStreamSynchronize(stream), "steps");
        require(cudaStreamDestroy(stream), "cudaStreamDestroy");
        return result();
    }
    std::vector<std::vector<float>> in_a_graph(int steps) {
        begin();
        cudaStream_t stream = nullptr;
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
        require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        enqueue(stream);
        require(cudaStreamEndCapture(stream, &graph), "capture");
        require(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
        for (int i = 0; i < steps; ++i) require(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
        require(cudaStreamSynchronize(stream), "graph");
        require(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
        require(cudaGraphDestroy(graph), "cudaGraphDestroy");
        require(cudaStreamDestroy(stream), "cudaStreamDestroy");
        return result();
    }

    const Shape shape_;
    const int rows_;
    const bool quantised_;
    dijiang_step_model model_{};
    dijiang_step_size size_{};
    dijiang_step_buffers buffers_{};
    std::unique_ptr<Device> packed_, sync_, logits_, inputs_[3];
    std::vector<std::unique_ptr<Device>> kept_, states_;
    std::vector<std::vector<float>> start_;
    std::vector<float*> pointers_;
};

}  // namespace

int main(int count, char** words) {
    // With "quick": few small cases, for racecheck.
    const bool quick = count > 1 && std::strcmp(words[1], "quick") == 0;
    // Another word: float or quantised, for one of the kernels alone.
    const char* const only = count > 2 ? words[2] : "";
    const bool whole = std::strcmp(only, "quantised") != 0, quantised = std::strcmp(only, "float") != 0;
    int calls = 0, bad = 0;
    for (const Shape& shape : kShapes)
        for (int dtype : {DIJIANG_FLOAT16, DIJIANG_BFLOAT16})
            for (int rows : quick ? std::vector<int>{1, 3} : std::vector<int>{1, 2, 3, 8}) {
                if (quick && (rows == 1) != (dtype == DIJIANG_FLOAT16)) continue;
                if (whole) ++calls, bad += !Model(shape, dtype, rows, 2, Weights::kFloat).good(2);
                const auto weights = rows == 1 ? Weights::kMixed : rows == 3 ? Weights::kInt4 : rows == 2 ? Weights::kInt8 : Weights::kMixed;
                if (quantised) ++calls, bad += !Model(shape, dtype, rows, 2, weights).good(2);
            }
    if (quantised) ++calls, bad += !Model(kWider, DIJIANG_FLOAT16, 1, 2, Weights::kMixed).good(2);
    if (!quick && whole) ++calls, bad += !Model(kLarge, DIJIANG_FLOAT16, 1, 2, Weights::kFloat).good(3);
    if (!quick && quantised) ++calls, bad += !Model(kLarge, DIJIANG_FLOAT16, 1, 2, Weights::kMixed).good(3);
    std::printf("%d calls, %d bad\n", calls, bad);
    return bad > 0;
}
