/* A whole decoding step of a model in one launch: token ids in, logits out, every layer's state in place.
 *
 *     dijiang_step_sizes                       how much memory; no GPU is needed if a device is given
 *     dijiang_step_pack_layer, .._pack_ends    canonical tensors -> the order in which blocks read them, once
 *     dijiang_step_pack_matrix                 likewise a quantised matrix
 *     dijiang_step                             one step of up to DIJIANG_STEP_MAX_ROWS sequences
 *
 * One block per multiprocessor walks all layers. Weights stream through its shared memory; blocks hand values to
 * each other by stores that carry value and tag at once, so that nobody meets anybody who does not need it. All
 * blocks have to be resident: the launch is cooperative, and fails where they cannot be.
 *
 * Conventions are those of dijiang/kernels.h. T is float16 or bfloat16: weights, and what is multiplied by them. The
 * residual stream, states and sums are float32. The same input makes the same bits, in every run.
 *
 * The matrices of layers and the head may be quantised, all of them: each int8 or int4, integers q and float16 scales in
 * blocks of 32 along K, w = q * scale. They are given as a bundle stores them:
 *   values   int8: uint8 [N, K/32, 32] of q + 128. int4: uint8 [N, K/32, 16], byte j of a block has q + 8 of its
 *            element 2 j in the low four bits and of 2 j + 1 in the high ones
 *   scales   float16 [N, K/32]
 * and multiplied as they are, exactly: only sums are rounded, to float32. Packed they lie by layer, by matrix in the order
 * in which a step takes them (q, k, v and gate together, up with mlp_gate, down, dense; without parallel residual dense
 * before up), by group of 8 rows, by unit of 512 columns (int4) or 256 (int8); the head comes last. A unit is dense:
 *   four times 512 bytes, 16 of each lane 4 g + t, g = 0..7, t = 0..3: of row g, of each block of 32 in turn, the columns 8 t
 *       to 8 t + 7. int8: u = q + 128, a byte each. int4: u = q + 8; of a 32-bit word, little-endian, the bits from 0, 8, 4, 12
 *       on have column 8 t, + 2, + 4, + 6, and those 16 above them the next one each;
 *   scales, float16, of each g = 0..7 in turn: of the unit's even blocks, then of its odd ones.
 * A row's last unit ends with its columns: blocks that the unit before it has are zeros in it, scales too, and so is what
 * a row shorter than a unit lacks. Groups of q, k, v and gate are dealt out to the blocks (dijiang_step_size) in turns: H/Hkv
 * of q, one of k, H/Hkv of gate, one of v, and so on; of all n, block b has those from floor(b n / blocks) to below
 * floor((b + 1) n / blocks), and they lie block after block, of each those of q first, then of k, gate and v. With
 * DIJIANG_SWIGLU a group is four rows of mlp_gate and the same four of up. A group is int8 if a matrix of its rows is; rows
 * of the other keep their q and scales, in 8 bits. The head's last group has zeros beyond V.
 */
#ifndef DIJIANG_STEP_H
#define DIJIANG_STEP_H

#include "dijiang/linear.h"
#include "dijiang/sampling.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DIJIANG_STEP_MAX_ROWS 8
#define DIJIANG_STEP_MAX_LAYERS 128

/* Which order of quantised weights this header describes: 1 had the bits of int4 by column, and the groups of q, k, v and
 * gate in turns for all blocks. Who keeps packed weights keeps the number with them, since nothing in them tells. */
#define DIJIANG_STEP_PACKING 2

/* Matrices of a quantised model. */
typedef enum {
    DIJIANG_STEP_Q = 0, /* qkv's first H d rows */
    DIJIANG_STEP_K = 1, /* the next Hkv d */
    DIJIANG_STEP_V = 2, /* the last */
    DIJIANG_STEP_GATE = 3,
    DIJIANG_STEP_DENSE = 4,
    DIJIANG_STEP_UP = 5,
    DIJIANG_STEP_MLP_GATE = 6,
    DIJIANG_STEP_DOWN = 7,
    DIJIANG_STEP_HEAD = 8 /* of no layer */
} dijiang_step_matrix;

/* A model's geometry. h = hidden, m = inner, A = num_heads * head_dim. */
typedef struct {
    int32_t layers;            /* 1..DIJIANG_STEP_MAX_LAYERS */
    int32_t hidden;            /* h: a multiple of 32 */
    int32_t inner;             /* m: a multiple of 32 */
    int32_t vocabulary;        /* V */
    int32_t num_heads;         /* H; A is a multiple of 32 */
    int32_t num_kv_heads;      /* Hkv; divides H */
    int32_t head_dim;          /* d: a multiple of 16 in 16..256 */
    int32_t rotary_dim;        /* r: even, 0..d */
    int32_t dtype;             /* dijiang_dtype: DIJIANG_FLOAT16 or DIJIANG_BFLOAT16 */
    int32_t norm;              /* dijiang_norm of the residual stream: DIJIANG_LAYER_NORM or DIJIANG_RMS_NORM */
    int32_t activation;        /* dijiang_activation of the MLP; DIJIANG_SWIGLU: silu(gate x) * up x */
    int32_t parallel_residual; /* 1: x + attention(norm x) + mlp(norm' x); 0: one after the other */
    int32_t table_rows;        /* N of log_decay, gain and read_scale [N, H]; 0: geometric, log_decay [H] */
    int32_t position_rows;     /* rows of a learned position table, offset included; 0: none */
    int32_t position_offset;   /* position n is its row n + offset; beyond the last, the last */
    float norm_epsilon;        /* > 0 */
    float group_norm_epsilon;  /* > 0 */
    int32_t quantised;         /* 0: matrices are T; 1: int8 or int4, as the next three say, which are 0 otherwise */
    int32_t head_format;       /* dijiang_weight_format: DIJIANG_INT8 or DIJIANG_INT4 */
    int32_t embedding_format;  /* dijiang_weight_format: DIJIANG_SAME, DIJIANG_INT8 or DIJIANG_INT4 */
    uint8_t int8_matrices[DIJIANG_STEP_MAX_LAYERS]; /* of each layer: bit m is 1 if dijiang_step_matrix m is int8 */
    int32_t reserved;          /* 0 */
} dijiang_step_model;

