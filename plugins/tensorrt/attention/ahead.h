// A plan for GPUs that are not here: TensorRT for RTX builds without asking CUDA. No TensorRT header here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "dijiang/kernels.h"

namespace dijiang::trt::attention {

// Has the process loaded a runtime whose plans are for GPUs other than the one that is here, if any is?
bool builds_ahead();

// Bytes of workspace that suffice for calls of up to `batch` rows of `length` tokens on every GPU that such a
// plan may run on and that `architectures` (as dijiang_architectures() has them) has code for. "" or what is
// wrong.
std::string workspace_anywhere(const dijiang_geometry& geometry, int32_t batch, int32_t length,
    const std::string& architectures, size_t& bytes);

}  // namespace dijiang::trt::attention
