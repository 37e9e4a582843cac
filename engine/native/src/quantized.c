/* Linear layers whose weights are codes: inputs are prepared once for a call, then panels of outputs are computed.
 *
 * Integer codes meet integer inputs. An input that is kept becomes a fixed-point number of 16 bits, in units of its
 * block's largest / MAX_FIXED: finer than bfloat16, and `vpdpbusd` multiplies its two bytes apart. Nothing is rounded
 * between there and the end of a block. NF4 and FP8 codes are no multiples of anything: they become float32.
 *
 * A row's sums are made in the same order whatever rows are beside it: results do not depend on the batch.
 */
#include "quantized.h"

#define MAX_BLOCK 1024       /* inputs rounded to bytes */
#define MAX_FIXED_BLOCK 128  /* inputs of two bytes, or of float32 */
#define MAX_FIXED 32639.0f   /* 127 * 256 + 127 */
#define FP8_MAX 448.0f       /* of float8_e4m3fn */
#define FLOAT_TILE_ROWS 6    /* a row has two sums for each half of a panel */
#define SMALLEST 1e-12f      /* largest value of a row of zeros, so that nothing is divided by zero */
#define TINY 1e-24f          /* blocks of smaller inputs count as zeros */
#define NOT_FINITE 0x7f800000u /* bits of float32 from here on are infinite or NaN */

static int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static int is_integer(const quantization *q) { return q->kind == CODE_INT4 || q->kind == CODE_INT8; }

static int64_t bytes_of_codes(const quantization *q, int64_t codes) {
    return q->kind == CODE_INT4 || q->kind == CODE_NF4 ? codes / 2 : codes;
}

static quantized_inputs shape_of(const quantization *q, int64_t in_features) {
    quantized_inputs in = {.quantization = q, .num_groups = in_features / q->group_size};
    const int64_t most = is_integer(q) && q->inputs == TO_INT8 ? MAX_BLOCK : MAX_FIXED_BLOCK;
    in.blocks_of_group = (q->group_size + most - 1) / most;
    in.block = up_to((q->group_size + in.blocks_of_group - 1) / in.blocks_of_group, 8);
    in.num_blocks = in.num_groups * in.blocks_of_group;
    in.columns = in.num_blocks * in.block;
    in.planes = !is_integer(q) ? 0 : q->inputs == TO_INT8 ? 1 : 2;
    return in;
}

/* First input of a block, and how many it has: none are in excess. */
static int64_t first_of_block(const quantized_inputs *in, int64_t block, int64_t *count) {
    const int64_t begin = block % in->blocks_of_group * in->block;
    *count = min64(in->block, in->quantization->group_size - begin);
    return block / in->blocks_of_group * in->quantization->group_size + begin;
}

/* ---- inputs */

typedef struct {
    const linear_call *call;
    const quantized_inputs *in;
} preparation;

/* The largest magnitude as bits, which order as the numbers do: a NaN is above infinity. */
static uint32_t largest_bits(const float *x, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += LANES) {
        const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first(count - k), x + k));
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    return _mm512_reduce_max_epu32(most);
}

static float as_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

/* Nearest number with four significant bits and an exponent of -6 at least, ties to even. */
INLINE __m512 round_e4m3(__m512 x) {
    const __m512 exponent = _mm512_max_ps(_mm512_getexp_ps(x), _mm512_set1_ps(-6));
    const __m512 unit = _mm512_sub_ps(exponent, _mm512_set1_ps(3));
    const __m512 steps = _mm512_scalef_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), unit));
    return _mm512_scalef_ps(_mm512_roundscale_ps(steps, _MM_FROUND_TO_NEAREST_INT), unit);
}

INLINE __m512 fetch(const float *x, const int32_t *order, int64_t k, __mmask16 mask) {
    if (!order) return _mm512_maskz_loadu_ps(mask, x + k);
    const __m512i index = _mm512_maskz_loadu_epi32(mask, order + k);
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, x, sizeof(float));
}

/* values[0 .. in->block) = the inputs of a block, rounded as asked: in units of `scale` to int8, to FP8 and back. */
static void fetch_block(const quantized_inputs *in, const float *x, int64_t block, float scale, float *values) {
    const quantization *q = in->quantization;
    const __m512 s = _mm512_set1_ps(scale);
    int64_t count;
    const int64_t begin = first_of_block(in, block, &count);
    for (int64_t k = 0; k < in->block; k += LANES) {
        __m512 v = fetch(x, q->order, begin + k, first(count - k));
        if (q->inputs == TO_INT8) v = _mm512_roundscale_ps(_mm512_div_ps(v, s), _MM_FROUND_TO_NEAREST_INT);
        if (q->inputs == TO_FP8) v = _mm512_mul_ps(round_e4m3(_mm512_div_ps(v, s)), s);
        _mm512_mask_storeu_ps(values + k, first(in->block - k), v);
    }
}

