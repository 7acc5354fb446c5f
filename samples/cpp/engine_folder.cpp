#include "engine_folder.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string_view>

#include "errors.h"
#include "json.h"
#include "sha256.h"

namespace dijiang {
namespace {

constexpr size_t kMostManifestBytes = 16 << 20;
constexpr const char* kManifest = "engine.json";
constexpr const char* kRebuild = "build it again with `dijiang-export build-engine BUNDLE -o ENGINE --force`";
constexpr const char* kNoLinks = "copy the folder with `cp -rL`, which makes files of links";
constexpr const char* kCopyAgain = "copy the engine folder again, or build it again";

PlanFile plan_file(const std::filesystem::path& folder, const Json& manifest, const std::string& name) {
    const Json& entry = manifest.at("files").at(name);
    const int64_t bytes = entry.at("bytes").integer();
    if (bytes < 1) throw Failure("engine.json gives " + name + " a size out of range", kRebuild);
    return {folder / name, static_cast<size_t>(bytes), entry.at("sha256").text()};
}

std::optional<int64_t> position_limit(const Json& spec) {
    std::optional<int64_t> limit;
    const auto bound = [&limit](int64_t value) { limit = std::min(limit.value_or(value), value); };
    if (spec.at("position_embeddings").integer() > 0) bound(spec.at("position_embeddings").integer());
    if (spec.at("decay").text() == "tables" && !spec.at("decay_extended").boolean()) {
        bound(spec.at("decay_rows").integer());
    }
    return limit;
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
    // Not blocking, so that a pipe in a file's place is an error and not a wait. No links: they can reach what
    // whoever made the folder could not, and the commands in Python refuse them too.
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    if (file < 0 && errno == ELOOP) throw Failure(path.string() + " is a symbolic link", kNoLinks);
    if (file < 0) throw Failure("cannot open " + path.string() + ": " + std::strerror(errno), kCopyAgain);
    struct stat facts {};
    const bool regular = ::fstat(file, &facts) == 0 && S_ISREG(facts.st_mode);
    const bool linked = regular && facts.st_nlink > 1;
    size_ = regular && !linked ? static_cast<size_t>(facts.st_size) : 0;
    if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    const int reason = errno;
    ::close(file);
    if (!regular) throw Failure(path.string() + " is not a file", kCopyAgain);
    if (linked) throw Failure(path.string() + " is a hard link: the file has other names too", kNoLinks);
    if (data_ == MAP_FAILED) {
        data_ = nullptr;
        throw Failure("cannot map " + path.string() + ": " + std::strerror(reason));
    }
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) ::munmap(data_, size_);
}

EngineFolder EngineFolder::open(const std::filesystem::path& folder) {
    std::error_code ignored;
    if (!std::filesystem::exists(folder / kManifest, ignored)) {
        throw Failure("there is no engine at " + folder.string() + ": it has no " + kManifest,
                      "make one with `dijiang-export build-engine BUNDLE -o ENGINE`");
    }
    const MappedFile file(folder / kManifest);
    if (file.size() > kMostManifestBytes) throw Failure(std::string(kManifest) + " is too large", kCopyAgain);
    const Json manifest =
        Json::parse({static_cast<const char*>(file.data()), file.size()}, (folder / kManifest).string());
    if (manifest.at("format").text() != "dijiang-engine" || manifest.at("format_version").integer() != 1) {
        throw Failure(folder.string() + " is not an engine of format 1", kRebuild);
    }

    EngineFolder engine;
    engine.path = folder;
    const std::string& layout = manifest.at("layout").text();
    if (layout == "one") {
        engine.plans = {plan_file(folder, manifest, "model.plan")};
        engine.step_profile = 1;
    } else if (layout == "two") {
        engine.plans = {plan_file(folder, manifest, "prefill.plan"),
                        plan_file(folder, manifest, "step.plan")};
    } else {
        throw Failure("engine.json has a layout that this program does not know: " + layout, kRebuild);
    }
    const std::string& logits = manifest.at("logits").text();
    if (logits != "all" && logits != "last") {
        throw Failure("engine.json has logits that this program does not know: " + logits, kRebuild);
    }
    engine.all_logits = logits == "all";
    const Json& spec = manifest.at("spec");
    engine.vocabulary = spec.at("vocab_size").integer();
    engine.layers = spec.at("num_layers").integer();
    constexpr int64_t kMostIds = std::numeric_limits<int32_t>::max();
    if (engine.vocabulary < 1 || engine.vocabulary > kMostIds || engine.layers < 1 || engine.layers > 10000) {
        throw Failure("engine.json has sizes out of range in spec", kRebuild);
    }
    engine.max_positions = position_limit(spec);
    for (const Json& token : spec.at("eos_token_ids").list()) {
        const int64_t id = token.integer();
        if (id < 0 || id > kMostIds) {
            throw Failure("engine.json has an end-of-text token that is no token: " + std::to_string(id),
                          kRebuild);
        }
        engine.end_tokens.push_back(static_cast<int32_t>(id));
    }
    const Json& made_for = manifest.at("made_for");
    engine.tensorrt = made_for.at("tensorrt").text();
    engine.gpu = made_for.at("gpu").text();
    engine.compute_capability = made_for.at("compute_capability").integer();
    engine.plugin_version = made_for.at("plugin_version").text();
    engine.plugin_sources = made_for.at("plugin_sources").text();
    return engine;
}

std::unique_ptr<MappedFile> open_plan(const PlanFile& plan) {
    auto file = std::make_unique<MappedFile>(plan.path);
    if (file->size() != plan.bytes) {
        throw Failure(plan.path.string() + " has " + std::to_string(file->size()) +
                          " bytes; engine.json says " + std::to_string(plan.bytes),
                      kCopyAgain);
    }
    if (sha256_hex(file->data(), file->size()) != plan.sha256) {
        throw Failure(plan.path.string() + " is corrupt: its SHA-256 differs from engine.json's", kCopyAgain);
    }
    return file;
}

}  // namespace dijiang
