// The parts of registry_driver that have files of their own.
#pragma once

#include "registry_host.h"

// On a GPU: runs every case of a file that tests/support/makers/tensorrt_cases.py wrote: out of place, in place, in two contexts on
// two streams at once, and from a captured CUDA graph, each with memory that was poisoned before.
void run_cases(nvinfer1::IPluginCreatorV3One& creator, const char* path, test::Logger& logger);

// DijiangLinear, as far as that needs no GPU.
void run_linear(test::Runtime& runtime);

// DijiangStep, likewise.
void run_step(test::Runtime& runtime);
