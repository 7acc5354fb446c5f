// What a test needs of a TensorRT process: the runtime library, a logger and an error recorder that remember.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

namespace test {

// Ends the test at the first thing that is not as it should be.
inline void expect(bool right, const std::string& what) {
    std::printf("%s %s\n", right ? "ok  " : "FAIL", what.c_str());
    std::fflush(stdout);
    if (!right) std::exit(1);
}

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* text) noexcept override {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (severity <= Severity::kERROR) errors_.emplace_back(text);
        if (severity <= Severity::kWARNING) std::printf("  log: %s\n", text);
    }

    // Is the plugin's latest error one that says `text`? Forgets all errors.
    bool said(const std::string& text, const std::string& plugin = "DijiangAttention") {
        const std::lock_guard<std::mutex> lock(mutex_);
        bool found = false;
        for (const std::string& error : errors_) {
            found = found ||
                    (error.find("dijiang::" + plugin + ": ") == 0 && error.find(text) != std::string::npos);
        }
        errors_.clear();
        return found;
    }

    void forget() {
        const std::lock_guard<std::mutex> lock(mutex_);
        errors_.clear();
    }

private:
    std::mutex mutex_;
    std::vector<std::string> errors_;
};

// Hands a library our logger, as a registry does that has one.
class Finder final : public nvinfer1::ILoggerFinder {
public:
    explicit Finder(Logger& logger) : logger_(logger) {}
    ~Finder() override = default;
    nvinfer1::ILogger* findLogger() override { return &logger_; }

private:
    Logger& logger_;
};

class Recorder final : public nvinfer1::IErrorRecorder {
public:
    int32_t getNbErrors() const noexcept override { return static_cast<int32_t>(texts_.size()); }
    nvinfer1::ErrorCode getErrorCode(int32_t) const noexcept override {
        return nvinfer1::ErrorCode::kFAILED_EXECUTION;
    }
    const char* getErrorDesc(int32_t at) const noexcept override { return texts_[at].c_str(); }
    bool hasOverflowed() const noexcept override { return false; }
    void clear() noexcept override { texts_.clear(); }
    bool reportError(nvinfer1::ErrorCode, const char* text) noexcept override {
        texts_.emplace_back(text);
        return true;
    }
    RefCount incRefCount() noexcept override { return ++references_; }
    RefCount decRefCount() noexcept override { return --references_; }

private:
    std::vector<std::string> texts_;
    RefCount references_ = 0;
};

class Context final : public nvinfer1::IPluginResourceContext {
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return &recorder; }

    mutable Recorder recorder;
};

// A TensorRT runtime, opened as Python opens it: outside the global scope.
class Runtime {
public:
    explicit Runtime(const char* path) : handle_(dlopen(path, RTLD_LAZY | RTLD_LOCAL)) {
        expect(
            handle_ != nullptr, std::string("open ") + path + (handle_ ? "" : std::string(": ") + dlerror()));
        version = symbol<int32_t()>("getInferLibVersion")();
        // The first runtime, builder or refitter of a process decides where its registry logs. Without a GPU
        // there is none: then see give_logger.
        symbol<void*(void*, int32_t)>("createInferRuntime_INTERNAL")(&logger, NV_TENSORRT_VERSION);
        logger.forget();
        registry_ = symbol<nvinfer1::IPluginRegistry*()>("getPluginRegistry")();
        has_logger = symbol<nvinfer1::ILogger*()>("getLogger")() != nullptr;
        std::printf("  TensorRT library %d, headers %d.%d.%d, the registry %s\n", version, NV_TENSORRT_MAJOR,
            NV_TENSORRT_MINOR, NV_TENSORRT_PATCH,
            has_logger ? "has our logger" : "has no logger, for want of a GPU");
    }

    nvinfer1::IPluginRegistry& registry() { return *registry_; }

    // Where the registry has no logger to give, gives a library ours through the same entry point.
    void give_logger(void* library) {
        using Set = void (*)(nvinfer1::ILoggerFinder*);
        auto set = reinterpret_cast<Set>(dlsym(library, "setLoggerFinder"));
        expect(set != nullptr, "the library has setLoggerFinder");
        if (!has_logger) set(&finder_);
    }

    Logger logger;
    int32_t version = 0;
    bool has_logger = false;

private:
    template <typename Function>
    Function* symbol(const char* name) {
        void* found = dlsym(handle_, name);
        if (found == nullptr) expect(false, std::string("symbol ") + name);
        return reinterpret_cast<Function*>(found);
    }

    void* handle_;
    nvinfer1::IPluginRegistry* registry_ = nullptr;
    Finder finder_{logger};
};

inline nvinfer1::IPluginCreatorV3One* find_creator(Runtime& runtime) {
    return static_cast<nvinfer1::IPluginCreatorV3One*>(
        runtime.registry().getCreator("DijiangAttention", "1", "dijiang"));
}

template <typename Capability>
Capability* capability(nvinfer1::IPluginV3* plugin, nvinfer1::PluginCapabilityType type) {
    return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

inline nvinfer1::IPluginV3OneBuild* build_of(nvinfer1::IPluginV3* plugin) {
    return capability<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD);
}

inline nvinfer1::IPluginV3OneRuntime* runtime_of(nvinfer1::IPluginV3* plugin) {
    return capability<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME);
}

}  // namespace test
