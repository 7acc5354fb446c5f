/* The small kernels of a decode loop that stays on the device: choose a token per row, then count on.
 *
 *     step graph or dijiang_attention ... -> logits
 *     dijiang_sample                      logits -> tokens, row_status
 *     dijiang_advance                     tokens -> next input_ids, positions, seq_lens, draws, history, ...
 *
 * All three may be captured into one CUDA graph that is launched again and again without any work on the
 * host. Conventions are those of dijiang/kernels.h. Nothing here needs a workspace or sync memory.
 *
 * B is the batch, V the vocabulary. A BITMASK is uint32 [B, ceil(V/32)]: bit (i % 32) of word i/32 is token
 * i; bits beyond V are ignored. I is the integer type that an `integers` field names: int32 (TensorRT 8.6
 * binds that) or int64.
 */
#ifndef DIJIANG_SAMPLING_H
#define DIJIANG_SAMPLING_H

#include "dijiang/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DIJIANG_MAX_VOCABULARY 16777216

typedef enum { DIJIANG_INT32 = 0, DIJIANG_INT64 = 1 } dijiang_integers;

/* What became of a row; dijiang_sample writes one of these per row. */
typedef enum {
    DIJIANG_ROW_OK = 0,
    DIJIANG_ROW_NOT_FINITE = 1,      /* a NaN or +inf among the allowed logits */
    DIJIANG_ROW_NOTHING_ALLOWED = 2, /* every logit is -inf or not allowed */
    DIJIANG_ROW_BAD_OPTIONS = 3      /* row_options has a value out of range */
} dijiang_row_status;

/* How a token is chosen. The order is: repetition penalty, temperature, top-k, top-p, min-p, draw; each
 * filter sees the distribution that the one before left, renormalised. Ties go to the lower id. */
typedef struct {
    double temperature; /* divides the logits, >= 0; 0 takes the most likely token */
    double top_p;       /* the fewest most likely tokens that together reach it, in (0, 1]; 1: all */
    double min_p;       /* tokens at least this likely relative to the most likely one, in [0, 1]; 0: all */
    double
        repetition_penalty; /* divides positive and multiplies negative logits of seen tokens, > 0; 1: none */
    uint64_t seed;          /* of the random numbers */
    int32_t top_k;          /* the k most likely tokens, >= 0; 0: all */
    int32_t reserved;       /* 0 */
} dijiang_sampling_options;

/* The random number of a row depends on (seed, stream, draw) alone: the first 64 bits of Philox4x64-10 with
 * key (seed, stream) and counter (draw + 1, 0, 0, 0), of which the upper 53 make a number in [0, 1). It is
 * the one of numpy.random.Philox(key=[seed, stream], counter=[draw, 0, 0, 0]).random_raw().
 *
 * Softmax weights are float32 exponentials, summed as integers: the result is the same in every run, however
 * the work is cut. Against a float64 computation a draw differs only where it falls within about 1e-6 of a
 * boundary between two tokens; top-p and min-p keep one token more or less only where their threshold is that
 * close; weights below about 1e-13 (2^-44 at V = 256k) of the largest count as zero; a penalised logit is
 * rounded to float32. Greedy choice and top-k compare scores exactly, even those whose exponentials float64
 * cannot tell apart. */
typedef struct {
    const float* logits;        /* [B, V], 4-byte aligned */
    int64_t logits_row_stride;  /* elements, >= V; 0: dense */
    const uint32_t* allowed;    /* BITMASK of the ids that may be chosen; NULL: all */
    int64_t allowed_row_stride; /* words; 0: one row that serves all, [ceil(V/32)] */
    const uint32_t* seen;       /* BITMASK the repetition penalty applies to; NULL: none */
    int64_t seen_row_stride;    /* words; 0: dense */
    const dijiang_sampling_options*
        row_options;         /* [B] in device memory, one per row; NULL: `options` for all. Reserved */
    const uint64_t* streams; /* [B]; NULL: row r draws from stream r */
    const int64_t* draws;    /* [B], index of the random number; needed unless greedy. Not changed */
    void* tokens;            /* out: I [B]; -1 where row_status is not OK */
    int32_t* row_status;     /* out: [B], dijiang_row_status */
    int32_t batch, vocabulary;
    int32_t integers; /* dijiang_integers of tokens */
    int32_t reserved; /* 0 */
} dijiang_sample_buffers;

/* Chooses a token per row. options (host, copied) may be NULL if row_options is given. Outputs must not
 * overlap inputs. batch 0 does nothing. */
DIJIANG_API dijiang_status dijiang_sample(const dijiang_sampling_options* options,
                                          const dijiang_sample_buffers* buffers, dijiang_stream stream);

/* One line that says how dijiang_sample would cut the work; see dijiang_attention_plan. Reserved. Of a device that
 * is given it says at most eight blocks a row: only the GPU itself says whether it takes clusters of sixteen. */
DIJIANG_API dijiang_status dijiang_sample_plan(int32_t batch, int32_t vocabulary,
                                               const dijiang_device* device, char* text, size_t size);

/* What dijiang_advance does, row by row. A row goes on if it was not finished before and row_status is OK; then
 *
 *     history[row, history_lens[row]++] = token     if there is room
 *     seen[row] |= token
 *     draws[row] += 1
 *
 * and it finishes here if the token is one of stop_ids or history is full now. A row whose row_status is not OK
 * finishes without a token. For all rows, finished or not,
 *
 *     positions[row] += seq_lens[row]               what this step has read
 *     seq_lens[row] = 1 if the row goes on, else 0  what the next step shall read
 *     input_ids[row] = the token, or pad_id for finished rows
 *
 * so that finished rows are empty rows, whose state no kernel touches. history and active are Reserved. */
typedef struct {
    const void* tokens;         /* I [B], of dijiang_sample */
    const int32_t* row_status;  /* [B], of dijiang_sample; NULL: all OK */
    void* positions;            /* in, out: I [B]; or NULL */
    void* seq_lens;             /* in, out: I [B]; or NULL */
    int64_t* draws;             /* in, out: [B]; or NULL */
    void* input_ids;            /* out: I [B, 1]; may be `tokens` itself; or NULL */
    void* history;              /* out: I [B, history_max]; or NULL */
    int32_t* history_lens;      /* in, out: [B]; needed with history */
    int64_t history_row_stride; /* elements, >= history_max; 0: dense */
    uint32_t* seen;             /* in, out: BITMASK; or NULL */
    int64_t seen_row_stride;    /* words; 0: dense */
    int32_t* finished;          /* in, out: [B], 0 or 1, zeroed by whoever starts rows; needed */
    const int32_t* stop_ids;   /* [stop_count]; or NULL */
    int32_t* active;           /* out: [1], rows that go on; or NULL */
    int32_t batch, vocabulary; /* vocabulary: tokens are 0..V-1; one that is not finishes its row */
    int32_t history_max, stop_count;
    int32_t pad_id;
    int32_t integers; /* dijiang_integers of tokens, positions, seq_lens, input_ids, history */
} dijiang_advance_buffers;

DIJIANG_API dijiang_status dijiang_advance(const dijiang_advance_buffers* buffers, dijiang_stream stream);

#ifdef __cplusplus
}
#endif
#endif
