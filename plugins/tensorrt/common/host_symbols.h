// Functions of whatever TensorRT library the process has loaded.
#pragma once

#include <vector>

namespace dijiang::trt {

// The plugin links no TensorRT library: the same file serves the full, the lean and the dispatch runtime, and
// loading it without any of them is no error. Different addresses of `name`, in the process's global scope
// and in the runtimes of this major version (Python loads them outside the global scope); with 11's headers in
// TensorRT for RTX too.
std::vector<void*> host_symbols(const char* name);

}  // namespace dijiang::trt
