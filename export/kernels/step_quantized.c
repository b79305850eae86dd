/* Linear layers of step.c on int8 and int4 weights: integer products, float32 scales.
 *
 * ROUND_ROWS turns the rows of x into int16 once for all outputs; LINEAR_INT multiplies them with the weights, two products to a
 * 32-bit lane (vpmaddwd, or vpdpwssd where there is VNNI), and scales the sum of each group along K:
 *
 *     out[n] = bias[n] + sum over groups g of  weight_scale[n][g] * x_scale[g] * (sum_k q[n][k] x[k] - zero_point[n][g] * sum_k x[k])
 *
 * Activations that a format rounds to int8 are these int8 values, so integer sums are those of the definition. Others take the whole
 * int16: the error, at most 2^-16 of the largest value of a group, is below that of bfloat16 by a factor of 100, and not of the
 * size of weight rounding. Weights lie in panels of PAIR outputs, each read from front to back:
 *
 *     group 0: scale[PAIR] float32 | zero_point[PAIR] int32, if the format has one | words[GROUP / 8 or / 4][PAIR]
 *     group 1: ...
 *
 * A word holds consecutive k of one output, so that masks or shifts leave pairs (k, k + 1) in its int16 halves:
 *
 *     int4:  bits 31..  k7 k5 k3 k1 | k6 k4 k2 k0  ..0       int8:  k3 k1 | k2 k0
 */
#include "step_ops.c"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define PAIR (2 * LANES)
#define ROWS_INT 4 /* rows of x that share unpacked weights */
enum { INT16_GROUPS, INT8_ROWS, INT8_STATIC };  /* kind of ROUND_ROWS */
enum { FOUR_BITS = 1, WITH_ZERO_POINT = 2 };    /* kind of LINEAR_INT */

typedef int16_t vs __attribute__((vector_size(LANES * 2)));
typedef struct { float scale; int32_t sum; } rounded_t; /* of one group of a row of x */

