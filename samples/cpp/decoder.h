// From a prompt's token ids to new ones, everything on one stream.
#pragma once

#include <dijiang/sampling.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cuda.h"
#include "engine_folder.h"
#include "plugin.h"
#include "tensorrt.h"

namespace dijiang {

struct DecodeOptions {
    dijiang_sampling_options sampling{};
    std::vector<int32_t> stop_ids;           // a text ends with the first of these
    std::optional<int64_t> tokens_to_allow;  // only ids below this are chosen; none: all
    bool cuda_graph = true;
};

struct Times {
    int64_t prompt_tokens = 0, new_tokens = 0;
    double first_token_seconds = 0;  // from the call to the first new token
    double decode_seconds = 0;       // from there to the last
};

class Decoder {
public:
    // Loads the plans; the plugin must be open. Throws Failure.
    Decoder(const EngineFolder& engine, const Plugin& plugin, TensorRT& tensorrt,
            const DecodeOptions& options);

    // Most new tokens after a prompt of this length; none: no limit but the counter's. Throws Failure if
    // the prompt is too long, or `wanted` is more than that.
    int64_t room(size_t prompt_tokens, std::optional<int64_t> wanted) const;

    // Generates up to max_tokens and calls on_token with each as soon as it is known, the one that ends the
    // text included. stream_number: of the random numbers, so that prompts draw their own.
    Times generate(const std::vector<int64_t>& prompt, int64_t max_tokens, uint64_t stream_number,
                   const std::function<void(int64_t)>& on_token);

private:
    // What the host learns of a token, as it lies in GPU memory.
    struct Result {
        int64_t token;  // the first 4 bytes alone with INT32
        int32_t row_status;
        int32_t finished;
    };

    void check_tensors(const Plan& plan, int profile, bool one_token, const std::string& name);
    void bind(Context& context, void* ids, void* logits);
    void capture();
    void start(const std::vector<int64_t>& prompt, uint64_t stream_number);
    void read_prompt(size_t tokens);
    void choose(const float* logits);
    void step();
    void send_result(int slot);
    int64_t receive_result(int slot, bool& finished);
    void put_integer(std::vector<unsigned char>& bytes, int64_t value) const;

    const EngineFolder& engine_;
    const Plugin& plugin_;
    DecodeOptions options_;
    Stream stream_;

    std::unique_ptr<Plan> prefill_plan_, step_plan_;  // step_plan_ is empty if both are one plan
    Type integers_ = Type::other;
    size_t integer_size_ = 0;
    int64_t shortest_ = 1, longest_ = 1;  // tokens of one prefill call
    std::vector<int64_t> state_dims_;     // of one layer

    DeviceMemory activations_;
    std::vector<DeviceMemory> states_;
    DeviceMemory prompt_;  // ids, then positions and lengths of each piece
    DeviceMemory piece_ids_, prefill_logits_;
    DeviceMemory ids_, positions_, seq_lens_, step_logits_;  // of the row, on and on
    DeviceMemory draws_, random_stream_, result_, stop_ids_, allowed_;
    struct Slot {
        Slot();
        ~Slot();
        Slot(const Slot&) = delete;
        Slot& operator=(const Slot&) = delete;
        Result* result = nullptr;  // page-locked
        Event event;
    };
    Slot slots_[2];

    // Last, so that they go first: they use all of the above.
    std::unique_ptr<Context> prefill_, step_;
    Graph graph_;
};

}  // namespace dijiang
