// Calls dijiang_linear in every way that it can be cut, alone and in chains, for compute-sanitizer (sanitize.py).
//
// What the numbers are is the business of tests/kernels/test_linear_gpu.py. Here outputs must be finite, and a chain of
// calls that follow each other without waiting, on a stream and in a CUDA graph, must give the bits of the same
// chain with a wait after each call: a kernel begins while the one before it still runs (programmatic dependent
// launch), and reads what that one writes.
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dijiang/linear.h"
#include "sanitizer_tools.h"

namespace {

using namespace sanitizer;

constexpr int kMostText = 256;

// How the weights of all calls are stored: those of T, of one format, or of two in turn.
enum class Weights { kSame, kInt8, kInt4, kBoth } weights = Weights::kSame;

dijiang_weight_format format_of(int term) {
    switch (weights) {
        case Weights::kInt8: return DIJIANG_INT8;
        case Weights::kInt4: return DIJIANG_INT4;
        case Weights::kBoth: return term % 2 == 0 ? DIJIANG_INT4 : DIJIANG_INT8;
        default: return DIJIANG_SAME;
    }
}

// A packed weight (linear.h): any integers, and scales that keep sums near one.
std::vector<uint8_t> packed(dijiang_weight_format format, int width, int inner) {
    const bool four = format == DIJIANG_INT4;
    const int chunk = four ? 128 : 64, scales = chunk / 4;
    const size_t chunks = size_t((width + 7) / 8) * ((inner + chunk - 1) / chunk);
    std::vector<uint8_t> bytes;
    for (size_t i = 0; i < chunks; ++i) {
        for (int b = 0; b < 512; ++b) bytes.push_back(uint8_t(rng()));
        const auto some = typed(normal(scales, 1 / std::sqrt(float(inner)) / (four ? 5 : 74)), DIJIANG_FLOAT16);
        bytes.insert(bytes.end(), some.begin(), some.end());
    }
    return bytes;
}

struct Output {
    std::vector<int> inner;  // of each term
    int width;
    dijiang_activation activation = DIJIANG_IDENTITY;
    dijiang_norm norm = DIJIANG_NORM_NONE;
    bool bias = true, residual = false;
};

// A call and the memory that it works on.
class Call {
public:
    Call(int dtype, int rows, bool constant, const std::vector<Output>& outputs) {
        call_.dtype = dtype;
        call_.rows = rows;
        call_.constant_weights = constant;
        for (const Output& output : outputs) add(output);
        require(dijiang_linear_workspace_size(&call_, &workspace_size_), "workspace");
        // As it was allocated, so that initcheck finds what is read before it is written.
        if (workspace_size_ > 0) require(cudaMalloc(&workspace_, workspace_size_), "cudaMalloc");
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() { cudaFree(workspace_); }

    // Of many rows with the workspace, whatever else the process has to do them with.
    void enqueue(cudaStream_t stream) const {
        const auto on = reinterpret_cast<dijiang_stream>(stream);
        require(dijiang_linear_with_workspace(&call_, workspace_, workspace_size_, on), "dijiang_linear_with_workspace");
    }

    const dijiang_linear_call& operator*() const { return call_; }
    const dijiang_linear_call* operator->() const { return &call_; }
    std::string plan() const {
        char text[kMostText];
        require(dijiang_linear_plan(&call_, nullptr, text, sizeof text), "plan");
        return text;
    }
    bool good() const {
        bool all = true;
        for (const auto& output : outputs_) all = all && finite(*output, call_.dtype);
        return all;
    }

private:
    void add(const Output& output) {
        const int o = call_.output_count++, rows = call_.rows;
        const bool one_input = output.activation == DIJIANG_SWIGLU || output.norm != DIJIANG_NORM_NONE;
        const void* input = nullptr;
        for (int inner : output.inner) {
            dijiang_linear_term& term = call_.terms[call_.term_count++];
            if (input == nullptr || !one_input) input = half(size_t(rows) * inner, 1);
            term.input = input;
            const dijiang_weight_format format = format_of(call_.term_count - 1);
            call_.weight_formats |= uint32_t(format) << (8 * (call_.term_count - 1));
            term.weight = format == DIJIANG_SAME ? half(size_t(output.width) * inner, 1 / std::sqrt(float(inner)))
                                                 : bytes(packed(format, output.width, inner));
            term.bias = output.bias ? single(output.width) : nullptr;
            term.inner = inner;
            term.output = o;
        }
        const bool norm = output.norm != DIJIANG_NORM_NONE;
        dijiang_linear_output& out = call_.outputs[o];
        outputs_.push_back(std::make_unique<Device>(size_t(2) * rows * output.width));
        out.output = outputs_.back()->as();
        out.residual = output.residual ? half(size_t(rows) * output.width, 1) : nullptr;
        out.norm_weight = norm ? single(output.inner[0]) : nullptr;
        out.norm_bias = output.norm == DIJIANG_LAYER_NORM ? single(output.inner[0]) : nullptr;
        out.width = output.width;
        out.activation = output.activation;
        out.norm = output.norm;
        out.epsilon = norm ? 1e-5f : 0.0f;
    }
    const void* half(size_t count, float scale) {
        kept_.push_back(std::make_unique<Device>(typed(normal(count, scale), call_.dtype)));
        return kept_.back()->as();
    }
    const void* bytes(const std::vector<uint8_t>& values) {
        kept_.push_back(std::make_unique<Device>(values));
        return kept_.back()->as();
    }
    const float* single(size_t count) {
        kept_.push_back(std::make_unique<Device>(normal(count, 1)));
        return kept_.back()->as<float>();
    }

    dijiang_linear_call call_{};
    std::vector<std::unique_ptr<Device>> kept_, outputs_;
    void* workspace_ = nullptr;
    size_t workspace_size_ = 0;
};

class Stream {
public:
    Stream() { require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(stream_); }

