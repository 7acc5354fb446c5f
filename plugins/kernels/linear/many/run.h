// A call of many rows by cuBLASLt.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "linear/many/plan.h"

namespace dijiang {
namespace many {

// Enqueues a valid call with at least workspace(call) bytes. If cuBLASLt cannot do it, nothing is enqueued, `done` is
// false and `why` says why.
dijiang_status run(const dijiang_linear_call& call, void* workspace, bool overlap, cudaStream_t stream, bool& done,
                   std::string& why);

}  // namespace many
}  // namespace dijiang
