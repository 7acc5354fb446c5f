#include "linear/many/cublaslt.h"

#include <dlfcn.h>

#include <cstdlib>

namespace dijiang {
namespace cublaslt {
namespace {

constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11"};
constexpr size_t kLeastVersion = 110000;

template <typename Function> bool resolve(void* handle, const char* name, Function& function, std::string& missing) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (function == nullptr) missing = std::string("it has no ") + name;
    return function != nullptr;
}

bool resolve(void* handle, Library& it, std::string& missing) {
    return resolve(handle, "cublasLtGetVersion", it.get_version, missing) &&
           resolve(handle, "cublasLtCreate", it.create, missing) &&
           resolve(handle, "cublasLtMatmulDescCreate", it.product_create, missing) &&
           resolve(handle, "cublasLtMatmulDescSetAttribute", it.product_set, missing) &&
           resolve(handle, "cublasLtMatmulDescDestroy", it.product_destroy, missing) &&
           resolve(handle, "cublasLtMatrixLayoutCreate", it.matrix_create, missing) &&
           resolve(handle, "cublasLtMatrixLayoutDestroy", it.matrix_destroy, missing) &&
           resolve(handle, "cublasLtMatmulPreferenceCreate", it.preference_create, missing) &&
           resolve(handle, "cublasLtMatmulPreferenceSetAttribute", it.preference_set, missing) &&
           resolve(handle, "cublasLtMatmulPreferenceDestroy", it.preference_destroy, missing) &&
           resolve(handle, "cublasLtMatmulAlgoGetHeuristic", it.choose, missing) &&
           resolve(handle, "cublasLtMatmul", it.multiply, missing);
}

struct Search {
    Library library;
    bool found = false;
    std::string missing;

    // RTLD_NOLOAD: only if the process has it already. The handle is kept: what was found stays there.
    bool open(const char* name, int flags) {
        void* const handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | flags);
        if (handle == nullptr) {
            if ((flags & RTLD_NOLOAD) == 0) {
                const char* const error = dlerror();
                add(name, error == nullptr ? "cannot be loaded" : error);
            }
            return false;
        }
        std::string wrong;
        if (resolve(handle, library, wrong)) {
            library.version = library.get_version();
            if (library.version >= kLeastVersion) {
                library.name = name;
                return found = true;
            }
            wrong = "it is version " + std::to_string(library.version) + ", older than 11.0";
        }
        add(name, wrong);
        dlclose(handle);
        return false;
    }

    void add(const std::string& name, const std::string& wrong) {
        missing += (missing.empty() ? "" : "; ") + name + ": " + wrong;
    }

    Search() {
        const char* const given = std::getenv("DIJIANG_CUBLASLT");
        if (given != nullptr && *given != '\0') {
            if (std::string(given) == "none") missing = "DIJIANG_CUBLASLT is none";
            else open(given, 0);
            return;
        }
        for (const int flags : {RTLD_NOLOAD, 0})
            for (const char* const name : kNames)
                if (open(name, flags)) return;
    }
};

}  // namespace

const Library* find(std::string& missing) {
    static const Search search;
    if (search.found) return &search.library;
    missing = search.missing;
    return nullptr;
}

}  // namespace cublaslt
}  // namespace dijiang