/* Splits values / unit into bytes. Returns their sum. */
static int32_t split_block(const quantized_inputs *in, const float *values, float per_unit, int8_t *planes) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < in->block; k += LANES) {
        const __mmask16 mask = first(in->block - k);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, values + k), _mm512_set1_ps(per_unit));
        const __m512i fixed = _mm512_cvtps_epi32(v);
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(fixed, _mm512_set1_epi32(128)), 8);
        if (in->planes == 2) _mm_mask_storeu_epi8(planes + k, mask, _mm512_cvtepi32_epi8(high));
        _mm_mask_storeu_epi8(planes + (in->planes - 1) * in->columns + k, mask, _mm512_cvtepi32_epi8(fixed));
        sum = _mm512_add_epi32(sum, fixed);
    }
    return _mm512_reduce_add_epi32(sum);
}

/* A row that holds an infinity or a NaN is NaN where it was to be fixed-point. */
static void prepare_row(void *args, int64_t row) {
    const preparation *p = args;
    const quantized_inputs *in = p->in;
    const float *x = p->call->x + row * p->call->stride;
    const input_rounding rounding = in->quantization->inputs;
    float scale = 0;
    if (rounding != KEPT) {
        const uint32_t bits = largest_bits(x, p->call->in_features);
        const float largest = bits < NOT_FINITE ? as_float(bits) : __builtin_nanf("");
        scale = (largest < SMALLEST ? SMALLEST : largest) / (rounding == TO_INT8 ? 127.0f : FP8_MAX);
    }
    for (int64_t b = 0; b < in->num_blocks; b++) {
        float block[MAX_BLOCK], *values = in->planes ? block : (float *)in->x + row * in->columns + b * in->block;
        fetch_block(in, x, b, scale, values);
        if (in->planes == 0) {
            for (int64_t k = 0; rounding == TO_INT8 && k < in->block; k++) values[k] *= scale;
            continue;
        }
        float unit = scale, per_unit = 1;
        if (in->planes == 2) {
            const uint32_t bits = largest_bits(values, in->block);
            const float largest = bits < NOT_FINITE ? as_float(bits) : __builtin_nanf("");
            unit = largest / MAX_FIXED;
            per_unit = largest < TINY ? 0 : MAX_FIXED / largest;
        }
        int8_t *planes = (int8_t *)in->x + row * in->planes * in->columns + b * in->block;
        in->scales[row * in->num_blocks + b] = unit;
        in->sums[row * in->num_blocks + b] = split_block(in, values, per_unit, planes);
    }
}

static size_t plane_bytes(const quantized_inputs *in, int64_t rows) {
    const int64_t bytes = in->planes ? in->planes : (int64_t)sizeof(float);
    return (size_t)up_to(rows * in->columns * bytes, 64);
}

static size_t form_bytes(const quantized_inputs *in, int64_t rows) {
    return plane_bytes(in, rows) + (size_t)up_to(rows * in->num_blocks * 8, 64);
}

static int read_alike(const quantization *a, const quantization *b) {
    return a->order == b->order && a->group_size == b->group_size && a->inputs == b->inputs && is_integer(a) == is_integer(b);
}

static const quantized_inputs *find_alike(const quantized_inputs *forms, int64_t count, const quantization *q) {
    for (int64_t i = 0; i < count; i++)
        if (read_alike(forms[i].quantization, q)) return forms + i;
    return NULL;
}

