/* A run of decoder layers in one call: attention and gated MLP, each behind an RMSNorm and added to the residual stream.
 *
 *     x += o(attention(rope(norm(q(n))), rope(norm(k(n))), v(n)))   with n = norm(x)
 *     x += down(silu(gate(n)) * up(n))                              with n = norm(x)
 *
 * Between the products everything is float32; what the KV cache holds has its own type.
 */
#include "decoder.h"

#include "elementwise.h"

#define MLP_ROWS 192 /* rows of the wide hidden layer at a time: it stays in the cache */

typedef struct {
    const decoder *d;
    const decoder_layer *layer;
    const kv_cache *cache;
    const attention_rows *rows;
    const void *cos, *sin; /* [T, rotary_dims], of the model's type */
    element type;
    float *x, *n;       /* [T, hidden]: residual stream, normalised */
    float *q, *k, *v;   /* [T, heads * D] */
    float *mixed;       /* [T, Hq * D] */
    float *gate, *up;   /* [MLP_ROWS, intermediate] */
    const void *norm_weight, *input;
    void *output;
} state;

static void normalise_row(void *args, int64_t row) {
    const state *s = args;
    const int64_t at = row * s->d->hidden;
    if (s->type == BFLOAT16)
        rms_norm_row(s->x + at, FLOAT32, s->norm_weight, BFLOAT16, s->n + at, FLOAT32, s->d->hidden, s->layer->norm_eps, 0);
    else
        rms_norm_row(s->x + at, FLOAT32, s->norm_weight, FLOAT32, s->n + at, FLOAT32, s->d->hidden, s->layer->norm_eps, 0);
}

static void normalise(state *s, const void *weight) {
    s->norm_weight = weight;
    run_rows(normalise_row, s, s->rows->num_rows, s->d->hidden);
}

static linear_call call_of(const state *s, const float *x, int64_t in_features, int64_t rows, int32_t adds,
                           const lora_chunk *chunks, int64_t num_chunks) {
    return (linear_call){x, rows, in_features, in_features, s->type, FLOAT32, adds, chunks, num_chunks};
}

/* Rotates the pairs (i, i + half) of one head (RoFormer, arXiv 2104.09864), after its norm where it has one. */
INLINE void finish_head(const state *s, float *head, const void *norm, int64_t row, element type) {
    const int64_t dims = s->cache->head_dim, rotary = s->d->rotary_dims, half = rotary / 2;
    if (norm) rms_norm_row(head, FLOAT32, norm, type, head, FLOAT32, dims, s->layer->head_norm_eps, 0);
    for (int64_t i = 0; i < half; i += LANES) {
        const __mmask16 mask = first(half - i);
        const __m512 a = load_some(head, i, mask, FLOAT32), b = load_some(head, half + i, mask, FLOAT32);
        const __m512 cos_a = load_some(s->cos, row * rotary + i, mask, type);
        const __m512 sin_a = load_some(s->sin, row * rotary + i, mask, type);
        const __m512 cos_b = load_some(s->cos, row * rotary + half + i, mask, type);
        const __m512 sin_b = load_some(s->sin, row * rotary + half + i, mask, type);
        store_some(head, i, mask, _mm512_fnmadd_ps(b, sin_a, _mm512_mul_ps(a, cos_a)), FLOAT32);
        store_some(head, half + i, mask, _mm512_fmadd_ps(a, sin_b, _mm512_mul_ps(b, cos_b)), FLOAT32);
    }
}

INLINE void finish_row(const state *s, int64_t row, element type) {
    const int64_t dims = s->cache->head_dim, heads = s->d->num_heads, kv_heads = s->cache->num_kv_heads;
    const int64_t slot = s->rows->slot_mapping[row];
    for (int64_t h = 0; h < heads; h++) finish_head(s, s->q + (row * heads + h) * dims, s->layer->q_norm, row, type);
    for (int64_t h = 0; h < kv_heads; h++) {
        float *key = s->k + (row * kv_heads + h) * dims;
        finish_head(s, key, s->layer->k_norm, row, type);
        cache_write(s->cache, s->layer->index, slot, 0, h, key, 0, FLOAT32);
        cache_write(s->cache, s->layer->index, slot, 1, h, s->v, (row * kv_heads + h) * dims, FLOAT32);
    }
}

static void finish_row_bf16(void *args, int64_t row) { finish_row(args, row, BFLOAT16); }
static void finish_row_float(void *args, int64_t row) { finish_row(args, row, FLOAT32); }

static int32_t attention_block(state *s, const lora_chunk *chunks, int64_t num_chunks) {
    const decoder_layer *layer = s->layer;
    const int64_t rows = s->rows->num_rows, dims = s->cache->head_dim, kv_heads = s->cache->num_kv_heads;
    const int64_t width = s->d->num_heads * dims;
    normalise(s, layer->input_norm);
    member qkv[3] = {layer->q, layer->k, layer->v};
    qkv[0].y = s->q, qkv[1].y = s->k, qkv[2].y = s->v;
    const linear_call in = call_of(s, s->n, s->d->hidden, rows, 0, chunks, num_chunks);
    if (linear_forward(&in, qkv, 3)) return -1;
    run_rows(s->type == BFLOAT16 ? finish_row_bf16 : finish_row_float, s, rows, width + 2 * kv_heads * dims);
    const attention_layer attention = {.index = layer->index,
                                       .num_heads = s->d->num_heads,
                                       .window = layer->window,
                                       .q_row = width,
                                       .q_head = dims,
                                       .scaling = layer->scaling};
    if (attention_forward(s->cache, s->rows, &attention, s->q, s->mixed)) return -1;
    member o = layer->o;
    o.y = s->x;
    const linear_call out = call_of(s, s->mixed, width, rows, 1, chunks, num_chunks);
    return linear_forward(&out, &o, 1);
}

