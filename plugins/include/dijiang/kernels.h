/* The CUDA kernels of dijiang-export behind a C ABI: no C++, PyTorch, TensorRT or ONNX Runtime type in it.
 *
 * Conventions
 *  - Pointers named below point to device memory of the current device unless they say "host".
 *  - All functions are thread-safe. Those that take a stream only enqueue work: they never allocate,
 *    synchronise or touch the host's memory after they return, so they may be captured into a CUDA graph.
 *  - Every function returns DIJIANG_OK or a status; dijiang_last_error() then says, for the calling thread,
 *    what was wrong, what was given and what would be right.
 *  - T is the element type that dijiang_geometry.dtype names. Everything inside is computed in float32.
 *  - What is marked "Reserved" works and is tested, and stays while DIJIANG_ABI_VERSION is 1, but nothing in
 *    dijiang-export uses it.
 *
 * docs/op-contract.md defines DijiangAttention; docs/mathematics.md derives it.
 */
#ifndef DIJIANG_KERNELS_H
#define DIJIANG_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define DIJIANG_API __declspec(dllexport)
#else
#define DIJIANG_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a struct or the meaning of an argument changes; dijiang_abi_version() returns the library's. */
#define DIJIANG_ABI_VERSION 1

/* What the kernels can count to; more is DIJIANG_UNSUPPORTED. batch * length stays below 2^31 besides. */
#define DIJIANG_MAX_HEADS 256
#define DIJIANG_MAX_BATCH 65535
#define DIJIANG_MAX_LENGTH 1048576 /* tokens of one call; a longer text takes several */

typedef struct CUstream_st* dijiang_stream; /* a cudaStream_t or CUstream; NULL is the default stream */

typedef enum {
    DIJIANG_OK = 0,
    DIJIANG_INVALID_ARGUMENT = 1, /* a value, pointer, size or alignment that is never right */
    DIJIANG_UNSUPPORTED = 2,      /* right in itself, but these kernels or this GPU cannot do it */
    DIJIANG_CUDA_ERROR = 3,       /* the CUDA runtime refused; dijiang_last_error() quotes it */
    DIJIANG_INTERNAL_ERROR = 4    /* the host is out of memory, or a fault of this library */
} dijiang_status;

typedef enum { DIJIANG_FLOAT32 = 0, DIJIANG_FLOAT16 = 1, DIJIANG_BFLOAT16 = 2 } dijiang_dtype;

/* What of a GPU decides how work is cut. */
typedef struct {
    int32_t compute_capability; /* 10 * major + minor, e.g. 87 */
    int32_t multiprocessors;
    int32_t shared_memory; /* most bytes one block may ask for (opt-in limit) */
    int32_t reserved;      /* 0 */
} dijiang_device;

/* One layer's attributes (docs/op-contract.md) and the types of its tensors. */
typedef struct {
    int32_t num_heads;    /* H: 1..DIJIANG_MAX_HEADS */
    int32_t num_kv_heads; /* Hkv >= 1; divides H */
    int32_t head_dim;     /* d: a multiple of 16 in 16..256 */
    int32_t rotary_dim;   /* r: even, 0..d */
    int32_t dtype;        /* dijiang_dtype of qkv, gate and output */
    int32_t table_rows;   /* N of log_decay, gain and read_scale [N, H]; 0: geometric, log_decay [H] */
    float epsilon;        /* GroupNorm's, > 0 */
    int32_t reserved;     /* 0 */
} dijiang_geometry;

/* One call's tensors. Strides count elements; 0 means dense: a token stride of the row's width, a batch
 * stride of L token strides. Strides of T tensors and of states must be multiples of 16 bytes; so must all
 * pointers but positions and seq_lens (4 bytes). The rows of one token are dense. [B, L, ..] and [L, B, ..]
 * are both expressible; rows of a tensor must not overlap each other. What is written (output, present_state,
 * workspace, sync) must not overlap anything else, but columns of one matrix may interleave. */
