// Where the plugin's messages go: TensorRT's logger if there is one, else stderr.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/names.h"

namespace dijiang::trt {

using Severity = nvinfer1::ILogger::Severity;

// plugin: whose message it is.
void log(Severity severity, const std::string& text, const char* plugin = kPluginName) noexcept;

// Logs an error and hands it to `recorder` (which may be null); returns what TensorRT takes for a failure,
// -1.
int32_t fail(const std::string& text, nvinfer1::IErrorRecorder* recorder = nullptr,
    const char* plugin = kPluginName) noexcept;

// What TensorRT gives a library that it loads; null withdraws it.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

}  // namespace dijiang::trt
