// Makes plugins out of a node's attributes or a plan's bytes.
#include "attention/layer.h"
#include "common/create.h"
#include "common/names.h"
#include "common/registration.h"
#include "linear/layer.h"
#include "step/layer.h"
#include "v2/attention_blob.h"
#include "v2/linear_blob.h"
#include "v2/plugin.h"
#include "v2/step_blob.h"

namespace dijiang::trt {
namespace {

// The headers of 8.6 call IPluginV2, the base of everything here, deprecated; 8.6 has nothing else.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

// What the kernels can do and this TensorRT cannot.
std::string missing_here(const linear::Attributes& attributes) {
    if (attributes.dtype != DIJIANG_BFLOAT16) return {};
    return "TensorRT 8.6 has no bfloat16; expected dtype 1 (float16)";
}
template <typename Attributes>
std::string missing_here(const Attributes&) {
    return {};
}

template <typename Layer>
class CreatorV2 final : public nvinfer1::IPluginCreator {
public:
    const char* getPluginName() const noexcept override { return Layer::kName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    // Registries pass the namespace under which they file the creator. This library has only one.
    void setPluginNamespace(const char*) noexcept override {}
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return Layer::Fields::of_node(); }

    nvinfer1::IPluginV2* createPlugin(
        const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept override {
        return make(name, [&](Attributes& attributes) { return read_fields(fields, attributes, false); });
    }

    nvinfer1::IPluginV2* deserializePlugin(const char* name, const void* bytes, size_t size) noexcept override {
        return make(name, [&](Attributes& attributes) { return read_blob(bytes, size, attributes); });
    }

private:
    using Attributes = typename Layer::Attributes;

    template <typename Read>
    static nvinfer1::IPluginV2* make(const char* name, Read read) noexcept {
        return create<Layer, PluginV2<Layer>>(name, [&](Attributes& attributes) -> std::string {
            std::string wrong = read(attributes);
            return wrong.empty() ? missing_here(attributes) : wrong;
        });
    }
};

#pragma GCC diagnostic pop

}  // namespace

const Creators& creators() noexcept {
    static const Creators all = {immortal<CreatorV2<attention::Layer>>(), immortal<CreatorV2<linear::Layer>>(),
        immortal<CreatorV2<step::Layer>>()};
    return all;
}

}  // namespace dijiang::trt
