#include "linear/many/product.h"

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "host/errors.h"
#include "host/outside_capture.h"
#include "linear/many/cublaslt.h"

namespace dijiang {
namespace many {
namespace {

constexpr size_t kMostRemembered = 4096;  // shapes; then all are chosen anew

dijiang_status fail_library(int status, const char* what) {
    return fail(DIJIANG_CUDA_ERROR, "%s failed; got cublasStatus_t %d", what, status);
}

}  // namespace

bool Shape::operator<(const Shape& other) const {
    const auto all = [](const Shape& s) {
        return std::make_tuple(s.dtype, s.wide, s.adds, s.biased, s.relu, s.rows, s.width, s.inner, s.result_stride);
    };
    return all(*this) < all(other);
}

// Matrices are the library's, by columns: the result's transpose is weight input^T. Immutable once it is made.
class Product {
public:
    Product(const cublaslt::Library& library, cublaslt::Handle handle) : library_(library), handle_(handle) {}
    Product(const Product&) = delete;
    Product& operator=(const Product&) = delete;
    ~Product() {
        for (cublaslt::Description matrix : {weight_, input_, result_})
            if (matrix != nullptr) library_.matrix_destroy(matrix);
    }

    int choose(const Shape& shape) {
        const int type = shape.dtype == DIJIANG_FLOAT16 ? cublaslt::kFloat16 : cublaslt::kBfloat16;
        adds_ = shape.adds != 0;
        biased_ = shape.biased != 0;
        epilogue_ = (biased_ ? cublaslt::kAddBias : 0) | (shape.relu != 0 ? cublaslt::kRelu : 0);
        int status = 0;
        const auto matrix = [&](cublaslt::Description& made, int kind, int32_t rows, int32_t columns, int32_t stride) {
            if (status == 0)
                status = library_.matrix_create(&made, kind, static_cast<uint64_t>(rows),
                                                static_cast<uint64_t>(columns), stride);
        };
        matrix(weight_, type, shape.inner, shape.width, shape.inner);
        matrix(input_, type, shape.inner, shape.rows, shape.inner);
        matrix(result_, shape.wide != 0 ? cublaslt::kFloat32 : type, shape.width, shape.rows, shape.result_stride);
        return status == 0 ? ask() : status;
    }

    int run(const void* input, const void* weight, const void* bias, const void* added, void* result, void* workspace,
            cudaStream_t stream) const {
        const float one = 1.0f, beta = adds_ ? 1.0f : 0.0f;
        Described product(library_);
        const int status = describe(product, bias);
        if (status != 0) return status;
        return library_.multiply(handle_, product.it, &one, weight, weight_, input, input_, &beta, adds_ ? added : result,
                                 result_, result, result_, &algorithm_, workspace, kLibraryWorkspace, stream);
    }

private:
    // The bias' address is in the product's description, so that each call has one of its own.
    struct Described {
        explicit Described(const cublaslt::Library& library) : library_(library) {}
        Described(const Described&) = delete;
        Described& operator=(const Described&) = delete;
        ~Described() {
            if (it != nullptr) library_.product_destroy(it);
        }
        cublaslt::Description it = nullptr;

    private:
        const cublaslt::Library& library_;
    };

    int describe(Described& product, const void* bias) const {
        int status = library_.product_create(&product.it, cublaslt::kComputeFloat32, cublaslt::kFloat32);
        const auto set = [&](int attribute, auto value) {
            if (status == 0) status = library_.product_set(product.it, attribute, &value, sizeof value);
        };
        set(cublaslt::kTransposeA, int32_t{cublaslt::kTranspose});
        if (epilogue_ != 0) set(cublaslt::kEpilogue, epilogue_);
        if (biased_) set(cublaslt::kBiasPointer, bias);
        return status;
    }