    cudaStream_t get() const { return stream_; }
    void enqueue(const dijiang_linear_call& call) const {
        require(dijiang_linear(&call, reinterpret_cast<dijiang_stream>(stream_)), "dijiang_linear");
    }
    void wait(const char* what) const { require(cudaStreamSynchronize(stream_), what); }

private:
    cudaStream_t stream_ = nullptr;
};

bool tell(bool good, const char* what, const Call& call) {
    std::printf("%-4s %s dtype %d rows %-2d outputs %d terms %d constant %d | %s\n", good ? "ok" : "BAD", what,
                call->dtype, call->rows, call->output_count, call->term_count, call->constant_weights,
                call.plan().c_str());
    std::fflush(stdout);
    return good;
}

bool alone(int dtype, int rows, bool constant, const std::vector<Output>& outputs) {
    const Call call(dtype, rows, constant, outputs);
    const Stream stream;
    call.enqueue(stream.get());
    stream.enqueue(*call);  // without a workspace, many rows go another way
    stream.wait("alone");
    return tell(call.good(), "alone", call);
}

// x -> gelu(norm(x) up^T) -> x + that down^T, again and again. Two buffers take turns: each call reads what the one
// before wrote, and overwrites what the one before that read.
class Chain {
public:
    Chain(int dtype, int rows, int hidden, int inner, int depth, bool constant)
        : x_(typed(normal(size_t(rows) * hidden, 1), dtype)), even_(x_.bytes()), odd_(x_.bytes()) {
        for (int i = 0; i < depth; ++i) {
            up_.push_back(std::make_unique<Call>(
                dtype, rows, constant, std::vector<Output>{{{hidden}, inner, DIJIANG_GELU, DIJIANG_RMS_NORM, false}}));
            down_.push_back(std::make_unique<Call>(
                dtype, rows, constant, std::vector<Output>{{{inner}, hidden, DIJIANG_IDENTITY, DIJIANG_NORM_NONE, false}}));
        }
    }

    // Bit for bit the same, however it is enqueued?
    bool same() const {
        const auto expected = on_a_stream(true);
        bool good = finite(result(), up_[0]->operator->()->dtype);
        for (int repeat = 0; repeat < 3; ++repeat) good = on_a_stream(false) == expected && good;
        good = in_a_graph(3) == expected && good;
        return tell(good, "chain", *up_.back());
    }

private:
    const Device& result() const { return up_.size() % 2 == 0 ? even_ : odd_; }

