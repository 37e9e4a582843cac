/* Decoder layers of the Llama kind, as library.py describes them. */
#ifndef CHORUS_DECODER_H
#define CHORUS_DECODER_H

#include "attention.h"
#include "linear.h"

/* Weights have the model's element type. The members' y is set here. */
typedef struct {
    member q, k, v, o, gate, up, down;
    const void *input_norm, *post_norm; /* [hidden] */
    const void *q_norm, *k_norm;        /* [D], or NULL */
    int64_t index, window;              /* of the KV cache; 0: none */
    float scaling, norm_eps, head_norm_eps;
} decoder_layer;

typedef struct {
    const decoder_layer *layers;
    int64_t num_layers, hidden, intermediate, num_heads, rotary_dims;
    int32_t is_bf16;
} decoder;

#endif
