// Makes plugins out of a node's attributes or a plan's fields.
#include "attention/layer.h"
#include "common/create.h"
#include "common/names.h"
#include "common/registration.h"
#include "linear/layer.h"
#include "step/layer.h"
#include "v3/plugin.h"

namespace dijiang::trt {
namespace {

template <typename Layer>
class CreatorV3 final : public nvinfer1::IPluginCreatorV3One {
public:
    const char* getPluginName() const noexcept override { return Layer::kName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return Layer::Fields::of_node(); }

    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
        nvinfer1::TensorRTPhase phase) noexcept override {
        return create<Layer, PluginV3<Layer>>(name, [&](typename Layer::Attributes& attributes) {
            return read_fields(fields, attributes, phase == nvinfer1::TensorRTPhase::kRUNTIME);
        });
    }
};

}  // namespace

const Creators& creators() noexcept {
    static const Creators all = {immortal<CreatorV3<attention::Layer>>(), immortal<CreatorV3<linear::Layer>>(),
        immortal<CreatorV3<step::Layer>>()};
    return all;
}

}  // namespace dijiang::trt
