// The C ABI of attention: check, choose the family, launch.
#include <algorithm>
#include <cstdio>
#include <string>

#include "attention/checks.h"
#include "host/arguments.h"
#include "host/device.h"
#include "host/errors.h"

namespace dijiang {
namespace {

// What one call asks for.
Needs call_needs(const dijiang_geometry& geometry, int32_t batch, int32_t length,
                 const dijiang_device& device) {
    return length == 1 ? decode::needs(geometry, batch, device)
                       : prefill::needs(geometry, batch, length, device);
}

dijiang_status most_needs(const dijiang_geometry* geometry, int32_t max_batch, int32_t max_length,
                          const dijiang_device* given, const size_t* bytes, Needs& needs) {
    dijiang_device device{};
    DIJIANG_TRY(check_geometry(geometry));
    DIJIANG_TRY(check_size(max_batch, max_length));
    if (bytes == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT, "bytes is missing; got NULL; expected where to write the size");
    DIJIANG_TRY(given_or_current(given, device));
    needs = {0, 0};
    if (max_batch == 0 || max_length == 0) return DIJIANG_OK;
    needs = call_needs(*geometry, max_batch, 1, device);
    if (max_length == 1) return DIJIANG_OK;
    const Needs longer = call_needs(*geometry, max_batch, max_length, device);
    needs = {std::max(needs.workspace, longer.workspace), std::max(needs.sync, longer.sync)};
    return DIJIANG_OK;
}

// No tokens: the states go over as they are.
dijiang_status copy_states(const dijiang_geometry& geometry, int32_t batch,
                           const dijiang_attention_buffers& buffers, cudaStream_t stream) {
    AttentionParams params{};
    DIJIANG_TRY(check_states(geometry, batch, buffers, params));
    if (buffers.present_state == buffers.past_state) return DIJIANG_OK;
    const size_t row = sizeof(float) * static_cast<size_t>(geometry.num_heads) *
                       static_cast<size_t>(geometry.head_dim) * static_cast<size_t>(geometry.head_dim);
    for (int64_t i = 0; i < batch; ++i) {
        // One copy if both are dense, otherwise one a row: an empty call is rare.
        const bool whole = batch > 1 &&
                           row == sizeof(float) * static_cast<size_t>(params.past_batch_stride) &&
                           params.past_batch_stride == params.present_batch_stride;
        const cudaError_t error =
            cudaMemcpyAsync(buffers.present_state + i * params.present_batch_stride,
                            buffers.past_state + i * params.past_batch_stride,
                            whole ? row * static_cast<size_t>(batch) : row, cudaMemcpyDeviceToDevice, stream);
        if (error != cudaSuccess) return fail_cuda(error, "copying past_state to present_state");
        if (whole) break;
    }
    return DIJIANG_OK;
}

dijiang_status attention(const dijiang_geometry* geometry, int32_t batch, int32_t length,
                         const dijiang_attention_buffers* buffers, cudaStream_t stream) {
    DIJIANG_TRY(check_geometry(geometry));
    DIJIANG_TRY(check_size(batch, length));
    if (batch == 0) return DIJIANG_OK;
    if (buffers == nullptr)
        return fail(DIJIANG_INVALID_ARGUMENT,
                    "buffers is missing; got NULL; expected a dijiang_attention_buffers");
    if (length == 0) return copy_states(*geometry, batch, *buffers, stream);
    AttentionParams params{};
    DIJIANG_TRY(check_attention(*geometry, batch, length, *buffers, params));
    dijiang_device device{};
    DIJIANG_TRY(current_device(device));
    DIJIANG_TRY(check_scratch(*buffers, call_needs(*geometry, batch, length, device)));
    const auto launch = length == 1 ? decode::launch : prefill::launch;
    const cudaError_t error = launch(geometry->dtype, params, device, stream);
    return error == cudaSuccess ? DIJIANG_OK
                                : fail_cuda(error, length == 1 ? "the decode kernel" : "the prefill kernels");
}

dijiang_status describe(const dijiang_geometry* geometry, int32_t batch, int32_t length,
                              const dijiang_device* given, char* text, size_t size) {
    dijiang_device device{};
    DIJIANG_TRY(check_geometry(geometry));
    DIJIANG_TRY(check_size(batch, length));
    DIJIANG_TRY(check_text(text, size));
    DIJIANG_TRY(given_or_current(given, device));
    std::string said;
    if (batch == 0) {
        said = "nothing to do";
    } else if (length == 0) {
        said = "copy of the states";
    } else {
        said = length == 1 ? decode::describe(*geometry, batch, device)
                           : prefill::describe(*geometry, batch, length, device);
    }
    std::snprintf(text, size, "%s", said.c_str());
    return DIJIANG_OK;
}

}  // namespace
}  // namespace dijiang

using namespace dijiang;

dijiang_status dijiang_attention_workspace_size(const dijiang_geometry* geometry, int32_t max_batch,
                                                int32_t max_length, const dijiang_device* device,
                                                size_t* bytes) {
    return guarded([&]() -> dijiang_status {
        Needs needs{};
        DIJIANG_TRY(most_needs(geometry, max_batch, max_length, device, bytes, needs));
        *bytes = needs.workspace;
        return DIJIANG_OK;
    });
}

dijiang_status dijiang_attention_sync_size(const dijiang_geometry* geometry, int32_t max_batch,
                                           int32_t max_length, const dijiang_device* device, size_t* bytes) {
    return guarded([&]() -> dijiang_status {
        Needs needs{};
        DIJIANG_TRY(most_needs(geometry, max_batch, max_length, device, bytes, needs));
        *bytes = needs.sync;
        return DIJIANG_OK;
    });
}

dijiang_status dijiang_attention_plan(const dijiang_geometry* geometry, int32_t batch, int32_t length,
                                      const dijiang_device* device, char* text, size_t size) {
    return guarded([&] { return describe(geometry, batch, length, device, text, size); });
}

dijiang_status dijiang_attention(const dijiang_geometry* geometry, int32_t batch, int32_t length,
                                 const dijiang_attention_buffers* buffers, dijiang_stream stream) {
    return guarded([&] { return attention(geometry, batch, length, buffers, stream); });
}
