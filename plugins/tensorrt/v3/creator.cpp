// Makes PluginV3 objects out of an ONNX node's attributes or a plan's fields.
#include <exception>
#include <new>

#include "fields.h"
#include "log.h"
#include "plugin.h"
#include "registration.h"

namespace dijiang::trt {
namespace {

class CreatorV3 final : public nvinfer1::IPluginCreatorV3One {
public:
    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return field_names(); }

    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
        nvinfer1::TensorRTPhase phase) noexcept override {
        try {
            Attributes attributes;
            Limits limits;
            const bool runtime = phase == nvinfer1::TensorRTPhase::kRUNTIME;
            std::string wrong = read_fields(fields, attributes, runtime ? &limits : nullptr);
            if (wrong.empty()) wrong = why_unsupported(attributes);
            if (wrong.empty()) return new PluginV3(attributes, limits);
            fail("node " + std::string(name == nullptr ? "" : name) + ": " + wrong);
        } catch (const std::exception& error) {
            fail(std::string("cannot create: ") + error.what());
        }
        return nullptr;
    }
};

}  // namespace

Creator& creator() noexcept {
    // In storage of its own: registries may look at it while static objects are being destroyed.
    alignas(CreatorV3) static unsigned char storage[sizeof(CreatorV3)];
    static CreatorV3* const made = new (storage) CreatorV3;
    return *made;
}

}  // namespace dijiang::trt
