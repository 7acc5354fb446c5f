// A part of a state in the accumulators of products: [m][n][register].
#pragma once

namespace dijiang::prefill {

template <int M, int N> __device__ __forceinline__ void scale_state(float (&state)[M][N][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) state[m][n][i] *= factor;
}

template <int M, int N> __device__ __forceinline__ void clear_state(float (&state)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) state[m][n][0] = state[m][n][1] = state[m][n][2] = state[m][n][3] = 0.0f;
}

}  // namespace dijiang::prefill
