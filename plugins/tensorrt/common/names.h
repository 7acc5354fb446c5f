// What TensorRT's registry knows the plugins by. Engines name them, so these never change.
#pragma once

namespace dijiang::trt {

constexpr char kPluginName[] = "DijiangAttention";  // messages of the library itself carry it too
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "dijiang";

}  // namespace dijiang::trt
