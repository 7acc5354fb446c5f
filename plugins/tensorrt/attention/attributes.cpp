#include "attention/attributes.h"

#include <cstdio>

namespace dijiang::trt::attention {

dijiang_geometry geometry_of(const Attributes& attributes, dijiang_dtype dtype, int32_t table_rows) {
    dijiang_geometry geometry{};
    geometry.num_heads = attributes.num_heads;
    geometry.num_kv_heads = attributes.num_kv_heads;
    geometry.head_dim = attributes.head_dim;
    geometry.rotary_dim = attributes.rotary_dim;
    geometry.epsilon = attributes.epsilon;
    geometry.dtype = dtype;
    geometry.table_rows = table_rows;
    return geometry;
}

std::string why_unsupported(const Attributes& attributes) {
    // A plugin is also created where there is no GPU, so the question is put for an A100 (compute
    // capability 8.0, 108 multiprocessors, 163 KB per block); the GPU at hand has its say when memory is
    // sized and when it runs.
    dijiang_device device{};
    device.compute_capability = 80;
    device.multiprocessors = 108;
    device.shared_memory = 163 * 1024;
    const dijiang_geometry geometry = geometry_of(attributes, DIJIANG_FLOAT16, 0);
    size_t bytes = 0;
    if (dijiang_attention_workspace_size(&geometry, 1, 1, &device, &bytes) == DIJIANG_OK) return {};
    return dijiang_last_error();
}

std::string describe(const Attributes& attributes) {
    char text[160];
    // %a: every bit of epsilon, so that different layers never share a timing cache entry.
    std::snprintf(text, sizeof text, "num_heads=%d num_kv_heads=%d head_dim=%d rotary_dim=%d epsilon=%a",
        attributes.num_heads, attributes.num_kv_heads, attributes.head_dim, attributes.rotary_dim,
        static_cast<double>(attributes.epsilon));
    return text;
}

}  // namespace dijiang::trt::attention
