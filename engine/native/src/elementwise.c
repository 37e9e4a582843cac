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
