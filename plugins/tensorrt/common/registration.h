// How TensorRT gets to know the plugins' creators.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <new>

namespace dijiang::trt {

#if NV_TENSORRT_MAJOR >= 10
using Creator = nvinfer1::IPluginCreatorInterface;
#else
using Creator = nvinfer1::IPluginCreator;
#endif

using Creators = std::array<Creator*, 3>;  // DijiangAttention's, DijiangLinear's and DijiangStep's

// The creators of this library; each shell defines this. They are never destroyed.
const Creators& creators() noexcept;

// The one object of a class, in storage of its own: registries may look at creators while static objects are
// being destroyed.
template <typename Class>
Class* immortal() noexcept {
    alignas(Class) static unsigned char storage[sizeof(Class)];
    static Class* const made = new (storage) Class;
    return made;
}

}  // namespace dijiang::trt
