#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>

#include "errors.h"

namespace dijiang {
namespace {

constexpr const char* kRebuild = "build the engine again with this version of dijiang-export";
constexpr size_t kMostLogitsBytes = 64 << 20;  // of one prefill call, for engines with logits of all tokens

std::string past_name(int64_t layer) {
    return "past_key_values." + std::to_string(layer) + ".recurrent_state";
}
std::string present_name(int64_t layer) { return "present." + std::to_string(layer) + ".recurrent_state"; }

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

const Tensor& find(const Plan& plan, const std::string& tensor, bool input, const std::string& name) {
    for (const Tensor& found : plan.tensors()) {
        if (found.name == tensor && found.input == input) return found;
    }
    throw Failure(
        name + " is not a plan of a DiJiang model: it has no " + (input ? "input " : "output ") + tensor,
        kRebuild);
}

}  // namespace

Decoder::Slot::Slot() {
    void* memory = nullptr;
    check(cudaMallocHost(&memory, sizeof(Result)), "allocating page-locked memory");
    result = static_cast<Result*>(memory);
}

Decoder::Slot::~Slot() { cudaFreeHost(result); }

Decoder::Decoder(const EngineFolder& engine, const Plugin& plugin, TensorRT& tensorrt,
                 const DecodeOptions& options)
    : engine_(engine), plugin_(plugin), options_(options) {
    const auto load = [&](const PlanFile& file) {
        const auto bytes = open_plan(file);  // unmapped as soon as TensorRT has made its own of it
        return tensorrt.load(bytes->data(), bytes->size(), file.path.string());
    };
    prefill_plan_ = load(engine.plans.front());
    if (engine.plans.size() > 1) step_plan_ = load(engine.plans.back());
    Plan& step_plan = step_plan_ ? *step_plan_ : *prefill_plan_;
    check_tensors(*prefill_plan_, 0, false, engine.plans.front().path.string());
    check_tensors(step_plan, engine.step_profile, true, engine.plans.back().path.string());
    integer_size_ = integers_ == Type::int64 ? 8 : 4;

    shortest_ = prefill_plan_->smallest("input_ids", 0)[1];
    longest_ = prefill_plan_->largest("input_ids", 0)[1];
    const size_t row_bytes = sizeof(float) * static_cast<size_t>(engine.vocabulary);
    if (engine.all_logits) {
        const auto most = static_cast<int64_t>(std::max<size_t>(kMostLogitsBytes / row_bytes, 1));
        longest_ = std::max(std::min(longest_, most), shortest_);
    }

    size_t state_bytes = sizeof(float);
    for (const int64_t size : state_dims_) state_bytes *= static_cast<size_t>(size);
    for (int64_t layer = 0; layer < engine.layers; ++layer) states_.emplace_back(state_bytes);
    piece_ids_ = DeviceMemory(integer_size_ * static_cast<size_t>(longest_));
    prefill_logits_ = DeviceMemory(row_bytes * static_cast<size_t>(engine.all_logits ? longest_ : 1));
    step_logits_ = DeviceMemory(row_bytes);
    for (DeviceMemory* integer : {&ids_, &positions_, &seq_lens_}) *integer = DeviceMemory(integer_size_);
    draws_ = DeviceMemory(sizeof(int64_t));
    random_stream_ = DeviceMemory(sizeof(uint64_t));
    result_ = DeviceMemory(sizeof(Result));

    stop_ids_ = DeviceMemory(sizeof(int32_t) * options_.stop_ids.size());
    if (!options_.stop_ids.empty()) {
        check(
            cudaMemcpy(stop_ids_.data(), options_.stop_ids.data(), stop_ids_.bytes(), cudaMemcpyHostToDevice),
            "copying to the GPU");
    }
    if (options_.tokens_to_allow) {
        std::vector<uint32_t> mask(static_cast<size_t>((engine.vocabulary + 31) / 32));
        for (int64_t id = 0; id < std::min(*options_.tokens_to_allow, engine.vocabulary); ++id) {
            mask[static_cast<size_t>(id / 32)] |= uint32_t{1} << (id % 32);
        }
        allowed_ = DeviceMemory(sizeof(uint32_t) * mask.size());
        check(cudaMemcpy(allowed_.data(), mask.data(), allowed_.bytes(), cudaMemcpyHostToDevice),
              "copying to the GPU");
    }

    // Those went through the default stream, for which ours does not wait.
    check(cudaDeviceSynchronize(), "copying to the GPU");

    // One block for both contexts: they never run at the same time.
    activations_ = DeviceMemory(std::max(prefill_plan_->activation_bytes(), step_plan.activation_bytes()));
    prefill_ = prefill_plan_->context(0, activations_.data(), activations_.bytes(), stream_.get());
    step_ = step_plan.context(engine.step_profile, activations_.data(), activations_.bytes(), stream_.get());
    bind(*prefill_, piece_ids_.data(), prefill_logits_.data());
    bind(*step_, ids_.data(), step_logits_.data());
    step_->shape("input_ids", {1, 1});
    if (options_.cuda_graph) capture();
}

void Decoder::check_tensors(const Plan& plan, int profile, bool one_token, const std::string& name) {
    if (profile >= plan.profiles()) {
        throw Failure(name + " has " + std::to_string(plan.profiles()) +
                          " optimization profiles; engine.json's layout needs one more",
                      kRebuild);
    }
    const auto expected = static_cast<size_t>(4 + 2 * engine_.layers);
    if (plan.tensors().size() != expected) {
        throw Failure(name + " has " + std::to_string(plan.tensors().size()) +
                          " inputs and outputs; a model of " + std::to_string(engine_.layers) +
                          " layers has " + std::to_string(expected),
                      kRebuild);
    }
    for (const char* input : {"input_ids", "positions", "seq_lens"}) {
        const Tensor& tensor = find(plan, input, true, name);
        if (integers_ == Type::other) integers_ = tensor.type;
        const bool integral = tensor.type == Type::int32 || tensor.type == Type::int64;
        if (!integral || tensor.type != integers_) {
            throw Failure(name + " is not a plan of a DiJiang model: " + input + " has another type",
                          kRebuild);
        }
        const std::vector<int64_t> least = plan.smallest(input, profile), most = plan.largest(input, profile);
        const size_t dims = input == std::string("input_ids") ? 2 : 1;
        const bool sized = least.size() == dims && most.size() == dims;
        const bool one_row = sized && least[0] <= 1 && most[0] >= 1;
        const bool length = dims == 1 || (sized && most[1] >= 1 && (!one_token || least[1] <= 1));
        if (!one_row || !length) {
            throw Failure(
                name + " was not built for one sequence: the profile's " + input + " does not allow it",
                kRebuild);
        }
    }
    const Tensor& logits = find(plan, "logits", false, name);
    if (logits.type != Type::float32 || logits.dims.empty() || logits.dims.back() != engine_.vocabulary) {
        throw Failure(name + " does not fit engine.json: its logits are not float32 of " +
                          std::to_string(engine_.vocabulary) + " ids",
                      kRebuild);
    }
    for (int64_t layer = 0; layer < engine_.layers; ++layer) {
        for (const bool input : {true, false}) {
            const Tensor& state = find(plan, input ? past_name(layer) : present_name(layer), input, name);
            std::vector<int64_t> dims(state.dims.begin() + (state.dims.empty() ? 0 : 1), state.dims.end());
            if (state_dims_.empty()) state_dims_ = dims;
            const bool fixed = dims.size() == 3 && *std::min_element(dims.begin(), dims.end()) > 0;
            if (state.type != Type::float32 || !fixed || dims != state_dims_) {
                throw Failure(
                    name + " does not fit engine.json: " + state.name + " has another type or shape",
                    kRebuild);
            }
        }
    }
}

// Past and present are one buffer: the kernels work in place.
void Decoder::bind(Context& context, void* ids, void* logits) {
    context.shape("positions", {1});
    context.shape("seq_lens", {1});
    context.bind("input_ids", ids);
    context.bind("positions", positions_.data());
    context.bind("seq_lens", seq_lens_.data());
    context.bind("logits", logits);
    std::vector<int64_t> dims{1};
    dims.insert(dims.end(), state_dims_.begin(), state_dims_.end());
    for (int64_t layer = 0; layer < engine_.layers; ++layer) {
        context.shape(past_name(layer), dims);
        void* state = states_[static_cast<size_t>(layer)].data();
        context.bind(past_name(layer), state);
        context.bind(present_name(layer), state);
    }
}

void Decoder::capture() {
    // TensorRT wants an ordinary run before a capture. It changes nothing: seq_lens is zero as allocated, and
    // by the op's contract a row of length 0 keeps its state.
    step_->enqueue(stream_.get());
    stream_.wait();
    graph_.capture(stream_, [this] { step(); });
}

int64_t Decoder::room(size_t prompt_tokens, std::optional<int64_t> wanted) const {
    constexpr int64_t kDefault = 128, kMost = int64_t{1} << 30;
    const auto length = static_cast<int64_t>(prompt_tokens);
    // The last new token is never read, so it needs no position.
    const int64_t limit = engine_.max_positions.value_or(kMost);
    const int64_t left = limit - length + 1;
    if (length > limit) {
        throw Failure(
            "the prompt has " + std::to_string(length) + " tokens; the model's positions end at " +
                std::to_string(limit),
            "use a shorter prompt, or export with --extend-decay if the model has trained decay tables");
    }
    if (wanted && *wanted > left) {
        throw Failure("a prompt of " + std::to_string(length) + " tokens leaves room for " +
                          std::to_string(left) + " more; asked for " + std::to_string(*wanted),
                      "use a smaller --max-tokens");
    }
    return wanted.value_or(std::min(kDefault, left));
}

void Decoder::put_integer(std::vector<unsigned char>& bytes, int64_t value) const {
    const auto narrow = static_cast<int32_t>(value);
    const void* from = integer_size_ == 8 ? static_cast<const void*>(&value) : &narrow;
    bytes.resize(bytes.size() + integer_size_);
    std::memcpy(bytes.data() + bytes.size() - integer_size_, from, integer_size_);
}

// Zero states, and everything about the prompt in one upload: its ids, the pieces' positions and lengths.
void Decoder::start(const std::vector<int64_t>& prompt, uint64_t stream_number) {
    std::vector<unsigned char> bytes;
    const auto total = static_cast<int64_t>(prompt.size());
    for (const int64_t id : prompt) put_integer(bytes, id);
    for (int64_t at = 0; at < total; at += longest_) put_integer(bytes, at);
    for (int64_t at = 0; at < total; at += longest_) put_integer(bytes, std::min(longest_, total - at));
    if (prompt_.bytes() < bytes.size()) prompt_ = DeviceMemory(bytes.size());
    const cudaStream_t stream = stream_.get();
    const auto upload = [&](const DeviceMemory& to, const void* from, size_t size) {
        check(cudaMemcpyAsync(to.data(), from, size, cudaMemcpyHostToDevice, stream), "copying to the GPU");
    };
    upload(prompt_, bytes.data(), bytes.size());
    upload(draws_, &total, sizeof total);  // the place in the text, as `generate` counts
    upload(random_stream_, &stream_number, sizeof stream_number);
    for (const DeviceMemory& state : states_) {
        check(cudaMemsetAsync(state.data(), 0, state.bytes(), stream), "clearing the state");
    }
    check(cudaMemsetAsync(result_.data(), 0, result_.bytes(), stream), "clearing the state");
}

void Decoder::read_prompt(size_t tokens) {
    const auto total = static_cast<int64_t>(tokens);
    const int64_t pieces = (total + longest_ - 1) / longest_;
    const cudaStream_t stream = stream_.get();
    const auto take = [&](const DeviceMemory& to, int64_t from, int64_t count) {
        check(cudaMemcpyAsync(to.data(),
                              prompt_.as<unsigned char>() + integer_size_ * static_cast<size_t>(from),
                              integer_size_ * static_cast<size_t>(count), cudaMemcpyDeviceToDevice, stream),
              "copying on the GPU");
    };
    int64_t count = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        count = std::min(longest_, total - piece * longest_);
        take(piece_ids_, piece * longest_, count);
        take(positions_, total + piece, 1);
        take(seq_lens_, total + pieces + piece, 1);
        // Ids beyond seq_lens are padding, and what was there before is as good as anything.
        prefill_->shape("input_ids", {1, std::max(count, shortest_)});
        prefill_->enqueue(stream);
    }
    choose(prefill_logits_.as<float>() + (engine_.all_logits ? (count - 1) * engine_.vocabulary : 0));
}

