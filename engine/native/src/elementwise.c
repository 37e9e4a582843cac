/* What transformers does in half a dozen passes over small tensors, in one. */
#include "elementwise.h"

typedef struct {
    const char *x;
    const void *weight;
    char *y;
    int64_t columns;
    float eps, offset;
} norm;

INLINE void norm_row(const norm *n, int64_t row, element type) {
    const int64_t at = row * n->columns * item_bytes(type);
    rms_norm_row(n->x + at, type, n->weight, type, n->y + at, type, n->columns, n->eps, n->offset);
}

static void norm_row_bf16(void *args, int64_t row) { norm_row(args, row, BFLOAT16); }
static void norm_row_float(void *args, int64_t row) { norm_row(args, row, FLOAT32); }

/* y = x / sqrt(mean(x^2) + eps) * (offset + weight), row by row. Shapes: x, y [rows, columns]; weight [columns]. */
void chorus_rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t columns, float eps, float offset,
                     int32_t is_bf16) {
    norm n = {x, weight, y, columns, eps, offset};
    run_rows(is_bf16 ? norm_row_bf16 : norm_row_float, &n, rows, columns);
}

#define PIECE 4096

typedef struct {
    const void *gate, *up;
    void *y;
    int64_t count;
} activation;

INLINE void silu_mul_piece(const activation *a, int64_t index, element type) {
    silu_mul_range(a->gate, a->up, a->y, index * PIECE, min64(a->count, (index + 1) * PIECE), type);
}

static void silu_mul_bf16(void *args, int64_t index) { silu_mul_piece(args, index, BFLOAT16); }
static void silu_mul_float(void *args, int64_t index) { silu_mul_piece(args, index, FLOAT32); }

/* y = gate / (1 + e^-gate) * up, elementwise. */
void chorus_silu_mul(const void *gate, const void *up, void *y, int64_t count, int32_t is_bf16) {
    activation a = {gate, up, y, count};
    run_rows(is_bf16 ? silu_mul_bf16 : silu_mul_float, &a, (count + PIECE - 1) / PIECE, PIECE);
}

#define LOGIT_BLOCK 64 /* engine.runner.choice.BLOCK */

typedef struct {
    const void *logits;
    float *values, *blocks;
    uint8_t *finite;
    int64_t columns;
} scan;

INLINE void scan_row(const scan *s, int64_t row, element type) {
    const char *logits = (const char *)s->logits + row * s->columns * item_bytes(type);
    const int64_t num_blocks = (s->columns + LOGIT_BLOCK - 1) / LOGIT_BLOCK;
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    __m512 sum = _mm512_setzero_ps(); /* x * 0 is NaN for infinities and NaN, else zero */
    for (int64_t b = 0; b < num_blocks; b++) {
        __m512 highest = nothing;
        for (int64_t i = b * LOGIT_BLOCK; i < min64(s->columns, (b + 1) * LOGIT_BLOCK); i += LANES) {
            const __mmask16 mask = first(s->columns - i);
            const __m512 x = load_some(logits, i, mask, type);
            highest = _mm512_mask_max_ps(highest, mask, highest, x);
            sum = _mm512_fmadd_ps(x, _mm512_setzero_ps(), sum);
            if (s->values) _mm512_mask_storeu_ps(s->values + row * s->columns + i, mask, x);
        }
        s->blocks[row * num_blocks + b] = _mm512_reduce_max_ps(highest);
    }
    s->finite[row] = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) == 0;
}

static void scan_row_bf16(void *args, int64_t row) { scan_row(args, row, BFLOAT16); }
static void scan_row_float(void *args, int64_t row) { scan_row(args, row, FLOAT32); }

/* The largest of each 64 logits, whether all of a row are finite, and the logits as float32 unless `values` is NULL.
 * Shapes: logits, values [rows, columns]; blocks [rows, ceil(columns / 64)]; finite [rows]. */
void chorus_scan_logits(const void *logits, float *values, float *blocks, uint8_t *finite, int64_t rows, int64_t columns,
                        int32_t is_bf16) {
    scan s = {logits, values, blocks, finite, columns};
    run_rows(is_bf16 ? scan_row_bf16 : scan_row_float, &s, rows, columns);
}

typedef struct {
    const float *logits, *top, *temperature;
    float *sums;
    int64_t columns;
} weighing;

static void weigh_row(void *args, int64_t row) {
    const weighing *w = args;
    const float *logits = w->logits + row * w->columns;
    const int64_t num_blocks = (w->columns + LOGIT_BLOCK - 1) / LOGIT_BLOCK;
    const __m512 top = _mm512_set1_ps(w->top[row]), temperature = _mm512_set1_ps(w->temperature[row]);
    for (int64_t b = 0; b < num_blocks; b++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = b * LOGIT_BLOCK; i < min64(w->columns, (b + 1) * LOGIT_BLOCK); i += LANES) {
            const __mmask16 mask = first(w->columns - i);
            const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, logits + i), top);
            sum = _mm512_mask_add_ps(sum, mask, sum, exp512(_mm512_div_ps(x, temperature)));
        }
        w->sums[row * num_blocks + b] = _mm512_reduce_add_ps(sum);
    }
}

/* Sums of e^((logit - top) / temperature) over each 64 logits of a row, whose largest is `top`.
 * Shapes: logits [rows, columns]; top, temperature [rows]; sums [rows, ceil(columns / 64)]. */
void chorus_block_weights(const float *logits, const float *top, const float *temperature, float *sums, int64_t rows,
                          int64_t columns) {
    weighing w = {logits, top, temperature, sums, columns};
    run_rows(weigh_row, &w, rows, columns);
}
