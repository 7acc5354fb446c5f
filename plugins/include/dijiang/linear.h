/* Matrix products of few rows, and with quantised weights of any number: what a model spends its time on.
 *
 *     output = activation(norm(input) weight^T + bias [+ a second product]) [+ residual]
 *
 * One launch does up to DIJIANG_LINEAR_MAX_OUTPUTS such outputs, which must not depend on each other. An
 * output is the sum of one or two products ("terms"), or, with DIJIANG_SWIGLU, silu(first) * second.
 * Conventions are those of dijiang/kernels.h. Nothing here needs sync memory.
 */
#ifndef DIJIANG_LINEAR_H
#define DIJIANG_LINEAR_H

#include "dijiang/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DIJIANG_LINEAR_MAX_TERMS 4
#define DIJIANG_LINEAR_MAX_OUTPUTS 4
#define DIJIANG_LINEAR_INNER_STEP 32 /* K is a multiple of it */
#define DIJIANG_LINEAR_MAX_SIZE 1048576 /* of K and of N */

typedef enum {
    DIJIANG_NORM_NONE = 0,
    DIJIANG_LAYER_NORM = 1,
    DIJIANG_RMS_NORM = 2 /* Reserved: no step that is built has it */
} dijiang_norm;

typedef enum {
    DIJIANG_IDENTITY = 0,
    DIJIANG_RELU = 1,
    DIJIANG_GELU = 2,      /* x Phi(x), by erf */
    DIJIANG_GELU_TANH = 3, /* its approximation by tanh */
    DIJIANG_SILU = 4,
    DIJIANG_SWIGLU = 5 /* silu(first term) * second term. Reserved, likewise */
} dijiang_activation;

/* How a weight is stored. All terms of a call have DIJIANG_SAME, or none has.
 *
 * Quantised weights are integers and scales, w = q * scale, with blocks of 32 along K that share a scale. They are
 * multiplied as they are, exactly: only sums are rounded, to float32. In memory they are tiles of 8 output elements
 * (rows beyond N: zeros), and a tile is chunks of 64 (int8) or 128 (int4) elements of K (beyond K: zeros), each
 * dense:
 *   512 bytes, 16 of each lane 4 g + c, g = 0..7, c = 0..3: of output element g, of each block of 32 in turn, the
 *       elements 8 p + 2 c and 8 p + 2 c + 1, p = 0..3, which are an mma's. int8: u = q + 128, a byte each. int4: u =
 *       q + 8; of each 32-bit word, little-endian, the bits from 4 p on have the first of a pair and those from
 *       16 + 4 p on the second;
 *   scales, float16: [c = 0..3] [block of the chunk] [2], those of output elements 2 c and 2 c + 1.
 * engines/dijiang_engines/kernels/packing.py packs them. */
typedef enum { DIJIANG_SAME = 0, DIJIANG_INT8 = 1, DIJIANG_INT4 = 2 } dijiang_weight_format;

/* One product. Its sum, and everything else until the output is stored, is float32. */
typedef struct {
    const void* input;  /* T [rows, K] */
    const void* weight; /* T [N, K]: a row per output element; or packed, as weight_formats says */
    const float* bias;  /* [N], or NULL */
    int32_t inner;      /* K: a multiple of DIJIANG_LINEAR_INNER_STEP */
    int32_t output;     /* index of the output it belongs to; terms are in ascending order of it */
} dijiang_linear_term;

typedef struct {
    void* output;             /* T [rows, N]; overlaps nothing else of the call */
    const void* residual;     /* T [rows, N], added last, or NULL */
    const float* norm_weight; /* [K]; NULL without norm */
    const float* norm_bias;   /* [K], or NULL */
    int32_t width;            /* N */
    int32_t activation;       /* dijiang_activation */
    int32_t norm;             /* dijiang_norm of the input, rounded to T; all terms then have the same input */
    float epsilon;            /* added to the variance, or to the mean square; > 0 with norm */
} dijiang_linear_output;

/* T is float16 or bfloat16. All matrices are dense; all pointers are multiples of 16 bytes. */
typedef struct {
    int32_t dtype;            /* dijiang_dtype */
    int32_t rows;             /* 0 does nothing; few, say up to 16, are what this is made for. More read the
                                 weights again, but for quantised ones without norms, which then have a kernel
                                 of their own (both terms of DIJIANG_SWIGLU in one format) */
    int32_t term_count, output_count;
    int32_t constant_weights; /* 1: no work on the stream writes weights, biases or norms, so that they may
                                 be read while the work before still runs */
    uint32_t weight_formats;  /* a dijiang_weight_format of each term, term t's in bits 8 t to 8 t + 7 */
    uint32_t rounded_biases;  /* bit t: every number of term t's bias is one of T's, or it has none. Saves a pass over
                                 products of many rows; changes no result by more than the order of a sum does */
    uint32_t reserved;        /* 0 */
    dijiang_linear_term terms[DIJIANG_LINEAR_MAX_TERMS];
    dijiang_linear_output outputs[DIJIANG_LINEAR_MAX_OUTPUTS];
} dijiang_linear_call;

/* Enqueues one call. */
DIJIANG_API dijiang_status dijiang_linear(const dijiang_linear_call* call, dijiang_stream stream);

/* The same with memory to work in, for prefill: a call of many rows, with any weights, norms and activations, is then
 * done by cuBLASLt where the process has it (libcublasLt.so.13, .12 or .11, found at run time; the environment's
 * DIJIANG_CUBLASLT names another file, or "none"). Quantised weights are first made T, each rounded once; a norm's
 * rows too; sums stay float32 until the output is stored, also where cuBLASLt itself adds a bias (rounded_biases) or
 * makes ReLU. A shape has one algorithm on a device, so that equal calls have equal bits; a row's bits depend on how
 * many rows there are, and are not those of dijiang_linear. Without cuBLASLt, with up to 16 rows, with a workspace of
 * NULL, and up to 128 rows where the kernels for quantised weights are expected to be faster, it is dijiang_linear.
 *
 * workspace: a multiple of 256, overlaps nothing else of the call, holds nothing between calls. */
DIJIANG_API dijiang_status dijiang_linear_with_workspace(const dijiang_linear_call* call, void* workspace,
                                                         size_t workspace_size, dijiang_stream stream);

/* Bytes that it needs, whatever the call's pointers are; 0 for few rows. More rows never need less. Asks no GPU. */
DIJIANG_API dijiang_status dijiang_linear_workspace_size(const dijiang_linear_call* call, size_t* size);

/* Which cuBLASLt the process has, and its version: "libcublasLt.so.13 130100". DIJIANG_UNSUPPORTED where there is none;
 * dijiang_last_error() then says what was tried. */
DIJIANG_API dijiang_status dijiang_linear_library(char* text, size_t size);

/* Checks everything of a call but its pointers, and writes one line that says how it would be cut, e.g.
 * "linear blocks=512 threads=256 rows=8 shared=2560". device: NULL for the current one. text may be NULL if
 * size is 0. */
DIJIANG_API dijiang_status dijiang_linear_plan(const dijiang_linear_call* call, const dijiang_device* device,
                                               char* text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