int32_t prepare_inputs(const linear_call *call, const member *members, int64_t num_members, const quantized_inputs ***inputs) {
    size_t bytes = (size_t)up_to(num_members * (int64_t)(sizeof(quantized_inputs) + sizeof(void *)), 64);
    const size_t head = bytes;
    for (int64_t i = 0; i < num_members; i++)
        if (members[i].quantization) {
            const quantized_inputs shape = shape_of(members[i].quantization, call->in_features);
            bytes += form_bytes(&shape, call->rows);
        }
    char *memory = scratch_memory(FORMS, bytes);
    if (!memory) return -1;
    quantized_inputs *forms = (quantized_inputs *)memory;
    const quantized_inputs **found = (const quantized_inputs **)(forms + num_members);
    int64_t num_forms = 0;
    memory += head;
    for (int64_t i = 0; i < num_members; i++) {
        const quantization *q = members[i].quantization;
        found[i] = q ? find_alike(forms, num_forms, q) : NULL;
        if (!q || found[i]) continue;
        quantized_inputs *form = forms + num_forms++;
        *form = shape_of(q, call->in_features);
        form->x = memory;
        form->scales = (float *)(memory + plane_bytes(form, call->rows));
        form->sums = (int32_t *)(form->scales + call->rows * form->num_blocks);
        memory += form_bytes(form, call->rows);
        const preparation p = {call, form};
        run_rows(prepare_row, (void *)&p, call->rows, form->columns);
        found[i] = form;
    }
    *inputs = found;
    return 0;
}

/* ---- products */

#define TILE tile_of_bytes
#define INTEGER_SUM sum_of_bytes
#define TARGET
#define DOT dot_widening
INLINE __m512i dot_widening(__m512i sums, __m512i w, __m512i x) {
    const __m512i even_w = _mm512_and_si512(w, _mm512_set1_epi16(255)), odd_w = _mm512_srli_epi16(w, 8);
    const __m512i even_x = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), odd_x = _mm512_srai_epi16(x, 8);
    return _mm512_add_epi32(_mm512_add_epi32(sums, _mm512_madd_epi16(even_w, even_x)), _mm512_madd_epi16(odd_w, odd_x));
}
#include "integer_tile.h"

#define TILE tile_vnni
#define INTEGER_SUM sum_vnni
#define TARGET __attribute__((target("avx512vnni")))
#define DOT _mm512_dpbusd_epi32
#include "integer_tile.h"

static int32_t multiplies_bytes;

/* Use `vpdpbusd`. Only where the processor has it. */
void chorus_use_byte_instructions(int32_t yes) { multiplies_bytes = yes; }

static const float NF4_VALUES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

/* What eight inputs of 16 outputs are packed in: one register of nibbles, or two of bytes. */
typedef struct {
    __m512i low, high;
} eight;

INLINE eight load_eight(const int nibbles, const char *w) {
    _mm_prefetch(w + AHEAD_BYTES, _MM_HINT_T1);
    if (nibbles) return (eight){_mm512_loadu_si512(w), _mm512_setzero_si512()};
    _mm_prefetch(w + 128 + AHEAD_BYTES, _MM_HINT_T1);
    return (eight){_mm512_loadu_si512(w), _mm512_loadu_si512(w + 128)};
}

/* The weights of input 4 * part + j, of eight. */
INLINE __m512 weights_of(const int nibbles, eight codes, int part, int j, __m512 values, __m512 scales) {
    if (nibbles) {
        const __m512i index = _mm512_srli_epi32(codes.low, (unsigned)(8 * j + 4 * part)); /* its low bits count */
        return _mm512_mul_ps(_mm512_permutexvar_ps(index, values), scales);
    }
    /* e4m3 in the place of a float32: its sign, and the lowest bits of its exponent, which is 120 too small. */
    const __m512i top = _mm512_slli_epi32(part ? codes.high : codes.low, (unsigned)(24 - 8 * j));
    const __m512i bits = _mm512_and_si512(_mm512_srai_epi32(top, 4), _mm512_set1_epi32((int)0x87f00000));
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f)), scales);
}

/* sums[row][half][part] += x of one input, one of the first or of the last four of eight: those do not wait for each other. */
INLINE void add_input(const int rows, const float *x, int64_t stride, int part, __m512 w0, __m512 w1, __m512 (*s)[2][2]) {
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        const __m512 v = _mm512_set1_ps(x[m * stride]);
        s[m][0][part] = _mm512_fmadd_ps(v, w0, s[m][0][part]);
        s[m][1][part] = _mm512_fmadd_ps(v, w1, s[m][1][part]);
    }
}

