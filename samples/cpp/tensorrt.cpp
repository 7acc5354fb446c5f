// The only file that knows TensorRT. What differs between versions:
//  - 8.6 has no INT64: inputs are INT32 there. Which it is, is asked of the engine.
//  - Dims hold int32 in 8.6, int64 from 10 on.
//  - The version number is written in thousands in 8.6, in ten thousands from 10 on.
//  - Memory for activations that contexts share is handed over by functions of other names.
//  - Plugin libraries export getPluginCreators in 8.6, getCreators from 10 on.
// enqueueV3, setTensorAddress, setInputShape, setOptimizationProfileAsync and destructors that may be called
// are in all of them.
#include "tensorrt.h"

#include <NvInferRuntime.h>

#include <cstdio>
#include <mutex>

#include "errors.h"

namespace dijiang {
namespace {

#if NV_TENSORRT_MAJOR >= 10
constexpr int kVersionBase = 10000;
#else
constexpr int kVersionBase = 1000;
#endif

Type type_of(nvinfer1::DataType type) {
    if (type == nvinfer1::DataType::kFLOAT) return Type::float32;
    if (type == nvinfer1::DataType::kINT32) return Type::int32;
#if NV_TENSORRT_MAJOR >= 10
    if (type == nvinfer1::DataType::kINT64) return Type::int64;
#endif
    return Type::other;
}

std::vector<int64_t> vector_of(const nvinfer1::Dims& dims) {
    return {dims.d, dims.d + (dims.nbDims > 0 ? dims.nbDims : 0)};
}

class Logger : public nvinfer1::ILogger {
public:
    explicit Logger(bool verbose) : verbose_(verbose) {}

    void log(Severity severity, const char* text) noexcept override {
        const bool error = severity == Severity::kERROR || severity == Severity::kINTERNAL_ERROR;
        if (verbose_ && severity != Severity::kVERBOSE) std::fprintf(stderr, "TensorRT: %s\n", text);
        if (!error) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        try {
            if (said_.empty()) said_ = text;  // the first is the reason, the others follow from it
        } catch (const std::exception&) {     // nothing may leave this function
        }
    }

    // ": " and the first error since the last time; empty if there was none.
    std::string reason() {
        const std::lock_guard<std::mutex> lock(mutex_);
        const std::string text = said_.empty() ? "" : ": " + said_;
        said_.clear();
        return text;
    }

private:
    bool verbose_;
    std::mutex mutex_;
    std::string said_;
};

class RealContext : public Context {
public:
    RealContext(std::unique_ptr<nvinfer1::IExecutionContext> context, Logger& logger)
        : context_(std::move(context)), logger_(logger) {}

    void shape(const std::string& input, const std::vector<int64_t>& dims) override {
        nvinfer1::Dims wanted{};
        if (dims.size() > nvinfer1::Dims::MAX_DIMS) throw Failure(input + " has too many dimensions");
        wanted.nbDims = static_cast<int32_t>(dims.size());
        for (size_t i = 0; i < dims.size(); ++i) wanted.d[i] = static_cast<decltype(+wanted.d[0])>(dims[i]);
        if (!context_->setInputShape(input.c_str(), wanted)) {
            throw Failure("TensorRT refuses a shape of " + input + logger_.reason());
        }
    }

    void bind(const std::string& tensor, void* address) override {
        if (!context_->setTensorAddress(tensor.c_str(), address)) {
            throw Failure("TensorRT refuses the memory for " + tensor + logger_.reason());
        }
    }

    void enqueue(cudaStream_t stream) override {
        if (!context_->enqueueV3(stream))
            throw Failure("TensorRT could not run the model" + logger_.reason());
    }

private:
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    Logger& logger_;
};

class RealPlan : public Plan {
public:
    RealPlan(std::unique_ptr<nvinfer1::ICudaEngine> engine, Logger& logger)
        : engine_(std::move(engine)), logger_(logger) {
        for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            tensors_.push_back({name, engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT,
                                type_of(engine_->getTensorDataType(name)),
                                vector_of(engine_->getTensorShape(name))});
        }
    }

    const std::vector<Tensor>& tensors() const override { return tensors_; }
    int profiles() const override { return engine_->getNbOptimizationProfiles(); }

    std::vector<int64_t> smallest(const std::string& input, int profile) const override {
        return vector_of(
            engine_->getProfileShape(input.c_str(), profile, nvinfer1::OptProfileSelector::kMIN));
    }

    std::vector<int64_t> largest(const std::string& input, int profile) const override {
        return vector_of(
            engine_->getProfileShape(input.c_str(), profile, nvinfer1::OptProfileSelector::kMAX));
    }

    size_t activation_bytes() const override {
#if NV_TENSORRT_MAJOR >= 10
        return static_cast<size_t>(engine_->getDeviceMemorySizeV2());
#else
        return engine_->getDeviceMemorySize();
#endif
    }

    std::unique_ptr<Context> context(int profile, void* activations, size_t bytes,
                                     cudaStream_t stream) override {
        std::unique_ptr<nvinfer1::IExecutionContext> context;
#if NV_TENSORRT_MAJOR >= 10
        const auto ours = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
        context.reset(engine_->createExecutionContext(ours));
        if (context) context->setDeviceMemoryV2(activations, static_cast<int64_t>(bytes));
#else
        context.reset(engine_->createExecutionContextWithoutDeviceMemory());
        if (context) context->setDeviceMemory(activations);
        (void)bytes;
#endif
        if (!context) {
            throw Failure("TensorRT could not make an execution context" + logger_.reason(),
                          "the GPU may have too little free memory");
        }
        if (!context->setOptimizationProfileAsync(profile, stream) ||
            cudaStreamSynchronize(stream) != cudaSuccess) {
            throw Failure("TensorRT could not select an optimization profile" + logger_.reason());
        }
        return std::make_unique<RealContext>(std::move(context), logger_);
    }

private:
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    Logger& logger_;
    std::vector<Tensor> tensors_;
};

class RealTensorRT : public TensorRT {
public:
    explicit RealTensorRT(bool verbose) : logger_(verbose) {
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) {
            throw Failure("TensorRT could not be started" + logger_.reason(),
                          "this program was compiled for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                              "." + std::to_string(NV_TENSORRT_MINOR) + "; the library that it found is " +
                              tensorrt_version());
        }
    }

    std::unique_ptr<Plan> load(const void* plan, size_t size, const std::string& name) override {
        std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime_->deserializeCudaEngine(plan, size));
        if (!engine) {
            throw Failure(
                "TensorRT cannot load " + name + logger_.reason(),
                "a plan runs only with the TensorRT, the kind of GPU and the plugin that it was built with");
        }
        return std::make_unique<RealPlan>(std::move(engine), logger_);
    }

private:
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
};

}  // namespace

std::string tensorrt_version() {
    const int version = getInferLibVersion();
    return std::to_string(version / kVersionBase) + "." + std::to_string(version % kVersionBase / 100) + "." +
           std::to_string(version % 100);
}

const char* plugin_entry_point() {
#if NV_TENSORRT_MAJOR >= 10
    return "getCreators";
#else
    return "getPluginCreators";
#endif
}

std::unique_ptr<TensorRT> open_tensorrt(bool verbose) { return std::make_unique<RealTensorRT>(verbose); }

}  // namespace dijiang
