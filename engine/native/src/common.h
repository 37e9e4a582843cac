/* What the kernels share: bfloat16 in 512-bit registers, and a loop over tasks on all threads.
 *
 * Everything here needs AVX-512 F, BW, DQ and VL; library.py looks before it calls. Sums are float32.
 */
#ifndef CHORUS_COMMON_H
#define CHORUS_COMMON_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16 /* float32 in a register */

typedef uint16_t bf16;

typedef enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 } element;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t item_bytes(element type) { return type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1; }

/* The lowest n lanes; none below 0, all from 16 on. */
INLINE __mmask16 first(int64_t n) { return (__mmask16)(n <= 0 ? 0 : n >= LANES ? 0xffff : (1u << n) - 1); }

INLINE __m512 widen_codes(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

/* Rounds to nearest, ties to even. A NaN stays one: adding to its bits could carry it into infinity. */
INLINE __m256i narrow(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

/* Elements i .. i + 15 of an array; `type` is a constant wherever this is inlined. */
INLINE __m512 load(const void *p, int64_t i, element type) {
    if (type == INT8) return widen_codes(_mm_loadu_si128((const __m128i *)((const int8_t *)p + i)));
    if (type == BFLOAT16) return widen(_mm256_loadu_si256((const __m256i *)((const bf16 *)p + i)));
    return _mm512_loadu_ps((const float *)p + i);
}

/* As `load`, lanes outside `mask` zero and not read. */
INLINE __m512 load_some(const void *p, int64_t i, __mmask16 mask, element type) {
    if (type == INT8) return widen_codes(_mm_maskz_loadu_epi8(mask, (const int8_t *)p + i));
    if (type == BFLOAT16) return widen(_mm256_maskz_loadu_epi16(mask, (const bf16 *)p + i));
    return _mm512_maskz_loadu_ps(mask, (const float *)p + i);
}

/* FLOAT32 or BFLOAT16: nothing is stored as INT8. */
INLINE void store_some(void *p, int64_t i, __mmask16 mask, __m512 x, element type) {
    if (type == BFLOAT16)
        _mm256_mask_storeu_epi16((bf16 *)p + i, mask, narrow(x));
    else
        _mm512_mask_storeu_ps((float *)p + i, mask, x);
}

/* Memory of the calling thread, one piece for each use. Its content may be gone at the next call. NULL without memory. */
typedef enum { WIDE, PAIRS, LOW_RANK, SCORES, DECODER, FORMS, WEIGHTS, NUM_SCRATCH } scratch_use;
void *scratch_memory(scratch_use use, size_t bytes);

/* Calls task(args, i) once for each i in 0 .. num_tasks - 1, begun in ascending order, on all threads. */
typedef void (*task_fn)(void *args, int64_t index);
void run_tasks(task_fn task, void *args, int64_t num_tasks);

/* The same, on the caller's thread alone if it would be done before another woke up. `work`: elements of a row. */
INLINE void run_rows(task_fn task, void *args, int64_t rows, int64_t work) {
    if (rows * work >= 1 << 13) return run_tasks(task, args, rows);
    for (int64_t row = 0; row < rows; row++) task(args, row);
}

/* e^x by Cephes' polynomial, relative error below 2e-7; zero below -87. */
INLINE __m512 exp512(__m512 x) {
    const __m512 low = _mm512_set1_ps(-87.0f);
    const __mmask16 tiny = _mm512_cmp_ps_mask(x, low, _CMP_LT_OQ);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(low, x)); /* of two operands, a NaN second is kept */
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps((__mmask16)~tiny, p, n);
}

#endif
