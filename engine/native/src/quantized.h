/* Products with weights in few bits; engine/quant/weight.py says what codes mean.
 *
 * A row of inputs is cut where the groups of the weight are cut, and further into blocks of at most MAX_BLOCK inputs.
 * The packed weight follows the blocks: a panel of 32 outputs is, for each group,
 *     scales float32 [32], zeros int16 [32] if there are any, then for each block of the group its codes:
 *     8 bits: [inputs / 4][32][4];   4 bits: [inputs / 8][32][4], input k + j in the low half of byte j, k + 4 + j in the high.
 * Inputs in excess of a group have the code 0 and meet an x of 0.
 */
#ifndef CHORUS_QUANTIZED_H
#define CHORUS_QUANTIZED_H

#include "linear.h"

/* What the products of some rows read of x, for members that agree on all that it depends on. */
typedef struct {
    const quantization *quantization; /* of one of the members: kind and zeros differ */
    int64_t num_groups, blocks_of_group, block; /* inputs of a block, a multiple of 8 */
    int64_t num_blocks, columns;                /* of a row: block * num_blocks */
    int64_t planes;                             /* bytes of a fixed-point input; 0: inputs are float32 */
    void *x;                                    /* [rows][planes][columns] signed bytes, high ones first, or float [rows][columns] */
    float *scales;                              /* [rows][num_blocks] */
    int32_t *sums;                              /* [rows][num_blocks] of the fixed-point inputs */
} quantized_inputs;

/* Of each member that has a quantized weight, in *inputs; valid until the thread's next call. Returns 0, or -1 without memory. */
int32_t prepare_inputs(const linear_call *call, const member *members, int64_t num_members, const quantized_inputs ***inputs);

/* Rows of x that fit into registers, beside their products with a panel. */
int64_t quantized_rows_of_tile(const quantized_inputs *inputs);

int64_t quantized_panel_bytes(const quantization *q, int64_t in_features);

/* Where several tiles share it: the panel as float32, or NULL if its codes are multiplied as they are, or without memory.
 * Valid until the thread's next call. */
const float *quantized_unpack(const quantization *q, const quantized_inputs *inputs, const char *panel);

/* sum[m][half] = rows of x times one panel of a weight; `weights`: what quantized_unpack gave, or NULL. */
void quantized_sum(const quantization *q, const quantized_inputs *inputs, int64_t row, int64_t rows, const char *panel,
                   const float *weights, __m512 (*sum)[2]);

#endif
