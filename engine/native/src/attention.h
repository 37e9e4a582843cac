/* What a call of chorus_attention is given; library.py mirrors these structures. Strides count elements. */
#ifndef CHORUS_ATTENTION_H
#define CHORUS_ATTENTION_H

#include "common.h"

typedef struct {
    void *data; /* [B, L, 2, P, Hk, D] */
    int64_t num_layers, block_size, num_kv_heads, head_dim;
    int32_t is_bf16; /* else float32; q, k, v and out alike */
} kv_cache;

/* Neighbouring rows of one sequence, the first of them at `position`. */
typedef struct {
    int32_t sequence, row, num_rows, position;
} attention_tile;

/* A step's rows. */
typedef struct {
    const int64_t *slot_mapping; /* [num_rows] */
    const int64_t *block_tables; /* [S, max_blocks] */
    const attention_tile *tiles;
    int64_t max_blocks, num_rows, num_tiles;
} attention_rows;

typedef struct {
    int64_t index, num_heads;
    int64_t window; /* 0: none */
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    const float *sinks; /* [Hq] or NULL */
    float scaling, softcap; /* softcap 0: none */
} attention_layer;

/* Where the key (or value) of one token and head lies. */
INLINE char *cache_cell(const kv_cache *kv, int64_t layer, int64_t block, int64_t is_value, int64_t offset, int64_t head) {
    const int64_t page = (block * kv->num_layers + layer) * 2 + is_value;
    const int64_t row = (page * kv->block_size + offset) * kv->num_kv_heads + head;
    return (char *)kv->data + row * kv->head_dim * item_bytes(kv->is_bf16 ? BFLOAT16 : FLOAT32);
}

/* Attends over a cache that holds k and v of all rows. q, out [T, Hq, D] by the layer's strides and contiguous.
 * Returns 0, or -1 without memory. */
int32_t attention_forward(const kv_cache *cache, const attention_rows *rows, const attention_layer *layer,
                          const float *q, float *out);

#endif