INLINE void tile_of_codes(const int rows, const int nibbles, const quantized_inputs *in, const float *x, const char *w,
                          __m512 (*s)[2][2]) {
    const __m512 values = _mm512_loadu_ps(NF4_VALUES);
    for (int64_t group = 0; group < in->num_groups; group++) {
        const __m512 scale0 = _mm512_loadu_ps(w), scale1 = _mm512_loadu_ps(w + 64);
        w += PANEL * sizeof(float);
        for (const float *end = x + in->blocks_of_group * in->block; x < end; x += 8, w += nibbles ? 128 : 256) {
            const eight a = load_eight(nibbles, w), b = load_eight(nibbles, w + 64);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
                for (int part = 0; part < 2; part++) {
                    const __m512 w0 = weights_of(nibbles, a, part, j, values, scale0);
                    const __m512 w1 = weights_of(nibbles, b, part, j, values, scale1);
                    add_input(rows, x + part * 4 + j, in->columns, part, w0, w1, s);
                }
        }
    }
}

/* The same sums from weights that were unpacked, in the order in which `tile_of_codes` takes them. */
INLINE void tile_of_weights(const int rows, const quantized_inputs *in, const float *x, const float *w, __m512 (*s)[2][2]) {
    for (const float *end = x + in->columns; x < end; x += 8)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++, w += PANEL)
                add_input(rows, x + part * 4 + j, in->columns, part, _mm512_loadu_ps(w), _mm512_loadu_ps(w + LANES), s);
}

INLINE void unpack_panel(const int nibbles, const quantized_inputs *in, const char *w, float *to) {
    const __m512 values = _mm512_loadu_ps(NF4_VALUES);
    for (int64_t group = 0; group < in->num_groups; group++) {
        const __m512 scale0 = _mm512_loadu_ps(w), scale1 = _mm512_loadu_ps(w + 64);
        w += PANEL * sizeof(float);
        for (int64_t k = in->blocks_of_group * in->block; k > 0; k -= 8, w += nibbles ? 128 : 256) {
            const eight a = load_eight(nibbles, w), b = load_eight(nibbles, w + 64);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
                for (int part = 0; part < 2; part++, to += PANEL) {
                    _mm512_storeu_ps(to, weights_of(nibbles, a, part, j, values, scale0));
                    _mm512_storeu_ps(to + LANES, weights_of(nibbles, b, part, j, values, scale1));
                }
        }
    }
}

const float *quantized_unpack(const quantization *q, const quantized_inputs *in, const char *panel) {
    if (is_integer(q)) return NULL;
    float *weights = scratch_memory(WEIGHTS, (size_t)(in->columns * PANEL) * sizeof(float));
    if (!weights) return NULL;
    if (q->kind == CODE_NF4)
        unpack_panel(1, in, panel, weights);
    else
        unpack_panel(0, in, panel, weights);
    return weights;
}

#define ROWS_OF_FLOATS(n)                                                                               \
    case n: {                                                                                           \
        __m512 s[n][2][2];                                                                              \
        _Pragma("GCC unroll 24") for (int i = 0; i < 4 * n; i++) s[i / 4][i / 2 % 2][i % 2] = _mm512_setzero_ps(); \
        if (weights)                                                                                    \
            tile_of_weights(n, in, x, weights, s);                                                      \
        else if (q->kind == CODE_NF4)                                                                   \
            tile_of_codes(n, 1, in, x, panel, s);                                                       \
        else                                                                                            \
            tile_of_codes(n, 0, in, x, panel, s);                                                       \
        _Pragma("GCC unroll 12") for (int i = 0; i < 2 * n; i++) sum[i / 2][i % 2] =                    \
            _mm512_add_ps(s[i / 2][i % 2][0], s[i / 2][i % 2][1]);                                      \
        return;                                                                                         \
    }

static void sum_of_floats(const quantization *q, const quantized_inputs *in, int64_t row, int64_t rows, const char *panel,
                          const float *weights, __m512 (*sum)[2]) {
    const float *x = (const float *)in->x + row * in->columns;
    switch (rows) {
        ROWS_OF_FLOATS(1) ROWS_OF_FLOATS(2) ROWS_OF_FLOATS(3) ROWS_OF_FLOATS(4) ROWS_OF_FLOATS(5) ROWS_OF_FLOATS(6)
    }
}

int64_t quantized_rows_of_tile(const quantized_inputs *in) { return in->planes == 1 ? TILE_ROWS : FLOAT_TILE_ROWS; }

void quantized_sum(const quantization *q, const quantized_inputs *in, int64_t row, int64_t rows, const char *panel,
                   const float *weights, __m512 (*sum)[2]) {
    if (in->planes == 0) return sum_of_floats(q, in, row, rows, panel, weights, sum);
    if (multiplies_bytes) return sum_vnni(q, in, row, rows, panel, sum);
    sum_of_bytes(q, in, row, rows, panel, sum);
}

