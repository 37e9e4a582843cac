/* y = x W^T + bias for a few rows, several W that read the same x in one call; then LoRA.
 *
 * Weights are packed in panels of 32 outputs. bfloat16: [out / 32][in / 2][32][2], so that a register holds 16 outputs of
 * two neighbouring inputs. Its low halves, shifted up, are float32 weights of the even input, its high halves, masked,
 * those of the odd one: two cheap instructions make two operands, and `vdpbf16ps` reads the same layout where it exists.
 * float32: [out / 32][in][32]. A tile of up to 12 rows x 32 outputs stays in 24 registers over the whole sum.
 *
 * A row's sums are made in the same order whatever rows are beside it: results do not depend on the batch.
 */
#include "linear.h"

#include "quantized.h"

#define BLOCK_BYTES (384 << 10) /* of x that stays in a core's cache while panels pass by */

typedef struct {
    const linear_call *call;
    const bf16 *pairs; /* x in bfloat16 where the processor multiplies it, else NULL */
    const member *members;
    const quantized_inputs **inputs; /* of each member; NULL: no weight is quantized */
    int64_t block_rows, panels_per_task, num_panels;
} product;

/* Some rows of x and a panel of weights. */
typedef struct {
    const void *x;
    int64_t stride; /* elements */
    const char *w;
    int64_t columns; /* even */
} strip;

INLINE void fetch_pair(const strip *s, int64_t bytes) {
    _mm_prefetch(s->w + bytes + AHEAD_BYTES, _MM_HINT_T1);
    _mm_prefetch(s->w + bytes + AHEAD_BYTES + 64, _MM_HINT_T1);
}

INLINE void multiply_add(const int rows, const float *x, int64_t stride, __m512 a, __m512 b, __m512 *s0, __m512 *s1) {
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        const __m512 v = _mm512_set1_ps(x[m * stride]);
        s0[m] = _mm512_fmadd_ps(v, a, s0[m]);
        s1[m] = _mm512_fmadd_ps(v, b, s1[m]);
    }
}

INLINE void tile_widening(const int rows, const strip *s, __m512 *s0, __m512 *s1) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    const float *x = s->x;
    for (int64_t k = 0; k < s->columns; k += 2) {
        const __m512i w0 = _mm512_loadu_si512(s->w + k * 64), w1 = _mm512_loadu_si512(s->w + k * 64 + 64);
        fetch_pair(s, k * 64);
        __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(w0, 16)), b = _mm512_castsi512_ps(_mm512_slli_epi32(w1, 16));
        multiply_add(rows, x + k, s->stride, a, b, s0, s1);
        a = _mm512_castsi512_ps(_mm512_and_si512(w0, high)), b = _mm512_castsi512_ps(_mm512_and_si512(w1, high));
        multiply_add(rows, x + k + 1, s->stride, a, b, s0, s1);
    }
}

INLINE void tile_float(const int rows, const strip *s, __m512 *s0, __m512 *s1) {
    const float *x = s->x;
    for (int64_t k = 0; k < s->columns; k++) {
        const __m512 a = _mm512_loadu_ps(s->w + k * 128), b = _mm512_loadu_ps(s->w + k * 128 + 64);
        fetch_pair(s, k * 128);
        multiply_add(rows, x + k, s->stride, a, b, s0, s1);
    }
}

#define HAS_BF16 __attribute__((target("avx512bf16")))

HAS_BF16 INLINE void tile_pairs(const int rows, const strip *s, __m512 *s0, __m512 *s1) {
    const bf16 *x = s->x;
    for (int64_t k = 0; k < s->columns; k += 2) {
        const __m512bh a = (__m512bh)_mm512_loadu_si512(s->w + k * 64);
        const __m512bh b = (__m512bh)_mm512_loadu_si512(s->w + k * 64 + 64);
        fetch_pair(s, k * 64);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            int32_t both;
            __builtin_memcpy(&both, x + m * s->stride + k, sizeof both);
            const __m512bh v = (__m512bh)_mm512_set1_epi32(both);
            s0[m] = _mm512_dpbf16_ps(s0[m], v, a);
            s1[m] = _mm512_dpbf16_ps(s1[m], v, b);
        }
    }
}

/* One loop for each number of rows, so that the sums stay in registers. */
#define ROWS_OF_TILE(KERNEL, n)                                                                       \
    case n: {                                                                                         \
        __m512 s0[n], s1[n];                                                                          \
        _Pragma("GCC unroll 12") for (int m = 0; m < n; m++) s0[m] = s1[m] = _mm512_setzero_ps();     \
        KERNEL(n, s, s0, s1);                                                                         \
        _Pragma("GCC unroll 12") for (int m = 0; m < n; m++) sum[m][0] = s0[m], sum[m][1] = s1[m];    \
        return;                                                                                       \
    }