typedef struct {
    size_t packed; /* bytes of the packed weights */
    size_t sync;   /* bytes of memory that its owner zeroes once */
    int32_t blocks, threads, shared_memory;
    int32_t ring; /* bytes of weights that a block holds ahead */
} dijiang_step_size;

/* One layer's tensors. Matrices are T, row-major, a row per output element, and NULL if the model is quantised; everything
 * else is float32. */
typedef struct {
    const void* qkv;          /* [(H + 2 Hkv) d, h] */
    const void* gate;         /* [A, h] */
    const void* dense;        /* [h, A] */
    const void* up;           /* [m, h] */
    const void* mlp_gate;     /* [m, h] with DIJIANG_SWIGLU, else NULL */
    const void* down;         /* [h, m] */
    const float* qkv_bias;    /* [(H + 2 Hkv) d], or NULL */
    const float* dense_bias;  /* [h], or NULL */
    const float* up_bias;     /* [m], or NULL */
    const float* mlp_gate_bias; /* [m], or NULL */
    const float* down_bias;   /* [h], or NULL */
    const float* attention_norm_weight; /* [h] */
    const float* attention_norm_bias;   /* [h], or NULL */
    const float* mlp_norm_weight;       /* [h] */
    const float* mlp_norm_bias;         /* [h], or NULL */
    const float* proj;        /* P [d, d], used as u P; rounded to T */
    const float* norm_weight; /* GroupNorm's, [A] */
    const float* norm_bias;   /* [A] */
    const float* log_decay;   /* [H] or [N, H] */
    const float* gain;        /* [N, H], or NULL with geometric decay */
    const float* read_scale;  /* [N, H], or NULL with geometric decay */
} dijiang_step_layer;

/* What stands before the first and behind the last layer. */
typedef struct {
    const void* head;         /* T [V, h]; NULL if the model is quantised */
    const float* norm_weight; /* the final norm's, [h] */
    const float* norm_bias;   /* [h], or NULL */
    const float* inv_freq;    /* [r/2]; NULL if r = 0 */
} dijiang_step_ends;

typedef struct {
    const void* packed;             /* a multiple of 128 bytes */
    const void* embedding;          /* T [V, h], or values of embedding_format */
    const void* embedding_scales;   /* of them, or NULL */
    const void* position_embedding; /* T [position_rows, h], or NULL */
    const void* input_ids;          /* I [rows]; out of range counts as the nearest that is in it */
    const void* positions;          /* I [rows], tokens already in the state */
    const void* seq_lens;           /* I [rows]: 0 leaves a row's state alone, its logits are then finite */
    float* const* states;           /* host [layers]: each [rows, H, d, d], read and written */
    int64_t state_row_stride;       /* elements; 0: dense */
    float* logits;                  /* [rows, V], written */
    int64_t logits_row_stride;      /* elements; 0: dense */
    void* sync;                     /* zeroed once; two calls that may overlap need one each. 128 bytes aligned */
    size_t sync_size;
    int32_t rows;                   /* 0..DIJIANG_STEP_MAX_ROWS; 0 does nothing */
    int32_t integers;               /* dijiang_integers: I of input_ids, positions and seq_lens */
} dijiang_step_buffers;

/* What a model takes for steps of up to `rows` rows. device: NULL for the current one. DIJIANG_UNSUPPORTED, with
 * a sentence, where the model or that many rows do not fit. Packed weights serve every number of rows on devices
 * with as many multiprocessors. */
DIJIANG_API dijiang_status dijiang_step_sizes(const dijiang_step_model* model, int32_t rows,
                                              const dijiang_device* device, dijiang_step_size* size);

/* Copies a layer's tensors to their places in `packed`, on the stream. Layers may come in any order. */
DIJIANG_API dijiang_status dijiang_step_pack_layer(const dijiang_step_model* model, int32_t layer,
                                                   const dijiang_step_layer* tensors, void* packed, size_t size,
                                                   dijiang_stream stream);
/* And one matrix of a quantised model (dijiang_step_matrix), of the format that the model says. DIJIANG_STEP_HEAD is of no
 * layer. values: a multiple of 16 bytes. All of a model's matrices have to be packed, in any order. */
DIJIANG_API dijiang_status dijiang_step_pack_matrix(const dijiang_step_model* model, int32_t layer, int32_t matrix,
                                                    const void* values, const void* scales, void* packed, size_t size,
                                                    dijiang_stream stream);
DIJIANG_API dijiang_status dijiang_step_pack_ends(const dijiang_step_model* model, const dijiang_step_ends* tensors,
                                                  void* packed, size_t size, dijiang_stream stream);

/* Enqueues one step, in one launch. */
DIJIANG_API dijiang_status dijiang_step(const dijiang_step_model* model, const dijiang_step_buffers* buffers,
                                        dijiang_stream stream);

#ifdef __cplusplus
}
#endif
#endif
