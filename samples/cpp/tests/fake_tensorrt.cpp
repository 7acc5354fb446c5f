// tensorrt.h around a model of a few lines. A plan is a text, such as
//   fake-plan layers=2 vocabulary=97 profiles=2 longest=8 shortest=1 int64=1 all=0 nan_at=-1 tensors=8
// A layer's state holds a hash of the tokens and their number. The next token is a hash of the states.
#include "../tensorrt.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <sstream>

#include "../errors.h"
#include "fake_cuda.h"

namespace dijiang {
namespace {

using Facts = std::map<std::string, int64_t>;

struct Bound {
    int64_t length = 0;
    const void *ids = nullptr, *positions = nullptr, *seq_lens = nullptr;
    float* logits = nullptr;
    std::vector<float*> states;
};

int64_t integer(const void* from, int64_t index, bool wide) {
    return wide ? static_cast<const int64_t*>(from)[index] : static_cast<const int32_t*>(from)[index];
}

void put_logits(float* logits, const Facts& facts, const std::vector<float*>& states, int64_t position) {
    const int64_t vocabulary = facts.at("vocabulary");
    int64_t best = 0;
    bool good = position < facts.at("nan_at") || facts.at("nan_at") < 0;
    for (size_t layer = 0; layer < states.size(); ++layer) {
        best += static_cast<int64_t>(states[layer][0]) * static_cast<int64_t>(2 * layer + 1);
        good = good && static_cast<int64_t>(states[layer][1]) == position + 1;  // nothing lost, nothing twice
    }
    for (int64_t id = 0; id < vocabulary; ++id) {
        logits[id] = good ? -static_cast<float>(std::abs(id - best % vocabulary))
                          : std::numeric_limits<float>::quiet_NaN();
    }
}

void run(const Facts& facts, const Bound& b) {
    const bool wide = facts.at("int64") != 0, all = facts.at("all") != 0;
    const int64_t count = integer(b.seq_lens, 0, wide), start = integer(b.positions, 0, wide);
    const int64_t vocabulary = facts.at("vocabulary");
    if (count < 0 || count > b.length) std::abort();
    std::fill_n(b.logits, vocabulary * (all ? b.length : 1),
                1e30F);  // of no valid token: finite, unspecified
    for (int64_t t = 0; t < count; ++t) {
        const int64_t token = integer(b.ids, t, wide);
        if (token < 0 || token >= vocabulary) std::abort();
        for (size_t layer = 0; layer < b.states.size(); ++layer) {
            float* state = b.states[layer];
            const double mixed = state[0] * 31.0 + 7.0 * token + start + t + 1 + layer;
            state[0] = static_cast<float>(std::fmod(mixed, 9973));
            state[1] += 1;
        }
        if (all || t == count - 1)
            put_logits(b.logits + (all ? t * vocabulary : 0), facts, b.states, start + t);
    }
}

class FakeContext : public Context {
public:
    FakeContext(Facts facts, int profile, void* activations)
        : facts_(std::move(facts)), profile_(profile), activations_(activations) {}

    void shape(const std::string& input, const std::vector<int64_t>& dims) override { shapes_[input] = dims; }

    void bind(const std::string& tensor, void* address) override {
        if (reinterpret_cast<uintptr_t>(address) % 256 != 0) throw Failure("misaligned: " + tensor);
        bound_[tensor] = address;
    }

