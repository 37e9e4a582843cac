/* LoRA for rows of many adapters at once: a task is a few rows of one adapter at one layer, shrunk and expanded.
 *
 * Each adapter's own rank is computed, straight from where its image lies (Punica's SGMV, arXiv 2310.18547, on a CPU).
 * An adapter says itself which elements it has: of codes, a register of 16 is widened as it is loaded.
 */
#include "linear.h"

typedef struct {
    const linear_call *call;
    const member *members;
    int64_t num_members;
    int32_t failed;
} addition;

/* low[row][r] = x[row] . a[r] for a tile of rows and ranks. */
INLINE void dot_tile(const int rows, const int ranks, const float *x, int64_t stride, const char *a, int64_t columns,
                     float *low, int64_t rank, element type) {
    __m512 sum[4][8];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int r = 0; r < ranks; r++) sum[m][r] = _mm512_setzero_ps();
    const int64_t row_bytes = columns * item_bytes(type);
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) {
        __m512 v[4];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) v[m] = _mm512_loadu_ps(x + m * stride + k);
#pragma GCC unroll 8
        for (int r = 0; r < ranks; r++) {
            const __m512 w = load(a + r * row_bytes, k, type);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) sum[m][r] = _mm512_fmadd_ps(v[m], w, sum[m][r]);
        }
    }
    if (k < columns) {
        const __mmask16 mask = first(columns - k);
#pragma GCC unroll 8
        for (int r = 0; r < ranks; r++) {
            const __m512 w = load_some(a + r * row_bytes, k, mask, type);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++)
                sum[m][r] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + m * stride + k), w, sum[m][r]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int r = 0; r < ranks; r++) low[m * rank + r] = _mm512_reduce_add_ps(sum[m][r]);
}

/* Sums of codes become numbers: each rank's scales, of a and of b alike, belong to the low-rank vector. */
INLINE void scale_low(float *low, int64_t rows, const lora_weights *w) {
    for (int64_t r = 0; r < w->rank; r += LANES) {
        const __mmask16 mask = first(w->rank - r);
        const __m512 of_a = load_some(w->scales, r, mask, FLOAT32);
        const __m512 of_b = load_some(w->scales, w->rank + r, mask, FLOAT32);
        for (int64_t m = 0; m < rows; m++) {
            const __m512 sums = load_some(low, m * w->rank + r, mask, FLOAT32);
            store_some(low, m * w->rank + r, mask, _mm512_mul_ps(_mm512_mul_ps(sums, of_a), of_b), FLOAT32);
        }
    }
}

INLINE void shrink(const float *x, int64_t stride, int64_t rows, int64_t columns, const lora_weights *w, float *low,
                   element type) {
    const char *a = w->a;
    const int64_t row_bytes = columns * item_bytes(type), rank = w->rank;
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) {
        int64_t r = 0;
        for (; r + 4 <= rank; r += 4)
            dot_tile(4, 4, x + m * stride, stride, a + r * row_bytes, columns, low + m * rank + r, rank, type);
        for (; r < rank; r++) dot_tile(4, 1, x + m * stride, stride, a + r * row_bytes, columns, low + m * rank + r, rank, type);
    }
    for (; m < rows; m++) {
        int64_t r = 0;
        for (; r + 8 <= rank; r += 8)
            dot_tile(1, 8, x + m * stride, stride, a + r * row_bytes, columns, low + m * rank + r, rank, type);
        for (; r < rank; r++) dot_tile(1, 1, x + m * stride, stride, a + r * row_bytes, columns, low + m * rank + r, rank, type);
    }
    if (type == INT8) scale_low(low, rows, w);
}

/* y[row, n .. n + 16 * vectors) += scaling * low[row] b for a tile of rows; only the last vector is masked. */
INLINE void expand_tile(const int rows, const int vectors, __mmask16 last, const float *low, const lora_weights *w,
                        char *y, int64_t columns, int64_t n, element type, element y_type) {
    __m512 sum[2][8];
#pragma GCC unroll 2
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sum[m][v] = _mm512_setzero_ps();
    for (int64_t r = 0; r < w->rank; r++) {
        __m512 l[2];
#pragma GCC unroll 2
        for (int m = 0; m < rows; m++) l[m] = _mm512_set1_ps(low[m * w->rank + r]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const int64_t i = r * columns + n + v * LANES;
            const __m512 b = v == vectors - 1 ? load_some(w->b, i, last, type) : load(w->b, i, type);
#pragma GCC unroll 2
            for (int m = 0; m < rows; m++) sum[m][v] = _mm512_fmadd_ps(l[m], b, sum[m][v]);
        }
    }
    const __m512 scaling = _mm512_set1_ps(w->scaling);
#pragma GCC unroll 2
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const __mmask16 mask = v == vectors - 1 ? last : (__mmask16)0xffff;
            const int64_t i = m * columns + n + v * LANES;
            store_some(y, i, mask, _mm512_fmadd_ps(scaling, sum[m][v], load_some(y, i, mask, y_type)), y_type);
        }
}

INLINE void expand(const int rows, const float *low, const lora_weights *w, char *y, int64_t columns, element type,
                   element y_type) {
    int64_t n = 0;
    for (; n + 8 * LANES <= columns; n += 8 * LANES) expand_tile(rows, 8, 0xffff, low, w, y, columns, n, type, y_type);
    for (; n < columns; n += LANES) expand_tile(rows, 1, first(columns - n), low, w, y, columns, n, type, y_type);
}

INLINE void add_weights(const linear_call *c, const member *m, const lora_chunk *chunk, const lora_weights *w, float *low,
                        element type, element y_type) {
    shrink(c->x + chunk->row * c->stride, c->stride, chunk->num_rows, c->in_features, w, low, type);
    const int64_t row_bytes = m->out_features * item_bytes(y_type);
    char *y = (char *)m->y + chunk->row * row_bytes;
    int64_t row = 0;
    for (; row + 2 <= chunk->num_rows; row += 2)
        expand(2, low + row * w->rank, w, y + row * row_bytes, m->out_features, type, y_type);
    if (row < chunk->num_rows) expand(1, low + row * w->rank, w, y + row * row_bytes, m->out_features, type, y_type);
}

INLINE void add_chunk(addition *a, int64_t index, element y_type) {
    const linear_call *c = a->call;
    const member *m = a->members + index % a->num_members;
    const lora_chunk *chunk = c->chunks + index / a->num_members;
    const lora_weights *w = m->lora + chunk->slot;
    if (!m->lora || !w->a) return;
    float *low = scratch_memory(LOW_RANK, (size_t)(chunk->num_rows * w->rank) * sizeof(float));
    if (!low)
        a->failed = 1;
    else if (w->type == INT8)
        add_weights(c, m, chunk, w, low, INT8, y_type);
    else if (w->type == BFLOAT16)
        add_weights(c, m, chunk, w, low, BFLOAT16, y_type);
    else
        add_weights(c, m, chunk, w, low, FLOAT32, y_type);
}

static void add_chunk_bf16(void *args, int64_t index) { add_chunk(args, index, BFLOAT16); }
static void add_chunk_float(void *args, int64_t index) { add_chunk(args, index, FLOAT32); }

int32_t add_lora(const linear_call *call, const member *members, int64_t num_members) {
    addition a = {call, members, num_members, 0};
    run_tasks(call->y_type == BFLOAT16 ? add_chunk_bf16 : add_chunk_float, &a, call->num_chunks * num_members);
    return a.failed ? -1 : 0;
}