static void activate_row(void *args, int64_t row) {
    const state *s = args;
    const int64_t width = s->d->intermediate, begin = row * width;
    silu_mul_range(s->gate + begin, s->up + begin, s->gate + begin, 0, width, FLOAT32);
}

/* The chunks of rows begin .. end - 1, renumbered from `begin`; chunks ascend and never cross a multiple of MLP_ROWS. */
static int64_t cut_chunks(const lora_chunk *chunks, int64_t num_chunks, int64_t begin, int64_t end, lora_chunk *cut) {
    int64_t count = 0;
    for (int64_t i = 0; i < num_chunks; i++) {
        const int64_t from = chunks[i].row > begin ? chunks[i].row : begin;
        const int64_t to = min64(chunks[i].row + chunks[i].num_rows, end);
        if (from < to) cut[count++] = (lora_chunk){(int32_t)(from - begin), (int32_t)(to - from), chunks[i].slot};
    }
    return count;
}

static int32_t mlp_block(state *s, const lora_chunk *chunks, int64_t num_chunks) {
    const decoder_layer *layer = s->layer;
    normalise(s, layer->post_norm);
    for (int64_t begin = 0; begin < s->rows->num_rows; begin += MLP_ROWS) {
        const int64_t rows = min64(MLP_ROWS, s->rows->num_rows - begin);
        lora_chunk cut[MLP_ROWS];
        const int64_t num_cut = cut_chunks(chunks, num_chunks, begin, begin + rows, cut);
        member wide[2] = {layer->gate, layer->up}, down = layer->down;
        wide[0].y = s->gate, wide[1].y = s->up, down.y = s->x + begin * s->d->hidden;
        const linear_call in = call_of(s, s->n + begin * s->d->hidden, s->d->hidden, rows, 0, cut, num_cut);
        if (linear_forward(&in, wide, 2)) return -1;
        run_rows(activate_row, s, rows, s->d->intermediate);
        const linear_call out = call_of(s, s->gate, s->d->intermediate, rows, 1, cut, num_cut);
        if (linear_forward(&out, &down, 1)) return -1;
    }
    return 0;
}

INLINE void convert_row(const void *from, element from_type, void *to, element to_type, int64_t row, int64_t columns) {
    for (int64_t i = 0; i < columns; i += LANES) {
        const __mmask16 mask = first(columns - i);
        store_some(to, row * columns + i, mask, load_some(from, row * columns + i, mask, from_type), to_type);
    }
}

static void read_row(void *args, int64_t row) {
    const state *s = args;
    if (s->type == BFLOAT16)
        convert_row(s->input, BFLOAT16, s->x, FLOAT32, row, s->d->hidden);
    else
        convert_row(s->input, FLOAT32, s->x, FLOAT32, row, s->d->hidden);
}

static void write_row(void *args, int64_t row) {
    const state *s = args;
    if (s->type == BFLOAT16)
        convert_row(s->x, FLOAT32, s->output, BFLOAT16, row, s->d->hidden);
    else
        convert_row(s->x, FLOAT32, s->output, FLOAT32, row, s->d->hidden);
}

/* input, output [T, hidden], cos, sin [T, rotary_dims]: contiguous, of the model's type; hidden, intermediate and
 * Hq * D are even. Returns 0, or -1 without memory. */
int32_t chorus_decoder(const decoder *d, const void *input, void *output, const void *cos, const void *sin,
                       const kv_cache *cache, const attention_rows *rows, const lora_chunk *chunks, int64_t num_chunks) {
    const int64_t count = rows->num_rows, q_width = d->num_heads * cache->head_dim;
    const int64_t kv_width = cache->num_kv_heads * cache->head_dim, mlp = min64(count, MLP_ROWS) * d->intermediate;
    float *memory = scratch_memory(DECODER, (size_t)(count * 2 * (d->hidden + q_width + kv_width) + 2 * mlp) * sizeof(float));
    if (!memory) return -1;
    state s = {.d = d, .cache = cache, .rows = rows, .cos = cos, .sin = sin, .input = input, .output = output};
    s.type = d->is_bf16 ? BFLOAT16 : FLOAT32;
    s.x = memory, s.n = s.x + count * d->hidden;
    s.q = s.n + count * d->hidden, s.mixed = s.q + count * q_width;
    s.k = s.mixed + count * q_width, s.v = s.k + count * kv_width;
    s.gate = s.v + count * kv_width, s.up = s.gate + mlp;
    run_rows(read_row, &s, count, d->hidden);
    for (int64_t i = 0; i < d->num_layers; i++) {
        s.layer = d->layers + i;
        if (attention_block(&s, chunks, num_chunks) || mlp_block(&s, chunks, num_chunks)) return -1;
    }
    run_rows(write_row, &s, count, d->hidden);
    return 0;
}
