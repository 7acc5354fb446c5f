// How TensorRT gets to know the plugin's creator.
#pragma once

#include <NvInferRuntime.h>

namespace dijiang::trt {

#if NV_TENSORRT_MAJOR >= 10
using Creator = nvinfer1::IPluginCreatorInterface;
#else
using Creator = nvinfer1::IPluginCreator;
#endif

// The one creator of this library; each shell defines it. It is never destroyed.
Creator& creator() noexcept;

}  // namespace dijiang::trt