typedef struct {
    const void* qkv;          /* T [B, L, (H + 2 Hkv) d], q then k then v */
    const void* gate;         /* T [B, L, H d], before SiLU */
    const float* past_state;  /* [B, H, d, d], [feature, value] */
    const int32_t* positions; /* [B], tokens already in the state, >= 0 */
    const int32_t* seq_lens;  /* [B], valid tokens, 0..L; out-of-range values are clamped into it */
    const float* proj;        /* P [d, d], used as u P; rounded to T inside */
    const float* norm_weight; /* [H d] */
    const float* norm_bias;   /* [H d] */
    const float* inv_freq;    /* [max(r/2, 1)]; may be NULL if r = 0 */
    const float* log_decay;   /* [H] or [N, H]; below -30 it counts as -30 */
    const float* gain;        /* [N, H], or NULL with geometric decay */
    const float* read_scale;  /* [N, H], or NULL with geometric decay */
    void* output;             /* T [B, L, H d]; zero on padding. Must not overlap any input */
    float* present_state;     /* [B, H, d, d]; past_state itself (same strides), or disjoint from it */
    int64_t qkv_batch_stride, qkv_token_stride;
    int64_t gate_batch_stride, gate_token_stride;
    int64_t output_batch_stride, output_token_stride;
    int64_t past_batch_stride, present_batch_stride;
    void* workspace;       /* scratch; contents need not survive between calls. NULL if size 0 */
    size_t workspace_size; /* bytes there, >= dijiang_attention_workspace_size */
    void* sync;            /* zeroed once by its owner, then left zeroed by every call. NULL if size 0 */
    size_t sync_size;      /* bytes there, >= dijiang_attention_sync_size */
} dijiang_attention_buffers;
/* Calls that may run at the same time (two streams, two execution contexts) need a workspace and a sync each.
 */

DIJIANG_API int32_t dijiang_abi_version(void);
DIJIANG_API const char* dijiang_version(void);               /* of the project, e.g. "0.1.0" */
DIJIANG_API const char* dijiang_architectures(void);         /* compiled for, e.g. "sm_80 sm_90 compute_90" */
DIJIANG_API const char* dijiang_status_name(int32_t status); /* e.g. "DIJIANG_UNSUPPORTED" */
DIJIANG_API const char* dijiang_last_error(void);            /* of this thread; "" after a success */

/* The current device. Reserved. */
DIJIANG_API dijiang_status dijiang_query_device(dijiang_device* device);

/* Sizes for calls with up to max_batch rows of up to max_length tokens: enough for every smaller call too.
 * device: NULL for the current one; given explicitly, no GPU is needed. */
DIJIANG_API dijiang_status dijiang_attention_workspace_size(const dijiang_geometry* geometry,
                                                            int32_t max_batch, int32_t max_length,
                                                            const dijiang_device* device, size_t* bytes);
DIJIANG_API dijiang_status dijiang_attention_sync_size(const dijiang_geometry* geometry, int32_t max_batch,
                                                       int32_t max_length, const dijiang_device* device,
                                                       size_t* bytes);

/* One line that says which kernels a call would run and how they cut the work, e.g.
 * "decode cluster=4 ctas=128 threads=256". Written to text (host), cut to `size` bytes with its final 0. */
DIJIANG_API dijiang_status dijiang_attention_plan(const dijiang_geometry* geometry, int32_t batch,
                                                  int32_t length, const dijiang_device* device, char* text,
                                                  size_t size);

/* DijiangAttention for B = batch rows of L = length tokens: if L = 1 in one launch. With batch 0 nothing is looked at
 * or done. With length 0 only the states are: past_state is copied to present_state unless they are the same. */
DIJIANG_API dijiang_status dijiang_attention(const dijiang_geometry* geometry, int32_t batch, int32_t length,
                                             const dijiang_attention_buffers* buffers, dijiang_stream stream);

#ifdef __cplusplus
}
#endif
#endif