#define SUM_FUNCTION(NAME, KERNEL)                                                                    \
    static void NAME(int64_t rows, const strip *s, __m512 (*sum)[2]) {                                \
        switch (rows) {                                                                               \
            ROWS_OF_TILE(KERNEL, 1) ROWS_OF_TILE(KERNEL, 2) ROWS_OF_TILE(KERNEL, 3) ROWS_OF_TILE(KERNEL, 4)    \
            ROWS_OF_TILE(KERNEL, 5) ROWS_OF_TILE(KERNEL, 6) ROWS_OF_TILE(KERNEL, 7) ROWS_OF_TILE(KERNEL, 8)    \
            ROWS_OF_TILE(KERNEL, 9) ROWS_OF_TILE(KERNEL, 10) ROWS_OF_TILE(KERNEL, 11) ROWS_OF_TILE(KERNEL, 12) \
        }                                                                                             \
    }
SUM_FUNCTION(sum_widening, tile_widening)
SUM_FUNCTION(sum_float, tile_float)
HAS_BF16 SUM_FUNCTION(sum_pairs, tile_pairs)

static int64_t panel_bytes(const linear_call *c) { return c->stride * PANEL * item_bytes(c->weight_type); }

static int64_t panels_of(const member *m) { return (m->out_features + PANEL - 1) / PANEL; }

/* A panel of one member, and how it is read. */
typedef struct {
    const member *member;
    const quantized_inputs *inputs; /* NULL: the weight is not quantized */
    const char *weight;
    const float *unpacked; /* or NULL */
    int64_t index;
} panel;

static panel open_panel(const product *p, const member *m, int64_t index) {
    const quantized_inputs *inputs = m->quantization ? p->inputs[m - p->members] : NULL;
    const int64_t bytes = inputs ? quantized_panel_bytes(m->quantization, p->call->in_features) : panel_bytes(p->call);
    return (panel){m, inputs, (const char *)m->weight + index * bytes, NULL, index};
}

static void sum_tile(const product *p, const panel *w, int64_t row, int64_t rows, __m512 (*sum)[2]) {
    const linear_call *c = p->call;
    strip s = {c->x + row * c->stride, c->stride, w->weight, c->stride};
    if (w->inputs) {
        quantized_sum(w->member->quantization, w->inputs, row, rows, w->weight, w->unpacked, sum);
    } else if (c->weight_type == FLOAT32) {
        sum_float(rows, &s, sum);
    } else if (p->pairs) {
        s.x = p->pairs + row * c->stride;
        sum_pairs(rows, &s, sum);
    } else {
        sum_widening(rows, &s, sum);
    }
}

/* Rows row .. row + rows - 1 of one panel of outputs. */
static void do_tile(const product *p, const panel *w, int64_t row, int64_t rows) {
    const linear_call *c = p->call;
    const member *m = w->member;
    __m512 sum[TILE_ROWS][2];
    sum_tile(p, w, row, rows, sum);
    for (int64_t half = 0; half < 2; half++) {
        const int64_t column = w->index * PANEL + half * LANES, left = m->out_features - column;
        if (left <= 0) return;
        const __mmask16 mask = first(min64(left, LANES));
        const __m512 bias = m->bias ? load_some(m->bias, column, mask, c->weight_type) : _mm512_setzero_ps();
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = (row + i) * m->out_features + column;
            __m512 y = _mm512_add_ps(sum[i][half], bias);
            if (c->adds) y = _mm512_add_ps(y, load_some(m->y, at, mask, FLOAT32));
            store_some(m->y, at, mask, y, c->y_type);
        }
    }
}

static void do_panels(void *args, int64_t index) {
    const product *p = args;
    const int64_t chunks = (p->num_panels + p->panels_per_task - 1) / p->panels_per_task;
    const int64_t begin = index / chunks * p->block_rows, end = min64(begin + p->block_rows, p->call->rows);
    int64_t next = index % chunks * p->panels_per_task;
    int64_t left = min64(p->panels_per_task, p->num_panels - next);
    const member *m = p->members;
    while (next >= panels_of(m)) next -= panels_of(m++);
    for (; left > 0; left--, next++) {
        if (next == panels_of(m)) next = 0, m++;
        panel w = open_panel(p, m, next);
        const int64_t most = w.inputs ? quantized_rows_of_tile(w.inputs) : TILE_ROWS;
        const int64_t tiles = (end - begin + most - 1) / most; /* of about equal size: 26 rows are 9 + 9 + 8 */
        if (w.inputs && tiles > 1) w.unpacked = quantized_unpack(m->quantization, w.inputs, w.weight);
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t from = begin + (end - begin) * t / tiles, to = begin + (end - begin) * (t + 1) / tiles;
            do_tile(p, &w, from, to - from);
        }
    }
}

typedef struct {
    const linear_call *call;
    bf16 *pairs;
} narrowing;

static void narrow_row(void *args, int64_t row) {
    const narrowing *n = args;
    const int64_t stride = n->call->stride;
    for (int64_t k = 0; k < stride; k += LANES) {
        const __mmask16 mask = first(min64(LANES, stride - k));
        const __m512 x = load_some(n->call->x, row * stride + k, mask, FLOAT32);
        store_some(n->pairs, row * stride + k, mask, x, BFLOAT16);
    }
}

static int32_t multiplies_bf16;

/* Use `vdpbf16ps`. Only where the processor has it. */
void chorus_use_bf16_instructions(int32_t yes) { multiplies_bf16 = yes; }

