// What messages say of TensorRT's tensors and of the C ABI's results.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "dijiang/kernels.h"

namespace dijiang::trt {

inline const char* type_name(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return "float32";
        case nvinfer1::DataType::kHALF: return "float16";
        case nvinfer1::DataType::kINT32: return "int32";
        case nvinfer1::DataType::kINT8: return "int8";
        case nvinfer1::DataType::kBOOL: return "bool";
#if NV_TENSORRT_MAJOR >= 10
        case nvinfer1::DataType::kBF16: return "bfloat16";
        case nvinfer1::DataType::kINT64: return "int64";
#endif
        default: return "another type";
    }
}

inline std::string shape_of(const nvinfer1::Dims& dims) {
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    return text + "]";
}

// "" or what the C ABI says of the latest call.
inline std::string status_text(dijiang_status status) {
    return status == DIJIANG_OK ? std::string()
                                : std::string(dijiang_status_name(status)) + ": " + dijiang_last_error();
}

}  // namespace dijiang::trt
