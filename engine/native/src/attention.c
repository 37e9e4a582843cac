/* Causal attention of a step's rows over the paged KV cache: one row per sequence (decode) or many (prefill) alike.
 *
 * A task is one KV head and a few rows of one sequence, with the query heads that share the KV head (GQA): each key is
 * read once for all of them. Keys are transposed sixteen at a time, so that a register holds one dimension of sixteen
 * keys and scores need no horizontal sums. Softmax is exact and in two passes, in float32.
 *
 * An int8 cache is multiplied by its codes alone. The scale of a key goes into its score, that of a value into its
 * weight: a product for each token instead of one for each of its elements.
 */
#include "attention.h"

#include <math.h>

#define GROUP 6 /* queries of an inner loop: their sums stay in registers */

/* One step's view of one layer. */
typedef struct {
    const kv_cache *cache;
    const attention_rows *rows;
    const attention_layer *layer;
    const char *q;
    const char *k, *v;
    char *out;
    element io; /* of q, k, v and out */
    int32_t failed;
} call;

/* A task's queries: rows x heads, of neighbouring positions from `first_position` on. */
typedef struct {
    const int64_t *table;
    int64_t kv_head, row, heads, num_queries, first_position;
    int64_t begin, end; /* positions that any of the rows may see, begin at a multiple of 16 */
    int64_t oldest;     /* the first that one does see: what lies between may be anything */
    float *queries;     /* [num_queries, D], scaled */
    float *scores;      /* [num_queries, width] */
    float *keys;        /* [D, 16] */
    float *scales[2];   /* [width], of keys and of values; NULL where the cache is not int8 */
    int64_t width;      /* end - begin, rounded up to 16 */
} task_state;

INLINE const char *cell_at(const call *c, const task_state *t, int64_t is_value, int64_t position) {
    const int64_t size = c->cache->block_size;
    return cache_cell(c->cache, c->layer->index, t->table[position / size], is_value, position % size, t->kv_head);
}

/* A head's keys lie a few hundred bytes apart, and blocks anywhere: what is needed next is asked for ahead. */
INLINE void fetch(const char *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
}

static void write_row(void *args, int64_t row) {
    const call *c = args;
    const attention_layer *layer = c->layer;
    const int64_t slot = c->rows->slot_mapping[row];
    for (int64_t head = 0; head < c->cache->num_kv_heads; head++) {
        cache_write(c->cache, layer->index, slot, 0, head, c->k, row * layer->k_row + head * layer->k_head, c->io);
        cache_write(c->cache, layer->index, slot, 1, head, c->v, row * layer->v_row + head * layer->v_head, c->io);
    }
}

/* The scales of one head's keys (or values) at positions begin .. end - 1. */
static void gather_scales(const call *c, const task_state *t, int64_t is_value) {
    const int64_t size = c->cache->block_size;
    float *to = t->scales[is_value];
    for (int64_t position = t->begin; position < t->end;) {
        const int64_t stop = min64(t->end, (position / size + 1) * size), count = stop - position;
        const float *from = cache_scales(c->cache, c->layer->index, t->table[position / size], is_value, t->kv_head);
        __builtin_memcpy(to, from + position % size, (size_t)count * sizeof(float));
        to += count, position = stop;
    }
    for (int64_t i = t->end - t->begin; i < t->width; i++) t->scales[is_value][i] = 0;
}

INLINE void transpose(__m512 r[16]) {
    __m512 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
        const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* keys[d][j] = code d of key j, for `left` dimensions. Codes travel four to a lane, and are spread out afterwards. */
INLINE void spread_codes(const __m512 r[LANES], float *keys, int64_t left) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const __m512i four = _mm512_castps_si512(r[i]);
        const __m512i codes[4] = {_mm512_slli_epi32(four, 24), _mm512_slli_epi32(four, 16), _mm512_slli_epi32(four, 8), four};
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++)
            if (4 * i + b < left)
                _mm512_store_ps(keys + (4 * i + b) * LANES, _mm512_cvtepi32_ps(_mm512_srai_epi32(codes[b], 24)));
    }
}

INLINE void transpose_codes(const char *const key[LANES], float *keys, int64_t dims) {
    for (int64_t d = 0; d < dims; d += 4 * LANES) {
        __m512 r[LANES];
        const int64_t left = min64(4 * LANES, dims - d);
        const __mmask64 mask = left == 4 * LANES ? ~0ull : (1ull << left) - 1;
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) r[j] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(mask, key[j] + d));
        transpose(r);
        if (left == 4 * LANES)
            spread_codes(r, keys + d * LANES, 4 * LANES);
        else
            spread_codes(r, keys + d * LANES, left);
    }
}

