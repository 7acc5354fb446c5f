// What this program needs of TensorRT, without its headers: the differences between 8.6, 10 and 11 stay in
// tensorrt.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dijiang {

enum class Type { float32, int32, int64, other };

// One of an engine's inputs and outputs.
struct Tensor {
    std::string name;
    bool input = false;
    Type type = Type::other;
    std::vector<int64_t> dims;  // -1: varies
};

std::string tensorrt_version();    // of the library that runs, such as "10.3.0"
const char* plugin_entry_point();  // a function that every plugin library for this TensorRT exports

// An execution context: one sequence of calls, on one stream.
class Context {
public:
    virtual ~Context() = default;
    virtual void shape(const std::string& input, const std::vector<int64_t>& dims) = 0;
    virtual void bind(const std::string& tensor, void* address) = 0;  // GPU memory, aligned to 256 bytes
    virtual void enqueue(cudaStream_t stream) = 0;
};

// A deserialised plan.
class Plan {
public:
    virtual ~Plan() = default;
    virtual const std::vector<Tensor>& tensors() const = 0;
    virtual int profiles() const = 0;
    // The smallest and the largest shape of an input in an optimization profile.
    virtual std::vector<int64_t> smallest(const std::string& input, int profile) const = 0;
    virtual std::vector<int64_t> largest(const std::string& input, int profile) const = 0;
    // Bytes that a context needs for activations, whatever its profile. They hold nothing between calls:
    // contexts that never run at the same time may share them.
    virtual size_t activation_bytes() const = 0;
    // A context with this memory. Selects the profile on the stream and waits for it.
    virtual std::unique_ptr<Context> context(int profile, void* activations, size_t bytes,
                                             cudaStream_t stream) = 0;
};

class TensorRT {
public:
    virtual ~TensorRT() = default;
    virtual std::unique_ptr<Plan> load(const void* plan, size_t size, const std::string& name) = 0;
};

// verbose: TensorRT's warnings and notes to standard error. Errors become Failures' text. Throws Failure.
std::unique_ptr<TensorRT> open_tensorrt(bool verbose);

}  // namespace dijiang
