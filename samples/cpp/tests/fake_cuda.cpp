// CUDA's runtime in the host's memory, as far as dijiang_generate uses it. It is lazier than a GPU: nothing
// that was put on a stream happens before somebody waits for it, and streams do not wait for each other, so
// that reading too early is seen every time. FAKE_GPUS says how many there are.
#include "fake_cuda.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

namespace {

using Work = std::function<void()>;

struct FakeStream {
    std::deque<Work> queue;
    size_t done = 0;  // how many have run since the beginning
    std::vector<Work>* graph = nullptr;

    void run_to(size_t end) {
        while (done < end && !queue.empty()) {
            const Work work = std::move(queue.front());
            queue.pop_front();
            ++done;
            work();
        }
    }
    size_t end() const { return done + queue.size(); }
};

struct FakeEvent {
    FakeStream* stream = nullptr;
    size_t end = 0;
};

FakeStream default_stream;
std::vector<FakeStream*> streams;
std::map<char*, size_t> device_memory;  // start -> bytes

FakeStream* real(cudaStream_t stream) {
    return stream == nullptr ? &default_stream : reinterpret_cast<FakeStream*>(stream);
}

bool on_device(const void* pointer, size_t bytes) {
    auto* place = static_cast<char*>(const_cast<void*>(pointer));
    auto after = device_memory.upper_bound(place);
    if (after == device_memory.begin()) return false;
    --after;
    return place + bytes <= after->first + after->second;
}

void run_everything() {
    default_stream.run_to(default_stream.end());
    for (FakeStream* stream : streams) stream->run_to(stream->end());
}

}  // namespace

void fake_enqueue(cudaStream_t stream, std::function<void()> work) {
    FakeStream* to = real(stream);
    if (to->graph != nullptr) {
        to->graph->push_back(std::move(work));
    } else {
        to->queue.push_back(std::move(work));
    }
}

bool fake_capturing(cudaStream_t stream) { return real(stream)->graph != nullptr; }

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    const char* gpus = std::getenv("FAKE_GPUS");
    *count = gpus == nullptr ? 1 : std::atoi(gpus);
    return *count < 0 ? cudaErrorInsufficientDriver : cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* facts, int) {
    std::strcpy(facts->name, "Fake GPU");
    facts->major = 8;
    facts->minor = 7;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the fake CUDA";
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
    const char* most = std::getenv("FAKE_GPU_BYTES");
    size_t used = bytes;
    for (const auto& block : device_memory) used += block.second;
    if (most != nullptr && used > std::strtoull(most, nullptr, 10)) return cudaErrorMemoryAllocation;
    *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(*memory, 0xAB, bytes);  // nobody has cleared it
    device_memory[static_cast<char*>(*memory)] = bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    run_everything();
    device_memory.erase(static_cast<char*>(memory));
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) {
    *memory = std::malloc(bytes);
    std::memset(*memory, 0xCD, bytes);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
    run_everything();
    std::free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    if (!on_device(to, bytes)) return cudaErrorInvalidValue;
    fake_enqueue(stream, [=] { std::memset(to, value, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    const bool device_to = kind != cudaMemcpyDeviceToHost, device_from = kind != cudaMemcpyHostToDevice;
    if ((device_to && !on_device(to, bytes)) || (device_from && !on_device(from, bytes))) {
        return cudaErrorInvalidValue;
    }
    if (kind == cudaMemcpyHostToDevice) {  // ordinary memory has been read when the call returns
        const std::vector<char> staged(static_cast<const char*>(from),
                                       static_cast<const char*>(from) + bytes);
        fake_enqueue(stream, [=] { std::memcpy(to, staged.data(), bytes); });
    } else {
        fake_enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    }
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, nullptr);  // small copies to the GPU may end later
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    streams.push_back(new FakeStream);
    *stream = reinterpret_cast<cudaStream_t>(streams.back());
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }  // kept: events may still name it
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    FakeStream* waited = real(stream);
    if (waited->graph != nullptr) return cudaErrorStreamCaptureUnsupported;
    waited->run_to(waited->end());
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    run_everything();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(new FakeEvent);
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete reinterpret_cast<FakeEvent*>(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *reinterpret_cast<FakeEvent*>(event) = {real(stream), real(stream)->end()};
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const FakeEvent& recorded = *reinterpret_cast<FakeEvent*>(event);
    if (recorded.stream != nullptr) recorded.stream->run_to(recorded.end);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    real(stream)->graph = new std::vector<Work>;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = reinterpret_cast<cudaGraph_t>(real(stream)->graph);
    real(stream)->graph = nullptr;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    *made = reinterpret_cast<cudaGraphExec_t>(
        new std::vector<Work>(*reinterpret_cast<std::vector<Work>*>(graph)));
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete reinterpret_cast<std::vector<Work>*>(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete reinterpret_cast<std::vector<Work>*>(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    for (const Work& work : *reinterpret_cast<std::vector<Work>*>(graph)) fake_enqueue(stream, work);
    return cudaSuccess;
}

}  // extern "C"
