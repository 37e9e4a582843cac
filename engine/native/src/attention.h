/* What a call of chorus_attention is given; library.py mirrors these structures. Strides count elements. */
#ifndef CHORUS_ATTENTION_H
#define CHORUS_ATTENTION_H

#include "common.h"

#include <float.h>
#include <math.h>

/* A section is the keys or the values of one layer in one block: elements [P, Hk, D]; if they are int8, float32 scales
 * [Hk, P] follow at scales_offset. */
typedef struct {
    void *data; /* sections [B, L, 2] */
    int64_t num_layers, block_size, num_kv_heads, head_dim;
    int64_t section_bytes, scales_offset;
    int32_t is_bf16; /* else float32: q, k, v, out, and the elements unless they are int8 */
    int32_t is_int8;
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

INLINE element cache_type(const kv_cache *kv) { return kv->is_int8 ? INT8 : kv->is_bf16 ? BFLOAT16 : FLOAT32; }

INLINE char *cache_section(const kv_cache *kv, int64_t layer, int64_t block, int64_t is_value) {
    return (char *)kv->data + ((block * kv->num_layers + layer) * 2 + is_value) * kv->section_bytes;
}

/* Where the key (or value) of one token and head lies. */
INLINE char *cache_cell(const kv_cache *kv, int64_t layer, int64_t block, int64_t is_value, int64_t offset, int64_t head) {
    const int64_t row = offset * kv->num_kv_heads + head;
    return cache_section(kv, layer, block, is_value) + row * kv->head_dim * item_bytes(cache_type(kv));
}

/* Scales of one head's int8 rows: P neighbours. */
INLINE float *cache_scales(const kv_cache *kv, int64_t layer, int64_t block, int64_t is_value, int64_t head) {
    return (float *)(cache_section(kv, layer, block, is_value) + kv->scales_offset) + head * kv->block_size;
}

/* Puts the key (or value) of one token and head, elements `from` on of `x`, into its slot. A row of int8 is x / scale,
 * rounded to nearest, with scale = max |x| / 127, or NaN if some element is no finite number. */
INLINE void cache_write(const kv_cache *kv, int64_t layer, int64_t slot, int64_t is_value, int64_t head, const void *x,
                        int64_t from, element type) {
    const int64_t block = slot / kv->block_size, offset = slot % kv->block_size, dims = kv->head_dim;
    char *to = cache_cell(kv, layer, block, is_value, offset, head);
    if (!kv->is_int8) {
        for (int64_t d = 0; d < dims; d += LANES) {
            const __mmask16 mask = first(dims - d);
            store_some(to, d, mask, load_some(x, from + d, mask, type), kv->is_bf16 ? BFLOAT16 : FLOAT32);
        }
        return;
    }
    __m512 largest = _mm512_setzero_ps();
    __mmask16 broken = 0;
    for (int64_t d = 0; d < dims; d += LANES) {
        const __m512 row = load_some(x, from + d, first(dims - d), type);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(row));
        broken |= _mm512_fpclass_ps_mask(row, 0x99); /* NaN, infinity */
    }
    const float most = _mm512_reduce_max_ps(largest) / 127.0f;
    const float scale = broken ? NAN : most > FLT_MIN ? most : FLT_MIN; /* zeros are divided by it too */
    cache_scales(kv, layer, block, is_value, head)[offset] = scale;
    for (int64_t d = 0; d < dims; d += LANES) {
        const __mmask16 mask = first(dims - d);
        const __m512 code = _mm512_div_ps(load_some(x, from + d, mask, type), _mm512_set1_ps(scale));
        _mm512_mask_cvtsepi32_storeu_epi8(to + d, mask, _mm512_cvtps_epi32(code));
    }
}

/* Attends over a cache that holds k and v of all rows. q, out [T, Hq, D] by the layer's strides and contiguous.
 * Returns 0, or -1 without memory. */
int32_t attention_forward(const kv_cache *cache, const attention_rows *rows, const attention_layer *layer,
                          const float *q, float *out);

#endif