/* keys[d][j] = dimension d of the key at position + j; keys behind the end repeat the last one, to be masked. */
INLINE void transpose_keys(const call *c, const task_state *t, int64_t position, element type) {
    const int64_t dims = c->cache->head_dim;
    const int64_t size = c->cache->block_size, step = c->cache->num_kv_heads * dims * item_bytes(type);
    const char *key[LANES];
    if (position + LANES < t->end) {
        const char *next = cell_at(c, t, 0, position + LANES);
        const int64_t left = size - (position + LANES) % size; /* of its block */
        for (int64_t i = 0; i < min64(LANES, left); i++) fetch(next + i * step, dims * item_bytes(type));
    }
    int64_t offset = position % size; /* dividing for every key would take longer than the products */
    key[0] = cell_at(c, t, 0, position);
    for (int64_t j = 1; j < LANES; j++) {
        if (position + j >= t->end)
            key[j] = key[j - 1];
        else if (++offset < size)
            key[j] = key[j - 1] + step;
        else
            key[j] = cell_at(c, t, 0, position + j), offset = 0;
    }
    if (type == INT8) return transpose_codes(key, t->keys, dims);
    for (int64_t d = 0; d < dims; d += LANES) {
        __m512 r[LANES];
        const int64_t left = min64(LANES, dims - d);
        const __mmask16 mask = first(left);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) r[j] = load_some(key[j], d, mask, type);
        transpose(r);
        if (left == LANES) {
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) _mm512_store_ps(t->keys + (d + j) * LANES, r[j]);
        } else {
            for (int64_t j = 0; j < left; j++) _mm512_store_ps(t->keys + (d + j) * LANES, r[j]);
        }
    }
}

INLINE void dot_group(const int queries, const task_state *t, int64_t query, int64_t dims, int64_t column) {
    __m512 even[GROUP], odd[GROUP]; /* two sums, since an addition takes longer than the next is ready */
    const float *q = t->queries + query * dims;
#pragma GCC unroll 6
    for (int i = 0; i < queries; i++) even[i] = odd[i] = _mm512_setzero_ps();
    for (int64_t d = 0; d + 2 <= dims; d += 2) {
        const __m512 k0 = _mm512_load_ps(t->keys + d * LANES), k1 = _mm512_load_ps(t->keys + (d + 1) * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < queries; i++) {
            even[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[i * dims + d]), k0, even[i]);
            odd[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[i * dims + d + 1]), k1, odd[i]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < queries; i++) {
        if (dims % 2) {
            const __m512 last = _mm512_load_ps(t->keys + (dims - 1) * LANES);
            even[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[i * dims + dims - 1]), last, even[i]);
        }
        _mm512_storeu_ps(t->scores + (query + i) * t->width + column, _mm512_add_ps(even[i], odd[i]));
    }
}

#define EACH_GROUP(C) C(1) C(2) C(3) C(4) C(5) C(6)

static void dots(const task_state *t, int64_t dims, int64_t column) {
    for (int64_t query = 0; query < t->num_queries; query += GROUP) switch (min64(GROUP, t->num_queries - query)) {
#define C(n) case n: dot_group(n, t, query, dims, column); break;
            EACH_GROUP(C)
#undef C
        }
}

