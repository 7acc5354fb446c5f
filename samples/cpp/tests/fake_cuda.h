// For the fakes: putting work on a stream of the fake CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

// Enqueues it, or adds it to the graph that is being captured. Runs when the stream is waited for.
extern "C++" __attribute__((visibility("default"))) void fake_enqueue(cudaStream_t stream,
                                                                      std::function<void()> work);
extern "C++" __attribute__((visibility("default"))) bool fake_capturing(cudaStream_t stream);
