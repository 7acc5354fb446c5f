// The plugin library that `dijiang-export build-plugin` made, opened: TensorRT finds its node in it, and the
// decode loop its sampling kernels, which the same file exports.
#pragma once

#include <dijiang/sampling.h>

#include <string>

namespace dijiang {

class Plugin {
public:
    // Opens the library, which registers itself with the TensorRT that this program is linked to.
    // entry: a function that a plugin for this TensorRT has. Throws Failure.
    Plugin(const std::string& path, const char* entry, const std::string& tensorrt);
    ~Plugin();
    Plugin(const Plugin&) = delete;
    Plugin& operator=(const Plugin&) = delete;

    decltype(&dijiang_sample) sample = nullptr;
    decltype(&dijiang_advance) advance = nullptr;

    const std::string& version() const { return version_; }
    // Hash of the sources that it was made from, as plugin.json beside it says; empty if there is none.
    const std::string& sources() const { return sources_; }
    // Throws Failure with the library's own words unless status is DIJIANG_OK.
    void check(dijiang_status status, const char* what) const;

private:
    void* handle_ = nullptr;
    decltype(&dijiang_last_error) last_error_ = nullptr;
    std::string version_, sources_;
};

}  // namespace dijiang
