// Makes PluginV2 objects out of a node's attributes or a plan's bytes.
#include <exception>

#include "attention/fields.h"
#include "common/log.h"
#include "common/names.h"
#include "common/registration.h"
#include "linear/fields.h"
#include "step/fields.h"
#include "v2/attention_blob.h"
#include "v2/attention_plugin.h"
#include "v2/linear_blob.h"
#include "v2/linear_plugin.h"
#include "v2/step_blob.h"
#include "v2/step_plugin.h"

namespace dijiang::trt {
namespace {

// The headers of 8.6 call IPluginV2, the base of everything here, deprecated; 8.6 has nothing else.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

// What the plugins do differently: their name, their fields, and how they are read.
struct Attention {
    static const char* name() { return kPluginName; }
    static const nvinfer1::PluginFieldCollection* fields() noexcept { return field_names(); }

    std::string read(const nvinfer1::PluginFieldCollection* given) { return read_fields(given, attributes, nullptr); }
    std::string read(const void* bytes, size_t size) { return read_blob(bytes, size, attributes, limits); }
    std::string unfit() const { return why_unsupported(attributes); }
    nvinfer1::IPluginV2* make() const { return new PluginV2(attributes, limits); }

    Attributes attributes;
    Limits limits;
};

struct Linear {
    static const char* name() { return linear::kName; }
    static const nvinfer1::PluginFieldCollection* fields() noexcept { return linear::field_names(); }

    std::string read(const nvinfer1::PluginFieldCollection* given) {
        return linear::read_fields(given, attributes, false);
    }
    std::string read(const void* bytes, size_t size) { return linear::read_blob(bytes, size, attributes); }
    std::string unfit() const {
        if (attributes.dtype == DIJIANG_BFLOAT16) return "TensorRT 8.6 has no bfloat16; expected dtype 1 (float16)";
        return linear::why_unsupported(attributes);
    }
    nvinfer1::IPluginV2* make() const { return new linear::PluginV2(attributes); }

    linear::Attributes attributes;
};

struct Step {
    static const char* name() { return step::kName; }
    static const nvinfer1::PluginFieldCollection* fields() noexcept { return step::field_names(); }

    std::string read(const nvinfer1::PluginFieldCollection* given) { return step::read_fields(given, attributes); }
    std::string read(const void* bytes, size_t size) { return step::read_blob(bytes, size, attributes); }
    std::string unfit() const { return step::why_unsupported(attributes); }
    nvinfer1::IPluginV2* make() const { return new step::PluginV2(attributes); }

    step::Attributes attributes;
};

template <typename Kind>
class CreatorV2 final : public nvinfer1::IPluginCreator {
public:
    const char* getPluginName() const noexcept override { return Kind::name(); }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    // Registries pass the namespace under which they file the creator. This library has only one.
    void setPluginNamespace(const char*) noexcept override {}
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return Kind::fields(); }

    nvinfer1::IPluginV2* createPlugin(
        const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept override {
        return make(name, [&](Kind& kind) { return kind.read(fields); });
    }

    nvinfer1::IPluginV2* deserializePlugin(const char* name, const void* bytes, size_t size) noexcept override {
        return make(name, [&](Kind& kind) { return kind.read(bytes, size); });
    }

private:
    template <typename Read>
    static nvinfer1::IPluginV2* make(const char* name, Read read) noexcept {
        try {
            Kind kind;
            std::string wrong = read(kind);
            if (wrong.empty()) wrong = kind.unfit();
            if (wrong.empty()) return kind.make();
            fail("node " + std::string(name == nullptr ? "" : name) + ": " + wrong, nullptr, Kind::name());
        } catch (const std::exception& error) {
            fail(std::string("cannot create: ") + error.what(), nullptr, Kind::name());
        }
        return nullptr;
    }
};

#pragma GCC diagnostic pop

}  // namespace

const Creators& creators() noexcept {
    static const Creators all = {
        immortal<CreatorV2<Attention>>(), immortal<CreatorV2<Linear>>(), immortal<CreatorV2<Step>>()};
    return all;
}

}  // namespace dijiang::trt