    int ask() {
        alignas(16) static const unsigned char somewhere[16] = {};  // like a bias' address; nothing is read there
        Described product(library_);
        cublaslt::Description preference = nullptr;
        int status = describe(product, somewhere);
        if (status == 0) status = library_.preference_create(&preference);
        const auto set = [&](int attribute, auto value) {
            if (status == 0) status = library_.preference_set(preference, attribute, &value, sizeof value);
        };
        set(cublaslt::kMostWorkspace, uint64_t{kLibraryWorkspace});
        set(cublaslt::kReductions, cublaslt::kSumsInFloat32);
        for (int matrix = 0; matrix < 4; ++matrix) set(cublaslt::kAlignmentOfA + matrix, uint32_t{16});
        cublaslt::Choice choice = {};
        int found = 0;
        if (status == 0)
            status = library_.choose(handle_, product.it, weight_, input_, result_, result_, preference, 1, &choice, &found);
        if (status == 0 && (found < 1 || choice.state != 0)) status = cublaslt::kNotSupported;
        if (preference != nullptr) library_.preference_destroy(preference);
        algorithm_ = choice.algorithm;
        return status;
    }

    const cublaslt::Library& library_;
    const cublaslt::Handle handle_;
    cublaslt::Description weight_ = nullptr, input_ = nullptr, result_ = nullptr;
    cublaslt::Algorithm algorithm_ = {};
    bool adds_ = false, biased_ = false;
    uint32_t epilogue_ = 0;
};

namespace {

// On a device: opened once, whatever came of it, so that equal calls go the same way.
struct Opened {
    cublaslt::Handle handle = nullptr;
    int status = 0;
};

// What was made so far. Handles live as long as the process: at its end CUDA may have gone before.
struct Memory {
    std::mutex mutex;
    std::map<int, Opened> devices;
    std::map<std::pair<int, Shape>, std::shared_ptr<const Product>> products;  // null: the library has no algorithm

    const Opened& open(const cublaslt::Library& library, int device) {
        const auto [place, fresh] = devices.try_emplace(device);
        if (fresh) place->second.status = library.create(&place->second.handle);
        return place->second;
    }
};

Memory& memory() {
    static Memory* const it = new Memory;
    return *it;
}

}  // namespace

dijiang_status prepare(const Shape& shape, std::shared_ptr<const Product>& product, std::string& why) {
    product.reset();
    const cublaslt::Library* const library = cublaslt::find(why);
    if (library == nullptr) return DIJIANG_OK;
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return fail_cuda(error, "asking CUDA for the current device");
    Memory& it = memory();
    const std::lock_guard<std::mutex> lock(it.mutex);
    const auto key = std::make_pair(device, shape);
    auto known = it.products.find(key);
    if (known == it.products.end()) {
        const OutsideCapture outside;
        const Opened& opened = it.open(*library, device);
        if (opened.status != 0) {
            why = "cublasLtCreate of " + library->name + " failed; got cublasStatus_t " + std::to_string(opened.status);
            return DIJIANG_OK;
        }
        auto made = std::make_shared<Product>(*library, opened.handle);
        const int status = made->choose(shape);
        if (status != 0 && status != cublaslt::kNotSupported) return fail_library(status, "choosing an algorithm of cuBLASLt");
        if (it.products.size() >= kMostRemembered) it.products.clear();
        known = it.products.emplace(key, status == 0 ? std::move(made) : nullptr).first;
    }
    product = known->second;
    if (product == nullptr) why = library->name + " has no algorithm for it";
    return DIJIANG_OK;
}

dijiang_status multiply(const Product& product, const void* input, const void* weight, const void* bias,
                        const void* added, void* result, void* workspace, cudaStream_t stream) {
    const OutsideCapture outside;  // the library may load the kernel now
    const int status = product.run(input, weight, bias, added, result, workspace, stream);
    return status == 0 ? DIJIANG_OK : fail_library(status, "cublasLtMatmul");
}

}  // namespace many
}  // namespace dijiang