/* tanh x = 1 - 2 / (e^2x + 1) */
INLINE __m512 tanh512(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = exp512(_mm512_add_ps(x, x));
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

/* The scores of one query become weights that sum to one, then take in the values' scales; weights outside its sight are
 * zero. */
static void softmax(const call *c, const task_state *t, int64_t query) {
    const int64_t position = t->first_position + query / t->heads;
    const int64_t oldest = c->layer->window ? position - c->layer->window + 1 : 0;
    float *scores = t->scores + query * t->width;
    const __m512 cap = _mm512_set1_ps(c->layer->softcap), nothing = _mm512_set1_ps(-INFINITY);
    const __m512i last = _mm512_set1_epi32((int)(position - t->begin)), from = _mm512_set1_epi32((int)(oldest - t->begin));
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 highest = nothing;
    for (int64_t i = 0; i < t->width; i += LANES) {
        const __m512i column = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        const __mmask16 seen = _mm512_cmple_epi32_mask(column, last) & _mm512_cmpge_epi32_mask(column, from);
        __m512 s = _mm512_loadu_ps(scores + i);
        if (t->scales[0]) s = _mm512_mul_ps(s, _mm512_loadu_ps(t->scales[0] + i));
        if (c->layer->softcap > 0) s = _mm512_mul_ps(cap, tanh512(_mm512_div_ps(s, cap)));
        s = _mm512_mask_mov_ps(nothing, seen, s);
        highest = _mm512_max_ps(s, highest); /* a NaN in `s` is passed over here and kept below */
        _mm512_storeu_ps(scores + i, s);
    }
    const int64_t head = t->kv_head * t->heads + query % t->heads;
    const float sink = c->layer->sinks ? c->layer->sinks[head] : -INFINITY;
    const float top = fmaxf(_mm512_reduce_max_ps(highest), sink);
    const __m512 top16 = _mm512_set1_ps(top);
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < t->width; i += LANES) {
        const __m512 w = exp512(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top16));
        total = _mm512_add_ps(total, w);
        _mm512_storeu_ps(scores + i, w);
    }
    const float sum = _mm512_reduce_add_ps(total) + (c->layer->sinks ? expf(sink - top) : 0.0f);
    const __m512 share = _mm512_set1_ps(1.0f / sum);
    for (int64_t i = 0; i < t->width; i += LANES) {
        const __m512 w = _mm512_mul_ps(share, _mm512_loadu_ps(scores + i));
        _mm512_storeu_ps(scores + i, t->scales[1] ? _mm512_mul_ps(w, _mm512_loadu_ps(t->scales[1] + i)) : w);
    }
}

