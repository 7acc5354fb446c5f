// dijiang_generate: token ids to token ids through a TensorRT engine, for devices without Python.
#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>
#include <string>

#include "cuda.h"
#include "decoder.h"
#include "engine_folder.h"
#include "errors.h"
#include "options.h"
#include "plugin.h"
#include "tensorrt.h"

namespace dijiang {
namespace {

void differs(const EngineFolder& engine, const std::string& what, const std::string& made,
             const std::string& here) {
    if (made == here) return;
    throw Failure(engine.path.string() + " was made for another " + what + ": " + made + "; here is " + here,
                  "build it again, here, with `dijiang-export build-engine BUNDLE -o ENGINE --force`");
}

// A GPU, and the one that the engine was made for.
void use_gpu(const EngineFolder& engine, int device) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) {
        throw Failure(std::string("no NVIDIA GPU can be used here: ") +
                          (status == cudaSuccess ? "there is none" : cudaGetErrorString(status)),
                      "on a PC, `nvidia-smi` must show it; in a container, start it with the NVIDIA runtime");
    }
    if (device >= count) {
        throw Failure(
            "there is no GPU " + std::to_string(device) + ": this machine has " + std::to_string(count),
            "--device 0 to " + std::to_string(count - 1), 2);
    }
    check(cudaSetDevice(device), "selecting the GPU");
    cudaDeviceProp facts{};
    check(cudaGetDeviceProperties(&facts, device), "asking the GPU");
    differs(engine, "GPU", engine.gpu + ", sm_" + std::to_string(engine.compute_capability),
            std::string(facts.name) + ", sm_" + std::to_string(10 * facts.major + facts.minor));
}

void check_ids(const std::vector<int64_t>& ids, int64_t vocabulary) {
    if (ids.empty()) throw Failure("a prompt has no tokens", "give at least one id", 2);
    for (const int64_t id : ids) {
        if (id < vocabulary) continue;
        throw Failure("the model has no token " + std::to_string(id) + ": its ids end at " +
                          std::to_string(vocabulary - 1),
                      "the ids are of another model's tokenizer", 2);
    }
}

void print_times(const Times& times) {
    const double each = times.new_tokens > 1 ? times.decode_seconds / double(times.new_tokens - 1) : 0;
    std::fprintf(stderr,
                 "%lld prompt tokens: first new token after %.2f ms; %lld new: %.3f ms each (%.1f/s)\n",
                 static_cast<long long>(times.prompt_tokens), 1e3 * times.first_token_seconds,
                 static_cast<long long>(times.new_tokens), 1e3 * each, each > 0 ? 1 / each : 0.0);
}

void run(Options options) {
    const auto began = std::chrono::steady_clock::now();
    const EngineFolder engine = EngineFolder::open(options.engine);
    if (options.prompt) check_ids(*options.prompt, engine.vocabulary);
    use_gpu(engine, options.device);
    const std::string version = tensorrt_version();
    differs(engine, "TensorRT", engine.tensorrt, version);
    // The plugin finds the TensorRT that is linked to this program, and must outlive what uses it.
    const Plugin plugin(options.plugin, plugin_entry_point(), version);
    differs(engine, "version of the plugin", engine.plugin_version, plugin.version());
    if (!plugin.sources().empty()) differs(engine, "plugin", engine.plugin_sources, plugin.sources());
    if (!options.ignore_end) {
        for (const int32_t id : engine.end_tokens) options.decode.stop_ids.push_back(id);
    }
    const auto tensorrt = open_tensorrt(options.verbose);
    Decoder decoder(engine, plugin, *tensorrt, options.decode);
    if (options.time) {
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        std::fprintf(stderr, "loaded in %.2f s, TensorRT %s\n", took.count(), version.c_str());
    }

    uint64_t number = 0;
    const auto answer = [&](const std::vector<int64_t>& prompt) {
        check_ids(prompt, engine.vocabulary);
        const int64_t most = decoder.room(prompt.size(), options.max_tokens);
        const char* space = "";
        const Times times = decoder.generate(prompt, most, number++, [&](int64_t token) {
            std::printf("%s%lld", space, static_cast<long long>(token));
            std::fflush(stdout);
            space = " ";
        });
        std::printf("\n");
        if (std::fflush(stdout) != 0 || std::ferror(stdout)) throw Failure("cannot write to standard output");
        if (options.time) print_times(times);
    };
    if (options.prompt) {
        answer(*options.prompt);
        return;
    }
    std::string line;
    while (std::getline(std::cin, line)) answer(parse_ids(line));
    if (number == 0)
        throw Failure("there is no prompt on standard input", "one prompt a line, of token ids", 2);
}

}  // namespace
}  // namespace dijiang

int main(int count, char** arguments) {
    try {
        dijiang::Options options = dijiang::parse_options(count, arguments);
        if (options.help) {
            std::fputs(dijiang::help_text(), stdout);
            return 0;
        }
        dijiang::run(std::move(options));
        return 0;
    } catch (const dijiang::Failure& failure) {
        std::fprintf(stderr, "error: %s\n", failure.what());
        if (!failure.hint.empty()) std::fprintf(stderr, "hint: %s\n", failure.hint.c_str());
        return failure.exit_code;
    } catch (const std::exception& error) {  // the host is out of memory
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