// Enqueues the choice of a token, and what makes it the next step's input.
void Decoder::choose(const float* logits) {
    const int integers = integers_ == Type::int64 ? DIJIANG_INT64 : DIJIANG_INT32;
    auto* result = result_.as<Result>();
    dijiang_sample_buffers sample{};
    sample.logits = logits;
    sample.allowed = allowed_.as<uint32_t>();
    sample.streams = random_stream_.as<uint64_t>();
    sample.draws = draws_.as<int64_t>();
    sample.tokens = &result->token;
    sample.row_status = &result->row_status;
    sample.batch = 1;
    sample.vocabulary = static_cast<int32_t>(engine_.vocabulary);
    sample.integers = integers;
    plugin_.check(plugin_.sample(&options_.sampling, &sample, stream_.get()), "choosing a token");

    dijiang_advance_buffers advance{};
    advance.tokens = &result->token;
    advance.row_status = &result->row_status;
    advance.positions = positions_.data();
    advance.seq_lens = seq_lens_.data();
    advance.draws = draws_.as<int64_t>();
    advance.input_ids = ids_.data();
    advance.finished = &result->finished;
    advance.stop_ids = stop_ids_.as<int32_t>();
    advance.stop_count = static_cast<int32_t>(options_.stop_ids.size());
    advance.batch = 1;
    advance.vocabulary = sample.vocabulary;
    advance.integers = integers;
    plugin_.check(plugin_.advance(&advance, stream_.get()), "going on to the next token");
}