/* ---- packing */

int64_t quantized_panel_bytes(const quantization *q, int64_t in_features) {
    const quantized_inputs in = shape_of(q, in_features);
    const int64_t of_group = PANEL * (int64_t)(sizeof(float) + (q->has_zeros ? sizeof(int16_t) : 0));
    return in.num_groups * of_group + bytes_of_codes(q, PANEL * in.columns);
}

typedef struct {
    const quantization *q;
    const uint8_t *codes;
    const float *scales;
    const int16_t *zeros;
    int64_t out_features, in_features;
    char *packed;
} packing;

/* Nibbles of inputs 0 .. 7, two neighbours to a byte -> input j and j + 4 in byte j. */
static uint32_t pair_nibbles(uint32_t codes) {
    const uint32_t even = codes & 0x0f0f0f0f, odd = codes >> 4 & 0x0f0f0f0f;
    const uint32_t of_even = (even & 0x0f0f) | (even >> 12 & 0xf0f0), of_odd = (odd & 0x0f0f) | (odd >> 12 & 0xf0f0);
    return (of_even & 0xff) | (of_odd & 0xff) << 8 | (of_even & 0xff00) << 8 | (of_odd & 0xff00) << 16;
}

static void pack_codes(const packing *p, int64_t panel, int64_t begin, int64_t count, uint8_t *to) {
    const int nibbles = bytes_of_codes(p->q, 2) == 1;
    const int64_t width = min64(PANEL, p->out_features - panel * PANEL), row_bytes = bytes_of_codes(p->q, p->in_features);
    const int64_t step = nibbles ? 8 : 4; /* inputs in four bytes of one output */
    const uint32_t sign = p->q->kind == CODE_INT8 ? 0x80808080 : 0;
    for (int64_t n = 0; n < width; n++) {
        const uint8_t *row = p->codes + (panel * PANEL + n) * row_bytes;
        for (int64_t i = 0; i < count; i += step) {
            uint32_t four = 0;
            if (i + step <= count && (!nibbles || begin % 2 == 0))
                __builtin_memcpy(&four, row + bytes_of_codes(p->q, begin + i), sizeof four);
            else
                for (int64_t k = begin + i, bit = 0; k < begin + min64(count, i + step); k++, bit += 32 / step)
                    four |= (uint32_t)(nibbles ? row[k / 2] >> k % 2 * 4 & 15 : row[k]) << bit;
            four = nibbles ? pair_nibbles(four) : four ^ sign;
            __builtin_memcpy(to + (i / step * PANEL + n) * 4, &four, sizeof four);
        }
    }
}

static void pack_panel(void *args, int64_t panel) {
    const packing *p = args;
    const quantized_inputs in = shape_of(p->q, p->in_features);
    const int64_t bytes = quantized_panel_bytes(p->q, p->in_features);
    char *to = p->packed + panel * bytes;
    __builtin_memset(to, 0, (size_t)bytes);
    for (int64_t block = 0; block < in.num_blocks; block++) {
        const int64_t group = block / in.blocks_of_group;
        if (block % in.blocks_of_group == 0) {
            for (int64_t n = 0; n < min64(PANEL, p->out_features - panel * PANEL); n++) {
                const int64_t from = (panel * PANEL + n) * in.num_groups + group;
                ((float *)to)[n] = p->scales[from];
                if (p->zeros) ((int16_t *)(to + PANEL * sizeof(float)))[n] = p->zeros[from];
            }
            to += PANEL * (sizeof(float) + (p->zeros ? sizeof(int16_t) : 0));
        }
        int64_t count;
        const int64_t begin = first_of_block(&in, block, &count);
        pack_codes(p, panel, begin, count, (uint8_t *)to);
        to += bytes_of_codes(p->q, PANEL * in.block);
    }
}

int64_t chorus_quantized_panel_bytes(const quantization *q, int64_t in_features) {
    return quantized_panel_bytes(q, in_features);
}

/* codes [out, in] (two to a byte, or one), scales and zeros (or NULL) [out, groups] -> packed, as quantized.h says. */
void chorus_pack_quantized(const uint8_t *codes, const float *scales, const int16_t *zeros, int64_t out_features,
                           int64_t in_features, const quantization *q, char *packed) {
    packing p = {q, codes, scales, zeros, out_features, in_features, packed};
    run_tasks(pack_panel, &p, (out_features + PANEL - 1) / PANEL);
}