int32_t linear_forward(const linear_call *call, const member *members, int64_t num_members) {
    product p = {.call = call, .members = members};
    int64_t num_quantized = 0;
    for (int64_t i = 0; i < num_members; i++) num_quantized += members[i].quantization != NULL;
    if (num_quantized && prepare_inputs(call, members, num_members, &p.inputs)) return -1;
    if (multiplies_bf16 && call->weight_type == BFLOAT16 && num_quantized < num_members) {
        narrowing n = {call, scratch_memory(PAIRS, (size_t)(call->rows * call->stride) * sizeof(bf16))};
        if (!n.pairs) return -1;
        run_rows(narrow_row, &n, call->rows, call->stride);
        p.pairs = n.pairs;
    }
    for (int64_t i = 0; i < num_members; i++) p.num_panels += panels_of(members + i);
    p.block_rows = BLOCK_BYTES / ((int64_t)sizeof(float) * call->stride) / TILE_ROWS * TILE_ROWS;
    if (p.block_rows < 2 * TILE_ROWS) p.block_rows = 2 * TILE_ROWS;
    const int64_t num_blocks = (call->rows + p.block_rows - 1) / p.block_rows;
    p.panels_per_task = p.num_panels / 6; /* three tasks for each of two threads, or more */
    if (p.panels_per_task > 16) p.panels_per_task = 16;
    if (p.panels_per_task < 1) p.panels_per_task = 1;
    run_tasks(do_panels, &p, num_blocks * ((p.num_panels + p.panels_per_task - 1) / p.panels_per_task));
    return call->num_chunks ? add_lora(call, members, num_members) : 0;
}

typedef struct {
    const void *x;
    int64_t columns, stride;
    element type;
    float *wide;
} widening;

static void widen_row(void *args, int64_t row) {
    const widening *c = args;
    for (int64_t k = 0; k < c->stride; k += LANES) {
        const __mmask16 mask = first(min64(LANES, c->columns - k)), all = first(min64(LANES, c->stride - k));
        _mm512_mask_storeu_ps(c->wide + row * c->stride + k, all, load_some(c->x, row * c->columns + k, mask, c->type));
    }
}

/* x [rows, in_features] of the weights' type, y of each member [rows, out_features], bfloat16 or float32: contiguous.
 * Returns 0, or -1 without memory. */
int32_t chorus_linear(const void *x, int64_t rows, int64_t in_features, const member *members, int64_t num_members,
                      const lora_chunk *chunks, int64_t num_chunks, int32_t is_bf16, int32_t y_is_bf16) {
    const element type = is_bf16 ? BFLOAT16 : FLOAT32, y_type = y_is_bf16 ? BFLOAT16 : FLOAT32;
    const int64_t stride = (in_features + 1) / 2 * 2;
    linear_call call = {x, rows, stride, in_features, type, y_type, 0, chunks, num_chunks};
    if (is_bf16 || stride != in_features) {
        widening c = {x, in_features, stride, type, scratch_memory(WIDE, (size_t)(rows * stride) * sizeof(float))};
        if (!c.wide) return -1;
        run_rows(widen_row, &c, rows, stride);
        call.x = c.wide;
    }
    return linear_forward(&call, members, num_members);
}

/* y += LoRA, without a linear layer. x and y [rows, ..] float32, contiguous. Returns 0, or -1 without memory. */
int32_t chorus_add_lora(const float *x, int64_t rows, int64_t in_features, const member *members, int64_t num_members,
                        const lora_chunk *chunks, int64_t num_chunks) {
    const linear_call call = {x, rows, in_features, in_features, FLOAT32, FLOAT32, 0, chunks, num_chunks};
    return add_lora(&call, members, num_members);
}

typedef struct {
    const char *weight;
    int64_t out_features, in_features;
    char *packed;
    int64_t bytes; /* of an element */
} packing;

static void pack_panel(void *args, int64_t panel) {
    const packing *p = args;
    const int64_t stride = (p->in_features + 1) / 2 * 2;
    char *to = p->packed + panel * PANEL * stride * p->bytes;
    for (int64_t k = 0; k < stride; k++)
        for (int64_t j = 0; j < PANEL; j++) {
            const int64_t n = panel * PANEL + j;
            char *cell = to + (p->bytes == 2 ? (k / 2 * PANEL + j) * 2 + k % 2 : k * PANEL + j) * p->bytes;
            if (n < p->out_features && k < p->in_features)
                __builtin_memcpy(cell, p->weight + (n * p->in_features + k) * p->bytes, (size_t)p->bytes);
            else
                __builtin_memset(cell, 0, (size_t)p->bytes);
        }
}

/* weight [out, in] -> packed, of ceil(out / 32) * 32 * (in rounded up to even) elements. */
void chorus_pack(const void *weight, int64_t out_features, int64_t in_features, void *packed, int32_t is_bf16) {
    packing p = {weight, out_features, in_features, packed, is_bf16 ? 2 : 4};
    run_tasks(pack_panel, &p, (out_features + PANEL - 1) / PANEL);
}
