/* Row-wise work between the large products. */
#ifndef CHORUS_ELEMENTWISE_H
#define CHORUS_ELEMENTWISE_H

#include "common.h"

/* y = x / sqrt(mean(x^2) + eps) * (offset + weight) of one row. */
INLINE void rms_norm_row(const void *x, element x_type, const void *weight, element weight_type, void *y, element y_type,
                         int64_t columns, float eps, float offset) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < columns; i += LANES) {
        const __m512 v = load_some(x, i, first(columns - i), x_type);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / (float)columns;
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + eps)), plus = _mm512_set1_ps(offset);
    for (int64_t i = 0; i < columns; i += LANES) {
        const __mmask16 mask = first(columns - i);
        const __m512 w = _mm512_add_ps(load_some(weight, i, mask, weight_type), plus);
        store_some(y, i, mask, _mm512_mul_ps(_mm512_mul_ps(load_some(x, i, mask, x_type), scale), w), y_type);
    }
}

/* y = gate / (1 + e^-gate) * up */
INLINE void silu_mul_range(const void *gate, const void *up, void *y, int64_t begin, int64_t end, element type) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t i = begin; i < end; i += LANES) {
        const __mmask16 mask = first(end - i);
        const __m512 g = load_some(gate, i, mask, type), u = load_some(up, i, mask, type);
        const __m512 e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), g));
        store_some(y, i, mask, _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(one, e)), u), type);
    }
}

#endif