void Decoder::step() {
    step_->enqueue(stream_.get());
    choose(step_logits_.as<float>());
}

void Decoder::send_result(int slot) {
    check(cudaMemcpyAsync(slots_[slot].result, result_.data(), sizeof(Result), cudaMemcpyDeviceToHost,
                          stream_.get()),
          "copying from the GPU");
    slots_[slot].event.record(stream_);
}

int64_t Decoder::receive_result(int slot, bool& finished) {
    slots_[slot].event.wait();
    const Result& result = *slots_[slot].result;
    if (result.row_status != DIJIANG_ROW_OK) {
        throw Failure(result.row_status == DIJIANG_ROW_NOT_FINITE
                          ? "the model's logits are not finite"
                          : "the model's logits cannot be sampled from",
                      "`dijiang-export validate ENGINE` shows where the model goes wrong");
    }
    finished = result.finished != 0;
    if (integer_size_ == 8) return result.token;
    int32_t token = 0;
    std::memcpy(&token, &result.token, sizeof token);
    return token;
}

Times Decoder::generate(const std::vector<int64_t>& prompt, int64_t max_tokens, uint64_t stream_number,
                        const std::function<void(int64_t)>& on_token) {
    Times times;
    times.prompt_tokens = static_cast<int64_t>(prompt.size());
    const auto began = std::chrono::steady_clock::now();
    auto first = began;
    start(prompt, stream_number);
    read_prompt(prompt.size());
    send_result(0);
    // The next step is launched before the last token is looked at, so that the GPU never waits for the host.
    // A step that turns out to be one too many finds seq_lens 0 and leaves everything as it is.
    bool finished = false;
    for (int64_t n = 0; n < max_tokens && !finished; ++n) {
        if (n + 1 < max_tokens) {
            if (graph_.captured()) {
                graph_.launch(stream_);
            } else {
                step();
            }
            send_result(static_cast<int>((n + 1) % 2));
        }
        const int64_t token = receive_result(static_cast<int>(n % 2), finished);
        ++times.new_tokens;
        if (n == 0) {
            times.first_token_seconds = seconds_since(began);
            first = std::chrono::steady_clock::now();
        }
        on_token(token);
    }
    times.decode_seconds = seconds_since(first);
    stream_.wait();
    return times;
}

}  // namespace dijiang
