// Makes PluginV3 objects out of a node's attributes or a plan's fields.
#include <exception>

#include "attention/fields.h"
#include "common/log.h"
#include "common/names.h"
#include "common/registration.h"
#include "linear/fields.h"
#include "step/fields.h"
#include "v3/attention_plugin.h"
#include "v3/linear_plugin.h"
#include "v3/step_plugin.h"

namespace dijiang::trt {
namespace {

// What the plugins do differently: their name, their fields, and how they are read.
struct Attention {
    static const char* name() { return kPluginName; }
    static const nvinfer1::PluginFieldCollection* fields() noexcept { return field_names(); }

    std::string read(const nvinfer1::PluginFieldCollection* given, bool of_plan) {
        return read_fields(given, attributes, of_plan ? &limits : nullptr);
    }
    std::string unfit() const { return why_unsupported(attributes); }
    nvinfer1::IPluginV3* make() const { return new PluginV3(attributes, limits); }

    Attributes attributes;
    Limits limits;
};

struct Linear {
    static const char* name() { return linear::kName; }
    static const nvinfer1::PluginFieldCollection* fields() noexcept { return linear::field_names(); }

    std::string read(const nvinfer1::PluginFieldCollection* given, bool of_plan) {
        return linear::read_fields(given, attributes, of_plan);
    }
    std::string unfit() const { return linear::why_unsupported(attributes); }
    nvinfer1::IPluginV3* make() const { return new linear::PluginV3(attributes); }

    linear::Attributes attributes;
};

struct Step {
    static const char* name() { return step::kName; }
    static const nvinfer1::PluginFieldCollection* fields() noexcept { return step::field_names(); }

    std::string read(const nvinfer1::PluginFieldCollection* given, bool) { return step::read_fields(given, attributes); }
    std::string unfit() const { return step::why_unsupported(attributes); }
    nvinfer1::IPluginV3* make() const { return new step::PluginV3(attributes); }

    step::Attributes attributes;
};

template <typename Kind>
class CreatorV3 final : public nvinfer1::IPluginCreatorV3One {
public:
    const char* getPluginName() const noexcept override { return Kind::name(); }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return Kind::fields(); }

    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
        nvinfer1::TensorRTPhase phase) noexcept override {
        try {
            Kind kind;
            std::string wrong = kind.read(fields, phase == nvinfer1::TensorRTPhase::kRUNTIME);
            if (wrong.empty()) wrong = kind.unfit();
            if (wrong.empty()) return kind.make();
            fail("node " + std::string(name == nullptr ? "" : name) + ": " + wrong, nullptr, Kind::name());
        } catch (const std::exception& error) {
            fail(std::string("cannot create: ") + error.what(), nullptr, Kind::name());
        }
        return nullptr;
    }
};

}  // namespace

const Creators& creators() noexcept {
    static const Creators all = {
        immortal<CreatorV3<Attention>>(), immortal<CreatorV3<Linear>>(), immortal<CreatorV3<Step>>()};
    return all;
}

}  // namespace dijiang::trt
