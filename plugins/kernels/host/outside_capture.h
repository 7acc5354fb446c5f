// What is done while a stream may be captured, and is no part of the graph: allocations, first loads of kernels.
#pragma once

#include <cuda_runtime_api.h>

namespace dijiang {

// Lets this thread do so while another (or it itself) captures a graph.
class OutsideCapture {
public:
    OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    OutsideCapture(const OutsideCapture&) = delete;
    OutsideCapture& operator=(const OutsideCapture&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace dijiang
