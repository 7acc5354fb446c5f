// The engine folder that `dijiang-export build-engine` made: what engine.json says, and the plans' bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace dijiang {

// A file, mapped into memory: its pages are not a second copy of the weights, and the system may drop them.
class MappedFile {
public:
    explicit MappedFile(const std::filesystem::path& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const void* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

struct PlanFile {
    std::filesystem::path path;
    size_t bytes = 0;
    std::string sha256;
};

struct EngineFolder {
    // Reads and checks engine.json. Throws Failure.
    static EngineFolder open(const std::filesystem::path& folder);

    std::filesystem::path path;
    std::vector<PlanFile> plans;  // model.plan, or prefill.plan and step.plan
    int step_profile = 0;         // of the last plan; prefill is profile 0 of the first
    bool all_logits = false;      // prefill returns logits of every token
    int64_t vocabulary = 0;
    int64_t layers = 0;
    std::optional<int64_t> max_positions;  // most tokens of a sequence; none: no limit
    std::vector<int32_t> end_tokens;       // end-of-text ids of the model
    // What it was built for.
    std::string tensorrt, gpu, plugin_version, plugin_sources;
    int64_t compute_capability = 0;
};

// The plan's bytes, after size and hash were compared. Throws Failure.
std::unique_ptr<MappedFile> open_plan(const PlanFile& plan);

}  // namespace dijiang
