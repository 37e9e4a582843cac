/* Products of fixed-point rows with a panel of integer codes. Included once for each instruction set, with
 *     TILE, INTEGER_SUM  the names to define
 *     TARGET             an attribute of functions
 *     DOT(sums, w, x)    sums + products of four unsigned bytes with four signed ones, in 16 lanes
 *
 * x is signed bytes, or pairs of them: high * 256 + low. Codes are unsigned: what was added to them is taken off at the
 * end of a block, times the sum of its inputs. All of that is exact: a block has at most 128 inputs of two bytes or 1024
 * of one, its codes and zeros are below 2^9, and so the result is below 2^31, whatever wraps on the way.
 */
TARGET INLINE void TILE(const int rows, const int planes, const int nibbles, const int has_zeros, const quantized_inputs *in,
                        int64_t row, const char *w, __m512 (*sum)[2]) {
    const int chains = rows <= 2 ? 2 : 1; /* sums of a few rows wait for each other */
    const int64_t row_bytes = planes * in->columns, block = in->block;
    const char *x = (const char *)in->x + row * row_bytes;
    const __m512i low_halves = _mm512_set1_epi8(15), offset = _mm512_set1_epi32(nibbles ? 8 : 128);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t b = row * in->num_blocks, group = 0; group < in->num_groups; group++) {
        const float *scales = (const float *)w;
        __m512i shift[2] = {offset, offset};
        w += PANEL * sizeof(float);
        if (has_zeros) {
            shift[0] = _mm512_add_epi32(offset, _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)w)));
            shift[1] = _mm512_add_epi32(offset, _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)w + 1)));
            w += PANEL * sizeof(int16_t);
        }
        for (int64_t i = 0; i < in->blocks_of_group; i++, b++, x += block) {
            __m512i s[TILE_ROWS][2][2][2]; /* by row, plane, chain, half */
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
                for (int p = 0; p < planes; p++)
#pragma GCC unroll 2
                    for (int c = 0; c < chains; c++) s[m][p][c][0] = s[m][p][c][1] = _mm512_setzero_si512();
            for (int64_t k = 0; k < block; k += 8) {
                __m512i codes[2][2]; /* of inputs k .. k + 3 and k + 4 .. k + 7 */
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const __m512i v = _mm512_loadu_si512(w + half * 64);
                    _mm_prefetch(w + half * 64 + AHEAD_BYTES, _MM_HINT_T1);
                    codes[0][half] = nibbles ? _mm512_and_si512(v, low_halves) : v;
                    if (nibbles) {
                        codes[1][half] = _mm512_and_si512(_mm512_srli_epi16(v, 4), low_halves);
                    } else {
                        codes[1][half] = _mm512_loadu_si512(w + 128 + half * 64);
                        _mm_prefetch(w + 128 + half * 64 + AHEAD_BYTES, _MM_HINT_T1);
                    }
                }
                w += nibbles ? 128 : 256;
#pragma GCC unroll 2
                for (int part = 0; part < 2; part++)
#pragma GCC unroll 12
                    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
                        for (int p = 0; p < planes; p++) {
                            int32_t four;
                            __builtin_memcpy(&four, x + m * row_bytes + p * in->columns + k + part * 4, sizeof four);
                            const __m512i v = _mm512_set1_epi32(four);
                            __m512i *to = s[m][p][chains == 2 ? part : 0];
                            to[0] = DOT(to[0], codes[part][0], v);
                            to[1] = DOT(to[1], codes[part][1], v);
                        }
            }
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                const __m512i inputs = _mm512_set1_epi32(in->sums[b + m * in->num_blocks]);
                const __m512 scale = _mm512_set1_ps(in->scales[b + m * in->num_blocks]);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    __m512i total = s[m][0][0][half];
                    if (chains == 2) total = _mm512_add_epi32(total, s[m][0][1][half]);
                    if (planes == 2) {
                        total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), s[m][planes - 1][0][half]);
                        if (chains == 2) total = _mm512_add_epi32(total, s[m][planes - 1][chains - 1][half]);
                    }
                    total = _mm512_sub_epi32(total, _mm512_mullo_epi32(shift[half], inputs));
                    const __m512 w_scale = _mm512_loadu_ps(scales + half * LANES);
                    sum[m][half] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), scale), w_scale, sum[m][half]);
                }
            }
        }
    }
}

#define ROWS_OF_PLANES(n, planes)                                  \
    case n:                                                        \
        if (q->kind == CODE_INT4)                                  \
            TILE(n, planes, 1, q->has_zeros, in, row, panel, sum); \
        else                                                       \
            TILE(n, planes, 0, q->has_zeros, in, row, panel, sum); \
        return;

TARGET static void INTEGER_SUM(const quantization *q, const quantized_inputs *in, int64_t row, int64_t rows,
                               const char *panel, __m512 (*sum)[2]) {
    if (in->planes == 2) {
        switch (rows) {
            ROWS_OF_PLANES(1, 2) ROWS_OF_PLANES(2, 2) ROWS_OF_PLANES(3, 2)
            ROWS_OF_PLANES(4, 2) ROWS_OF_PLANES(5, 2) ROWS_OF_PLANES(6, 2)
        }
        return;
    }
    switch (rows) {
        ROWS_OF_PLANES(1, 1) ROWS_OF_PLANES(2, 1) ROWS_OF_PLANES(3, 1) ROWS_OF_PLANES(4, 1)
        ROWS_OF_PLANES(5, 1) ROWS_OF_PLANES(6, 1) ROWS_OF_PLANES(7, 1) ROWS_OF_PLANES(8, 1)
        ROWS_OF_PLANES(9, 1) ROWS_OF_PLANES(10, 1) ROWS_OF_PLANES(11, 1) ROWS_OF_PLANES(12, 1)
    }
}

#undef ROWS_OF_PLANES
#undef TILE
#undef INTEGER_SUM
#undef TARGET
#undef DOT
