// The part of registry_driver that needs a GPU.
#pragma once

#include "registry_host.h"

// Runs every case of a file that tests/tensorrt_cases.py wrote: out of place, in place, in two contexts on
// two streams at once, and from a captured CUDA graph, each with memory that was poisoned before.
void run_cases(nvinfer1::IPluginCreatorV3One& creator, const char* path, test::Logger& logger);
