// Makes PluginV2 objects out of an ONNX node's attributes or a plan's bytes.
#include <exception>
#include <new>

#include "blob.h"
#include "fields.h"
#include "log.h"
#include "plugin.h"
#include "registration.h"

namespace dijiang::trt {
namespace {

// The headers of 8.6 call IPluginV2, the base of everything here, deprecated; 8.6 has nothing else.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

class CreatorV2 final : public nvinfer1::IPluginCreator {
public:
    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    // Registries pass the namespace under which they file the creator. This plugin has only one.
    void setPluginNamespace(const char*) noexcept override {}
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return field_names(); }

    nvinfer1::IPluginV2* createPlugin(
        const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept override {
        return make(
            name, [&](Attributes& attributes, Limits&) { return read_fields(fields, attributes, nullptr); });
    }

    nvinfer1::IPluginV2* deserializePlugin(
        const char* name, const void* bytes, size_t size) noexcept override {
        return make(name, [&](Attributes& attributes, Limits& limits) {
            return read_blob(bytes, size, attributes, limits);
        });
    }

private:
    template <typename Read>
    static nvinfer1::IPluginV2* make(const char* name, Read read) noexcept {
        try {
            Attributes attributes;
            Limits limits;
            std::string wrong = read(attributes, limits);
            if (wrong.empty()) wrong = why_unsupported(attributes);
            if (wrong.empty()) return new PluginV2(attributes, limits);
            fail("node " + std::string(name == nullptr ? "" : name) + ": " + wrong);
        } catch (const std::exception& error) {
            fail(std::string("cannot create: ") + error.what());
        }
        return nullptr;
    }
};

#pragma GCC diagnostic pop

}  // namespace

Creator& creator() noexcept {
    // In storage of its own: registries may look at it while static objects are being destroyed.
    alignas(CreatorV2) static unsigned char storage[sizeof(CreatorV2)];
    static CreatorV2* const made = new (storage) CreatorV2;
    return *made;
}

}  // namespace dijiang::trt