/* out[query][d .. d + 16 * vectors) = sum over positions of weight * value, for a group of queries. */
INLINE void mix_group(const int queries, const int vectors, __mmask16 mask, const call *c, const task_state *t,
                      int64_t query, int64_t d, element type, element io) {
    __m512 sum[GROUP][4];
#pragma GCC unroll 6
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    const int64_t size = c->cache->block_size, step = c->cache->num_kv_heads * c->cache->head_dim * item_bytes(type);
    const float *weights = t->scores + query * t->width;
    for (int64_t position = t->oldest; position < t->end;) {
        const int64_t stop = min64(t->end, (position / size + 1) * size);
        const char *value = cell_at(c, t, 1, position);
        if (query == 0 && d == 0 && stop < t->end) {
            const char *next = cell_at(c, t, 1, stop);
            for (int64_t i = 0; i < size; i++) fetch(next + i * step, c->cache->head_dim * item_bytes(type));
        }
        for (; position < stop; position++, value += step) {
            __m512 x[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                x[v] = vectors == 1 ? load_some(value, d, mask, type) : load(value, d + v * LANES, type);
#pragma GCC unroll 6
            for (int i = 0; i < queries; i++) {
                const __m512 w = _mm512_set1_ps(weights[i * t->width + position - t->begin]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_fmadd_ps(w, x[v], sum[i][v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < queries; i++) {
        const int64_t row = t->row + (query + i) / t->heads, head = t->kv_head * t->heads + (query + i) % t->heads;
        const int64_t at = (row * c->cache->num_kv_heads * t->heads + head) * c->cache->head_dim + d;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store_some(c->out, at + v * LANES, vectors == 1 ? mask : (__mmask16)0xffff, sum[i][v], io);
    }
}

INLINE void mix(const call *c, const task_state *t, element type, element io) {
    const int64_t dims = c->cache->head_dim;
    for (int64_t query = 0; query < t->num_queries; query += GROUP) {
        const int64_t queries = min64(GROUP, t->num_queries - query);
        int64_t d = 0;
        for (; d + 4 * LANES <= dims; d += 4 * LANES) switch (queries) {
#define C(n) case n: mix_group(n, 4, 0xffff, c, t, query, d, type, io); break;
                EACH_GROUP(C)
#undef C
            }
        for (; d < dims; d += LANES) {
            const __mmask16 mask = first(min64(LANES, dims - d));
            switch (queries) {
#define C(n) case n: mix_group(n, 1, mask, c, t, query, d, type, io); break;
                EACH_GROUP(C)
#undef C
            }
        }
    }
}

INLINE void load_queries(const call *c, const task_state *t, element io) {
    const int64_t dims = c->cache->head_dim;
    const __m512 scaling = _mm512_set1_ps(c->layer->scaling);
    for (int64_t i = 0; i < t->num_queries; i++) {
        const int64_t head = t->kv_head * t->heads + i % t->heads;
        const int64_t from = (t->row + i / t->heads) * c->layer->q_row + head * c->layer->q_head;
        for (int64_t d = 0; d < dims; d += LANES) {
            const __mmask16 mask = first(min64(LANES, dims - d));
            const __m512 x = load_some(c->q, from + d, mask, io);
            _mm512_mask_storeu_ps(t->queries + i * dims + d, mask, _mm512_mul_ps(scaling, x));
        }
    }
}

INLINE void attend(call *c, int64_t index, element type, element io) {
    const kv_cache *kv = c->cache;
    const attention_tile *tile = c->rows->tiles + index / kv->num_kv_heads;
    const int64_t heads = c->layer->num_heads / kv->num_kv_heads, dims = kv->head_dim;
    task_state t = {.table = c->rows->block_tables + tile->sequence * c->rows->max_blocks,
                    .kv_head = index % kv->num_kv_heads,
                    .row = tile->row,
                    .heads = heads,
                    .num_queries = heads * tile->num_rows,
                    .first_position = tile->position,
                    .end = tile->position + tile->num_rows};
    const int64_t oldest = c->layer->window ? t.first_position - c->layer->window + 1 : 0;
    t.oldest = oldest > 0 ? oldest : 0;
    t.begin = t.oldest / LANES * LANES;
    t.width = (t.end - t.begin + LANES - 1) / LANES * LANES;
    const int64_t scales = type == INT8 ? 2 * t.width : 0;
    const int64_t floats = LANES * dims + scales + t.num_queries * (t.width + dims);
    float *memory = scratch_memory(SCORES, (size_t)floats * sizeof(float));
    if (!memory) {
        c->failed = 1;
        return;
    }
    t.keys = memory;
    t.scores = t.keys + LANES * dims + scales;
    if (type == INT8) {
        t.scales[0] = t.keys + LANES * dims, t.scales[1] = t.scales[0] + t.width;
        gather_scales(c, &t, 0), gather_scales(c, &t, 1);
    }
    t.queries = t.scores + t.num_queries * t.width;
    load_queries(c, &t, io);
    for (int64_t column = 0; column < t.width; column += LANES) {
        transpose_keys(c, &t, t.begin + column, type);
        dots(&t, dims, column);
    }
    for (int64_t query = 0; query < t.num_queries; query++) softmax(c, &t, query);
    mix(c, &t, type, io);
}

static void attend_bf16(void *args, int64_t index) { attend(args, index, BFLOAT16, BFLOAT16); }
static void attend_mixed(void *args, int64_t index) { attend(args, index, BFLOAT16, FLOAT32); }
static void attend_float(void *args, int64_t index) { attend(args, index, FLOAT32, FLOAT32); }
static void attend_int8_bf16(void *args, int64_t index) { attend(args, index, INT8, BFLOAT16); }
static void attend_int8_float(void *args, int64_t index) { attend(args, index, INT8, FLOAT32); }

static task_fn attend_of(element type, element io) {
    if (type == INT8) return io == BFLOAT16 ? attend_int8_bf16 : attend_int8_float;
    if (type == FLOAT32) return attend_float;
    return io == BFLOAT16 ? attend_bf16 : attend_mixed;
}

static int32_t attend_all(call *c) {
    run_tasks(attend_of(cache_type(c->cache), c->io), c, c->rows->num_tiles * c->cache->num_kv_heads);
    return c->failed ? -1 : 0;
}

int32_t attention_forward(const kv_cache *cache, const attention_rows *rows, const attention_layer *layer,
                          const float *q, float *out) {
    call c = {.cache = cache, .rows = rows, .layer = layer, .q = (const char *)q, .out = (char *)out, .io = FLOAT32};
    return attend_all(&c);
}

/* Writes k and v to their slots, then attends. Returns 0, or -1 without memory. out [T, Hq, D] contiguous. */
int32_t chorus_attention(const kv_cache *cache, const attention_rows *rows, const attention_layer *layer, const void *q,
                         const void *k, const void *v, void *out) {
    call c = {cache, rows, layer, q, k, v, out, cache->is_bf16 ? BFLOAT16 : FLOAT32, 0};
    run_rows(write_row, &c, rows->num_rows, cache->num_kv_heads * cache->head_dim);
    return attend_all(&c);
}