    void start(const Stream& stream) const {
        require(cudaMemcpyAsync(even_.as(), x_.as(), x_.bytes(), cudaMemcpyDeviceToDevice, stream.get()), "start");
    }
    void enqueue(const Stream& stream, bool wait) const {
        for (size_t i = 0; i < up_.size(); ++i) {
            const Device& from = i % 2 == 0 ? even_ : odd_;
            const Device& to = i % 2 == 0 ? odd_ : even_;
            dijiang_linear_call up = **up_[i], down = **down_[i];
            up.terms[0].input = from.as();
            up.outputs[0].output = up_[0]->operator->()->outputs[0].output;  // one buffer for all
            down.terms[0].input = up.outputs[0].output;
            down.outputs[0].residual = from.as();
            down.outputs[0].output = to.as();
            for (const auto* call : {&up, &down}) {
                stream.enqueue(*call);
                if (wait) stream.wait("chain");
            }
        }
    }
    std::vector<uint8_t> on_a_stream(bool wait) const {
        const Stream stream;
        start(stream);
        enqueue(stream, wait);
        stream.wait("chain");
        return result().copy<uint8_t>();
    }
    std::vector<uint8_t> in_a_graph(int replays) const {
        const Stream stream;
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        require(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "capture");
        enqueue(stream, false);
        require(cudaStreamEndCapture(stream.get(), &graph), "capture");
        require(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
        for (int i = 0; i < replays; ++i) {
            start(stream);
            require(cudaGraphLaunch(executable, stream.get()), "cudaGraphLaunch");
        }
        stream.wait("graph");
        require(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
        require(cudaGraphDestroy(graph), "cudaGraphDestroy");
        return result().copy<uint8_t>();
    }

    const Device x_, even_, odd_;
    std::vector<std::unique_ptr<Call>> up_, down_;
};

// Sizes that divide nothing, every norm and activation, one and two terms, several outputs.
std::vector<std::vector<Output>> small_calls() {
    std::vector<std::vector<Output>> calls;
    for (int width : {1, 7, 8, 9, 131})
        for (int inner : {32, 96, 160, 1024}) calls.push_back({{{inner}, width}});
    for (dijiang_norm norm : {DIJIANG_NORM_NONE, DIJIANG_LAYER_NORM, DIJIANG_RMS_NORM})
        for (int a = DIJIANG_IDENTITY; a <= DIJIANG_SILU; ++a)
            calls.push_back({{{544}, 75, static_cast<dijiang_activation>(a), norm, a % 2 == 0, a % 2 == 1}});
    for (dijiang_norm norm : {DIJIANG_NORM_NONE, DIJIANG_LAYER_NORM, DIJIANG_RMS_NORM}) {
        calls.push_back({{{288, 288}, 41, DIJIANG_SWIGLU, norm, norm != DIJIANG_LAYER_NORM, true}});
        calls.push_back({{{288, 288}, 41, DIJIANG_IDENTITY, norm, true, false}});
    }
    calls.push_back({{{32, 2080}, 67, DIJIANG_IDENTITY, DIJIANG_NORM_NONE, true, true}});
    calls.push_back({{{2080, 32}, 67, DIJIANG_GELU, DIJIANG_NORM_NONE, false, true}});
    calls.push_back({{{256}, 384, DIJIANG_IDENTITY, DIJIANG_LAYER_NORM},
                     {{256}, 129, DIJIANG_SILU, DIJIANG_NORM_NONE, false},
                     {{256}, 512, DIJIANG_GELU, DIJIANG_LAYER_NORM}});
    calls.push_back({{{96, 640}, 130, DIJIANG_IDENTITY, DIJIANG_NORM_NONE, true, true},
                     {{64, 64}, 9, DIJIANG_SWIGLU, DIJIANG_RMS_NORM}});
    calls.push_back({{{32}, 3}, {{64}, 5}, {{96}, 11}, {{128}, 17}});
    return calls;
}

// Products of the 410M shape, a width that makes several rounds, and inputs that take most of the shared memory.
std::vector<std::vector<Output>> large_calls() {
    return {{{{1024}, 3072, DIJIANG_IDENTITY, DIJIANG_LAYER_NORM},
             {{1024}, 1024, DIJIANG_IDENTITY, DIJIANG_LAYER_NORM, false},
             {{1024}, 4096, DIJIANG_GELU, DIJIANG_LAYER_NORM}},
            {{{1024, 4096}, 1024, DIJIANG_IDENTITY, DIJIANG_NORM_NONE, true, true}},
            {{{128}, 50304, DIJIANG_IDENTITY, DIJIANG_LAYER_NORM, false}},
            {{{2560, 10240}, 264, DIJIANG_IDENTITY, DIJIANG_NORM_NONE, true, true}},
            {{{11008}, 515}}};
}

}  // namespace

int main(int count, char** words) {
    // With "quick": few small cases, for racecheck, which takes 1000 times longer. With "int8", "int4" or "both":
    // quantised weights.
    bool quick = false;
    for (int i = 1; i < count; ++i) {
        quick = quick || std::strcmp(words[i], "quick") == 0;
        if (std::strcmp(words[i], "int8") == 0) weights = Weights::kInt8;
        if (std::strcmp(words[i], "int4") == 0) weights = Weights::kInt4;
        if (std::strcmp(words[i], "both") == 0) weights = Weights::kBoth;
    }
    const std::vector<int> rows = quick ? std::vector<int>{1, 3, 8, 16, 131}
                                        : std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 131};
    int calls = 0, bad = 0;
    const auto counted = [&](bool good) { ++calls, bad += !good; };
    const auto small = small_calls();
    for (size_t i = 0; i < small.size(); ++i)
        for (int dtype : {DIJIANG_FLOAT16, DIJIANG_BFLOAT16})
            for (size_t r = 0; r < rows.size(); ++r) {
                // All rows with some calls, some rows with all; both kinds of weights with each.
                if (i % (quick ? 3 : 4) != r % (quick ? 3 : 4)) continue;
                counted(alone(dtype, rows[r], (i / 4 + r + dtype) % 2 == 0, small[i]));
            }
    for (const auto& outputs : large_calls())
        for (int n : {1, 4, 8}) {
            if (!quick) counted(alone(n == 4 ? DIJIANG_BFLOAT16 : DIJIANG_FLOAT16, n, n != 8, outputs));
        }
    for (int dtype : {DIJIANG_FLOAT16, DIJIANG_BFLOAT16})
        for (int n : {1, 3, 8, 16})
            for (const auto& [hidden, inner] : {std::pair{96, 352}, std::pair{512, 2048}}) {
                if (quick && (hidden > 96 || n == 3)) continue;
                counted(Chain(dtype, n, hidden, inner, hidden > 96 ? 6 : quick ? 3 : 13, n != 3).same());
            }
    std::printf("%d calls, %d bad\n", calls, bad);
    return bad > 0;
}
