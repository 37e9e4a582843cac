/* Linear layers and their LoRA, for entry points and for the decoder. structs.py mirrors the structures. */
#ifndef CHORUS_LINEAR_H
#define CHORUS_LINEAR_H

#include "common.h"

#define PANEL 32         /* outputs of a packed panel */
#define TILE_ROWS 12     /* of x, whose products with a panel stay in registers */
#define AHEAD_BYTES 2048 /* of weights fetched before they are needed */

/* One adapter at one site: y += scaling * (x a^T) b. Shapes: a [rank, in], b [rank, out]; a is NULL in an empty slot.
 * INT8 are codes, and scales [2, rank] say what one counts in: of each row of a, then of b. */
typedef struct {
    const void *a, *b;
    int64_t rank;
    float scaling;
    int32_t type; /* element */
    const float *scales;
} lora_weights;

/* What the codes of a weight mean, and how its inputs are rounded. */
typedef enum { CODE_INT4 = 0, CODE_INT8 = 1, CODE_NF4 = 2, CODE_FP8 = 3 } code_kind;
typedef enum { KEPT = 0, TO_INT8 = 1, TO_FP8 = 2 } input_rounding;

/* How a quantized weight was packed; see quantized.h. */
typedef struct {
    const int32_t *order; /* [in]: column k of the codes is input order[k]; NULL: input k */
    int64_t group_size;   /* columns that share a scale */
    code_kind kind;
    input_rounding inputs;
    int32_t has_zeros;
} quantization;

/* One of the layers that read the same x. Weight (unless it is quantized) and bias have one element type. */
typedef struct {
    const void *weight; /* packed */
    const void *bias;   /* [out] or NULL */
    int64_t out_features;
    void *y;                           /* [rows, out] */
    const lora_weights *lora;          /* by slot, or NULL */
    const quantization *quantization;  /* or NULL */
} member;

/* Some rows of one adapter. */
typedef struct {
    int32_t row, num_rows, slot;
} lora_chunk;

/* What is the same for all members of a call. */
typedef struct {
    const float *x; /* [rows, stride]; stride is in_features rounded up to even, the column in excess zero */
    int64_t rows, stride, in_features;
    element weight_type, y_type;
    int32_t adds; /* y += instead of y =; y is float32 then */
    const lora_chunk *chunks;
    int64_t num_chunks;
} linear_call;

/* Both return 0, or -1 without memory. */
int32_t linear_forward(const linear_call *call, const member *members, int64_t num_members);
int32_t add_lora(const linear_call *call, const member *members, int64_t num_members);

#endif