/* sum + a[0] * b[0] + a[1] * b[1] in each lane, of the int16 halves of a and b. */
INLINE vi add_pairs(vi sum, vi a, vi b) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif LANES == 16 && defined(__AVX512BW__)
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES == 8 && defined(__AVXVNNI__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif LANES == 8 && defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

INLINE vi splat_int(int32_t x) { return x + (vi){0}; }
INLINE vi load_int(const void *p) { vi x; memcpy(&x, p, sizeof x); return x; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE int32_t load_pair(const int16_t *x) { int32_t pair; memcpy(&pair, x, sizeof pair); return pair; }

/* The part'th pair of each word: of 4 in int4, of 2 in int8. */
INLINE vi pair_of(const int four_bits, vi words, int part) {
    if (four_bits) return (words >> (4 * part)) & 0x000F000F;
    const vi high = part ? words : words << 8; /* the byte that is wanted, in the upper half of each int16 */
#if LANES == 16 && defined(__AVX512BW__)
    return (vi)_mm512_srai_epi16((__m512i)high, 8);
#elif LANES == 8 && defined(__AVX2__)
    return (vi)_mm256_srai_epi16((__m256i)high, 8);
#else
    return (high >> 24 << 16) | ((high << 16 >> 24) & 0xFFFF);
#endif
}

/* sum[r][v] = products of one group: weights of PAIR outputs with `count` rows of x. */
INLINE void group_products(const int four_bits, const int count, const char *words, const int16_t *x, int64_t x_step,
                           int64_t group, vi sum[ROWS_INT][2]) {
    const int parts = four_bits ? 4 : 2;
    for (int r = 0; r < count; r++) sum[r][0] = sum[r][1] = (vi){0};
    for (int64_t k = 0; k < group; k += 2 * parts, words += 4 * PAIR) {
        const vi left = load_int(words), right = load_int(words + 4 * LANES);
        fetch(words + AHEAD, 4 * PAIR);
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            const vi a = pair_of(four_bits, left, part), b = pair_of(four_bits, right, part);
#pragma GCC unroll 4
            for (int r = 0; r < count; r++) {
                const vi both = splat_int(load_pair(x + r * x_step + k + 2 * part));
                sum[r][0] = add_pairs(sum[r][0], a, both);
                sum[r][1] = add_pairs(sum[r][1], b, both);
            }
        }
    }
}

/* One panel for `count` rows from row r on: a loop over groups. */
INLINE void panel_int(const int four_bits, const int count, const instr_t *p, const char *panel, int64_t r, vf total[ROWS_INT][2]) {
    const int64_t groups = p->size[0], group = p->size[3], x_step = groups * group;
    const int16_t *x = (const int16_t *)p->x[1].at + r * x_step;
    const rounded_t *rounded = (const rounded_t *)p->x[4].at + r * groups;
    const int header = p->kind & WITH_ZERO_POINT ? 8 * PAIR : 4 * PAIR;
    for (int i = 0; i < count; i++) total[i][0] = total[i][1] = (vf){0};
    for (int64_t g = 0; g < groups; g++, x += group) {
        vi sum[ROWS_INT][2];
        group_products(four_bits, count, panel + header, x, x_step, group, sum);
        for (int v = 0; v < 2; v++) {
            const vf scale = load((const float *)panel + v * LANES);
            const vi zero = p->kind & WITH_ZERO_POINT ? load_int(panel + 4 * (PAIR + v * LANES)) : splat_int((int32_t)p->number[1]);
            for (int i = 0; i < count; i++) {
                const rounded_t of = rounded[i * groups + g];
                total[i][v] += to_float(sum[i][v] - zero * of.sum) * of.scale * scale;
            }
        }
        panel += header + group * PAIR / (four_bits ? 2 : 1);
    }
}

static int64_t panel_bytes(const instr_t *p) {
    const int64_t values = p->size[3] * PAIR / (p->kind & FOUR_BITS ? 2 : 1);
    return p->size[0] * (values + (p->kind & WITH_ZERO_POINT ? 8 : 4) * PAIR);
}

#define FOR_COUNT(count, call)      \
    switch (count) {                \
    case 1: call(1); break;         \
    case 2: call(2); break;         \
    case 3: call(3); break;         \
    default: call(4);               \
    }

/* One chunk of outputs. size: {groups, rows of x, outputs, length of a group}; x: [1] rows from ROUND_ROWS, [2] panels, [3] bias or
 * NULL, [4] scales and sums from ROUND_ROWS; number: outputs per chunk, a multiple of PAIR, and the zero point where there is one
 * for all. */
static void linear_int(const instr_t *p, int64_t chunk) {
    const int64_t begin = chunk * p->number[0], end = min64(begin + p->number[0], p->size[2]), num_rows = p->size[1];
    for (int64_t n = begin; n < end; n += PAIR) {
        const char *panel = p->x[2].at + n / PAIR * panel_bytes(p);
        for (int64_t r = 0, count; r < num_rows; r += count) {
            vf total[ROWS_INT][2];
            count = min64(num_rows - r, ROWS_INT);
#define FOUR(c) panel_int(1, c, p, panel, r, total)
#define EIGHT(c) panel_int(0, c, p, panel, r, total)
            if (p->kind & FOUR_BITS) { FOR_COUNT(count, FOUR) }
            else { FOR_COUNT(count, EIGHT) }
#undef FOUR
#undef EIGHT
            for (int64_t i = 0; i < count; i++) store_sums(p, r + i, n, total[i], min64(PAIR, end - n));
        }
    }
}

/* The vector of x at i, with zeros where it ends. */
INLINE vf load_up_to(const float *x, int64_t i, int64_t n) {
    return n - i < LANES ? load_part(x + i, 1, n - i) : load(x + i);
}

/* n values of x over scale, rounded to the nearest even integer within +-limit, and zeros up to `padded`. x_scale of values that are
 * not numbers (or, where the scale is theirs, not finite) becomes NaN. Adding 1.5 * 2^23 rounds and leaves the integer in the bits. */
static rounded_t round_values(const float *x, int64_t n, int64_t padded, float scale, float limit, int16_t *out) {
    const vf most = splat(limit), magic = splat(12582912.0f);
    vf poison = {0};
    vi sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vf value = load_up_to(x, i, n) / scale;
        value = pick(value > most, most, pick(value < -most, -most, value));
        poison += value * 0.0f;
        const vi rounded = ((vi)(value + magic) - (vi)magic) & (value == value);
        sum += rounded;
        const vs narrow = __builtin_convertvector(rounded, vs);
        memcpy(out + i, &narrow, sizeof(int16_t) * (size_t)min64(LANES, n - i));
    }
    memset(out + n, 0, sizeof(int16_t) * (size_t)(padded - n));
    int32_t all = 0;
    for (int l = 0; l < LANES; l++) all += sum[l];
    return (rounded_t){scale + total(poison), all};
}

static float scale_for(const float *x, int64_t n, float limit) {
    vf most = {0}, poison = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        const vf value = load_up_to(x, i, n), size = pick(value < 0.0f, -value, value);
        most = pick(size > most, size, most);
        poison += value * 0.0f;
    }
    float largest = 0.0f;
    for (int l = 0; l < LANES; l++) largest = most[l] > largest ? most[l] : largest;
    const float scale = largest / limit;
    return (scale < 1.17549435e-38f ? 1.17549435e-38f : scale) + total(poison);
}

/* size: {groups, rows, K, length of a group}; x: [0] int16 [rows][groups * length] written, [1] rows, [2] scale of INT8_STATIC, [4]
 * rounded_t [rows][groups] written. */
static void round_rows(const instr_t *p) {
    const int64_t groups = p->size[0], dim = p->size[2], group = p->size[3];
    const float limit = p->kind == INT16_GROUPS ? 32767.0f : 127.0f;
    for (int64_t r = 0; r < p->size[1]; r++) {
        const float *x = (const float *)p->x[1].at + r * p->x[1].step[2];
        float scale = 0.0f;
        if (p->kind == INT8_ROWS) scale = scale_for(x, dim, limit);
        if (p->kind == INT8_STATIC) scale = *(const float *)p->x[2].at;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t n = max64(0, min64(group, dim - g * group));
            if (p->kind == INT16_GROUPS) scale = scale_for(x + g * group, n, limit);
            ((rounded_t *)p->x[4].at)[r * groups + g] =
                round_values(x + g * group, n, group, scale, limit, (int16_t *)p->x[0].at + (r * groups + g) * group);
        }
    }
}
