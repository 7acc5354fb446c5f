#include "plugin.h"

#include <dlfcn.h>
#include <elf.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "engine_folder.h"
#include "errors.h"
#include "json.h"

namespace dijiang {
namespace {

constexpr const char* kBuild =
    "make one on this machine with `dijiang-export build-plugin --output DIR`, or with CMake";

// The kind of processor that a library or a program is for, a number of elf.h; 0: it is neither.
int machine_of(const std::filesystem::path& path) {
    unsigned char head[sizeof(Elf64_Ehdr)] = {};
    std::ifstream file(path, std::ios::binary);
    file.read(reinterpret_cast<char*>(head), sizeof head);
    if (!file || std::memcmp(head, ELFMAG, SELFMAG) != 0) return 0;
    const size_t low = head[EI_DATA] == ELFDATA2MSB ? 19 : 18;  // e_machine is the bytes 18 and 19
    return head[low] | head[37 - low] << 8;
}

std::string machine_name(int number) {
    if (number == EM_AARCH64) return "aarch64";
    if (number == EM_X86_64) return "x86_64";
    return "ELF machine " + std::to_string(number);
}

// dlopen says of a library for another kind of processor that there is no such file.
void check_machine(const std::string& path) {
    const int machine = machine_of(path);
    const int own = machine_of("/proc/self/exe");
    if (machine == 0 || own == 0 || machine == own) return;
    throw Failure(path + " is compiled for " + machine_name(machine) + " and cannot be loaded on " +
                      machine_name(own),
                  kBuild);
}

template <typename Function>
void find(void* handle, const std::string& path, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (function == nullptr) throw Failure(path + " is not a plugin of dijiang-export: no " + name, kBuild);
}

}  // namespace

Plugin::Plugin(const std::string& path, const char* entry, const std::string& tensorrt) {
    std::error_code failed;
    if (!std::filesystem::is_regular_file(path, failed)) {
        throw Failure("there is no plugin at " + path, kBuild);
    }
    check_machine(path);
    // With a slash in it, the name is a file's and is not looked for elsewhere. Local: what this library
    // exports shall not get in the way of another that holds the same kernels.
    handle_ = dlopen(std::filesystem::absolute(path).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) {
        const char* reason = dlerror();
        throw Failure("cannot open the plugin: " + std::string(reason == nullptr ? path : reason), kBuild);
    }
    try {
        decltype(&dijiang_abi_version) abi_version = nullptr;
        decltype(&dijiang_version) own_version = nullptr;
        find(handle_, path, "dijiang_abi_version", abi_version);
        if (abi_version() != DIJIANG_ABI_VERSION) {
            throw Failure(path + " has version " + std::to_string(abi_version()) +
                              " of the kernels' interface; " + "this program was compiled for " +
                              std::to_string(DIJIANG_ABI_VERSION),
                          "build both from the same version of dijiang-export");
        }
        if (dlsym(handle_, entry) == nullptr) {
            throw Failure(path + " is not a plugin for TensorRT " + tensorrt,
                          "libdijiang_kernels.so is none; libdijiang_tensorrt_" +
                              tensorrt.substr(0, tensorrt.find('.')) + ".so is");
        }
        find(handle_, path, "dijiang_version", own_version);
        find(handle_, path, "dijiang_last_error", last_error_);
        find(handle_, path, "dijiang_sample", sample);
        find(handle_, path, "dijiang_advance", advance);
        version_ = own_version();
        const std::filesystem::path note = std::filesystem::path(path).parent_path() / "plugin.json";
        if (std::filesystem::exists(note, failed)) {
            const MappedFile file(note);
            const std::string_view text(static_cast<const char*>(file.data()), file.size());
            sources_ = Json::parse(text, note.string()).at("sources").text();
        }
    } catch (...) {
        dlclose(handle_);
        throw;
    }
}

Plugin::~Plugin() { dlclose(handle_); }

void Plugin::check(dijiang_status status, const char* what) const {
    if (status != DIJIANG_OK) throw Failure(std::string(what) + " failed: " + last_error_());
}

}  // namespace dijiang
