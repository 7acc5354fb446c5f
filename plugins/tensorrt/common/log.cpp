#include "common/log.h"

#include <atomic>
#include <cstdio>

#include "common/host_symbols.h"
#include "common/names.h"

namespace dijiang::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};

nvinfer1::ILogger* logger() {
    if (nvinfer1::ILoggerFinder* found = finder.load(); found != nullptr) {
        if (nvinfer1::ILogger* own = found->findLogger(); own != nullptr) return own;
    }
    // Without a finder (a library that was opened rather than loaded by the registry): the process's logger.
    using GetLogger = nvinfer1::ILogger* (*)();
    for (void* symbol : host_symbols("getLogger")) {
        if (nvinfer1::ILogger* global = reinterpret_cast<GetLogger>(symbol)(); global != nullptr)
            return global;
    }
    return nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* given) noexcept { finder.store(given); }

void log(Severity severity, const std::string& text, const char* plugin) noexcept {
    try {
        const std::string line = std::string(kPluginNamespace) + "::" + plugin + ": " + text;
        if (nvinfer1::ILogger* to = logger(); to != nullptr) {
            to->log(severity, line.c_str());
        } else if (severity <= Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", line.c_str());
        }
    } catch (...) {
        // A message that cannot be told must not take the process down.
    }
}

int32_t fail(
    const std::string& text, nvinfer1::IErrorRecorder* recorder, const char* plugin) noexcept {
    log(Severity::kERROR, text, plugin);
    if (recorder != nullptr) recorder->reportError(nvinfer1::ErrorCode::kFAILED_EXECUTION, text.c_str());
    return -1;
}

}  // namespace dijiang::trt