    void enqueue(cudaStream_t stream) override {
        if (fake_capturing(stream) && !ran_) throw Failure("captured without an ordinary run before");
        if (activations_ == nullptr) throw Failure("no memory for activations");
        ran_ = true;
        Bound b;
        const std::vector<int64_t>& ids = shapes_.at("input_ids");
        b.length = ids.at(1);
        const bool steps = profile_ == 1 || facts_.at("longest") == 1;
        const int64_t least = steps ? 1 : facts_.at("shortest"), most = steps ? 1 : facts_.at("longest");
        const std::vector<int64_t> one{1};
        if (ids.at(0) != 1 || b.length < least || b.length > most || shapes_.at("positions") != one ||
            shapes_.at("seq_lens") != one) {
            throw Failure("a shape is outside of the profile");
        }
        b.ids = bound_.at("input_ids");
        b.positions = bound_.at("positions");
        b.seq_lens = bound_.at("seq_lens");
        b.logits = static_cast<float*>(bound_.at("logits"));
        for (int64_t layer = 0; layer < facts_.at("layers"); ++layer) {
            const std::string past = "past_key_values." + std::to_string(layer) + ".recurrent_state";
            void* state = bound_.at(past);
            if (bound_.at("present." + std::to_string(layer) + ".recurrent_state") != state ||
                shapes_.at(past) != std::vector<int64_t>{1, 1, 2, 2}) {
                throw Failure("past and present are not one buffer of the right shape");
            }
            b.states.push_back(static_cast<float*>(state));
        }
        fake_enqueue(stream, [facts = facts_, b] { run(facts, b); });
    }

private:
    Facts facts_;
    int profile_;
    void* activations_;
    bool ran_ = false;
    std::map<std::string, std::vector<int64_t>> shapes_;
    std::map<std::string, void*> bound_;
};

class FakePlan : public Plan {
public:
    explicit FakePlan(Facts facts) : facts_(std::move(facts)) {
        const Type integers = facts_.at("int64") != 0 ? Type::int64 : Type::int32;
        tensors_ = {{"input_ids", true, integers, {-1, -1}},
                    {"positions", true, integers, {-1}},
                    {"seq_lens", true, integers, {-1}},
                    {"logits", false, Type::float32, {-1, -1, facts_.at("vocabulary")}}};
        for (int64_t layer = 0; layer < facts_.at("layers"); ++layer) {
            const std::string end = "." + std::to_string(layer) + ".recurrent_state";
            tensors_.push_back({"past_key_values" + end, true, Type::float32, {-1, 1, 2, 2}});
            tensors_.push_back({"present" + end, false, Type::float32, {-1, 1, 2, 2}});
        }
        if (facts_.at("foreign") != 0) tensors_[0].name = "tokens";
    }

    const std::vector<Tensor>& tensors() const override { return tensors_; }
    int profiles() const override { return static_cast<int>(facts_.at("profiles")); }

    std::vector<int64_t> smallest(const std::string& input, int profile) const override {
        return extreme(input, profile == 1 ? 1 : facts_.at("shortest"), facts_.at("least_batch"));
    }
    std::vector<int64_t> largest(const std::string& input, int profile) const override {
        return extreme(input, profile == 1 ? 1 : facts_.at("longest"), 4);
    }

    size_t activation_bytes() const override { return 1000; }
    std::unique_ptr<Context> context(int profile, void* activations, size_t bytes, cudaStream_t) override {
        if (bytes < 1000) throw Failure("too little memory for activations");
        return std::make_unique<FakeContext>(facts_, profile, activations);
    }

private:
    static std::vector<int64_t> extreme(const std::string& input, int64_t length, int64_t batch) {
        return input == "input_ids" ? std::vector<int64_t>{batch, length} : std::vector<int64_t>{batch};
    }

    Facts facts_;
    std::vector<Tensor> tensors_;
};

class FakeTensorRT : public TensorRT {
public:
    std::unique_ptr<Plan> load(const void* plan, size_t size, const std::string& name) override {
        std::istringstream text(std::string(static_cast<const char*>(plan), size));
        std::string word;
        if (!(text >> word) || word != "fake-plan") throw Failure("TensorRT cannot load " + name);
        Facts facts{{"profiles", 2}, {"longest", 8}, {"shortest", 1}, {"int64", 1},
                    {"all", 0},      {"nan_at", -1}, {"foreign", 0},  {"least_batch", 1}};
        while (text >> word) {
            const size_t equals = word.find('=');
            facts[word.substr(0, equals)] = std::stoll(word.substr(equals + 1));
        }
        return std::make_unique<FakePlan>(std::move(facts));
    }
};

}  // namespace

std::string tensorrt_version() { return "10.3.0"; }
const char* plugin_entry_point() { return "getCreators"; }
std::unique_ptr<TensorRT> open_tensorrt(bool) { return std::make_unique<FakeTensorRT>(); }

}  // namespace dijiang
