// Checks of what a caller of attention passes, all on the host.
#pragma once

#include "attention/attention.h"

namespace dijiang {

dijiang_status check_geometry(const dijiang_geometry* geometry);

// Everything that needs no look into device memory and no GPU. Fills `params`; batch and length are positive.
dijiang_status check_attention(const dijiang_geometry& geometry, int32_t batch, int32_t length,
                               const dijiang_attention_buffers& buffers, AttentionParams& params);

// Is there as much workspace and sync as the call needs?
dijiang_status check_scratch(const dijiang_attention_buffers& buffers, const Needs& needs);

// The same for length 0, where only the states are looked at. Strides in `params` are filled for them alone.
dijiang_status check_states(const dijiang_geometry& geometry, int32_t batch,
                            const dijiang_attention_buffers& buffers, AttentionParams& params);

}  // namespace dijiang
