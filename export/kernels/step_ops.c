/* The instructions of step.c that work on float32 numbers alone: linear layers, norms, rope, gates, elementwise functions.
 *
 * Numbers, strides and sizes are in elements; native_program.py checked them when it wrote the program.
 */
#include "cpu.c"

typedef struct { char *at; int64_t step[4]; } operand_t; /* step: strides */

/* native_program.py's _INSTRUCTION is the same list. Operands: [0] is written, the others are read, except as noted. */
typedef struct {
    int64_t op, kind, chunks; /* chunks: pieces that may run at the same time */
    int64_t size[4];          /* what is looped over */
    int64_t number[2];
    double value[2];
    operand_t x[5];
} instr_t;

enum {
    COPY, UNARY, BINARY, BINARY_INT, GATHER, RMS_NORM, LAYER_NORM, MEAN, ROPE, GLU, MATMUL, LINEAR, ATTENTION, ROUND_ROWS, LINEAR_INT
};
enum { SAME4, SAME8, INT_TO_FLOAT };
enum { NEG, RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID, COS, SIN, POW, RECIPROCAL, SQRT, RSQRT };
enum { ADD, SUB, MUL, DIV };
enum { BAD_INDEX = 6 };

/* --------------------------------------------------------------------------------------------------------- linear */
/* bfloat16 weights [N, K] lie in panels of WIDE outputs, so that vectors run along the outputs and nothing is summed
 * across lanes. A panel is read from front to back, two weights of an output in each 32-bit word:
 *
 *     k = 0, 1:  | w[0][1] w[0][0] | w[1][1] w[1][0] | ... | w[WIDE-1][1] w[WIDE-1][0] |
 *     k = 2, 3:  | w[0][3] w[0][2] | ...
 *
 * A shift and a mask turn a vector of words into two of float32. Missing outputs and an odd K are filled with zeros.
 */
#define WIDE (4 * LANES)
#define TERMS 512 /* products summed one after the other before they go into a total: keeps rounding errors small */
#define AHEAD 1024 /* bytes to ask for in advance: unpacking keeps a processor from looking that far by itself */

INLINE void panel_sums(const int count, const uint16_t *panel, const float *x, int64_t x_step, int64_t dim, vf total[3][4]) {
    for (int r = 0; r < count; r++)
        for (int v = 0; v < 4; v++) total[r][v] = (vf){0};
    for (int64_t begin = 0; begin < dim; begin += TERMS) {
        const int64_t end = min64(begin + TERMS, dim), even = end & ~(int64_t)1;
        vf sum[3][4], other[4];
        for (int v = 0; v < 4; v++) {
            other[v] = (vf){0};
            for (int r = 0; r < count; r++) sum[r][v] = (vf){0};
        }
        for (int64_t k = begin; k < even; k += 2, panel += 2 * WIDE) {
            fetch((const char *)panel + AHEAD, 4 * WIDE);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                vi words;
                memcpy(&words, panel + 2 * LANES * v, sizeof words);
                const vf first = (vf)(words << 16), second = (vf)(words & (int32_t)0xFFFF0000);
#pragma GCC unroll 3
                for (int r = 0; r < count; r++) {
                    sum[r][v] += first * splat(x[r * x_step + k]);
                    if (count == 1) /* a second chain of additions: four alone would wait for each other */
                        other[v] += second * splat(x[k + 1]);
                    else
                        sum[r][v] += second * splat(x[r * x_step + k + 1]);
                }
            }
        }
        if (even < end) /* the last of an odd K */
            for (int v = 0; v < 4; v++) {
                vi words;
                memcpy(&words, panel + 2 * LANES * v, sizeof words);
                for (int r = 0; r < count; r++) sum[r][v] += (vf)(words << 16) * splat(x[r * x_step + even]);
            }
        for (int v = 0; v < 4; v++)
            for (int r = 0; r < count; r++) total[r][v] += count == 1 ? sum[r][v] + other[v] : sum[r][v];
    }
}

/* out[r][0..3] = x[r] . weight rows 0..3 for `count` rows of x; weights in float32, row by row. */
INLINE void row_sums(const int count, const float *const *rows, const float *x, int64_t x_step, int64_t dim, v4 *out) {
    vf sum[3][4];
    for (int r = 0; r < count; r++)
        for (int n = 0; n < 4; n++) sum[r][n] = (vf){0};
    int64_t k = 0;
    for (; k + LANES <= dim; k += LANES)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            const vf weight = load(rows[n] + k);
#pragma GCC unroll 3
            for (int r = 0; r < count; r++) sum[r][n] += weight * load(x + r * x_step + k);
        }
    for (int r = 0; r < count; r++) {
        out[r] = sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        for (int64_t e = k; e < dim; e++)
            out[r] += x[r * x_step + e] * (v4){rows[0][e], rows[1][e], rows[2][e], rows[3][e]};
    }
}

/* out = sums + bias for outputs n .. of row r, as many as there are up to `end`. */
INLINE void store_sums(const instr_t *p, int64_t r, int64_t n, const void *sums, int64_t count) {
    float *out = (float *)p->x[0].at + r * p->x[0].step[2] + n;
    memcpy(out, sums, sizeof(float) * (size_t)count);
    if (p->x[3].at)
        for (int64_t j = 0; j < count; j++) out[j] += ((const float *)p->x[3].at)[n + j];
}

INLINE int64_t rows_at_once(int64_t left) { return left == 4 ? 2 : min64(left, 3); }

static void linear_panels(const instr_t *p, int64_t begin, int64_t end) {
    const int64_t dim = p->size[3], x_step = p->x[1].step[2], num_rows = p->size[1];
    for (int64_t n = begin; n < end; n += WIDE) {
        const uint16_t *panel = (const uint16_t *)p->x[2].at + n * ((dim + 1) / 2 * 2);
        for (int64_t r = 0, count; r < num_rows; r += count) {
            const float *x = (const float *)p->x[1].at + r * x_step;
            vf sums[3][4];
            count = rows_at_once(num_rows - r);
            if (count == 1) panel_sums(1, panel, x, x_step, dim, sums);
            else if (count == 2) panel_sums(2, panel, x, x_step, dim, sums);
            else panel_sums(3, panel, x, x_step, dim, sums);
            for (int64_t i = 0; i < count; i++) store_sums(p, r + i, n, sums[i], min64(WIDE, end - n));
        }
    }
}

static void linear_rows(const instr_t *p, int64_t begin, int64_t end) {
    const int64_t dim = p->size[3], x_step = p->x[1].step[2], num_rows = p->size[1];
    for (int64_t n = begin; n < end; n += 4) {
        const float *rows[4];
        for (int i = 0; i < 4; i++) rows[i] = (const float *)p->x[2].at + min64(n + i, end - 1) * p->x[2].step[2];
        for (int64_t r = 0, count; r < num_rows; r += count) {
            const float *x = (const float *)p->x[1].at + r * x_step;
            v4 sums[3];
            count = rows_at_once(num_rows - r);
            if (count == 1) row_sums(1, rows, x, x_step, dim, sums);
            else if (count == 2) row_sums(2, rows, x, x_step, dim, sums);
            else row_sums(3, rows, x, x_step, dim, sums);
            for (int64_t i = 0; i < count; i++) store_sums(p, r + i, n, &sums[i], min64(4, end - n));
        }
    }
}

/* One chunk of outputs. size: {-, rows of x, outputs, K}; x: [1] the rows, [2] weights, [3] bias or NULL; kind: 1 for panels;
 * number[0]: outputs per chunk, a multiple of WIDE for panels, of 4 for rows. */
static void linear(const instr_t *p, int64_t chunk) {
    const int64_t begin = chunk * p->number[0], end = min64(begin + p->number[0], p->size[2]);
    if (p->kind) linear_panels(p, begin, end);
    else linear_rows(p, begin, end);
}

/* --------------------------------------------------------------------------------------- elementwise and along rows */
INLINE vf each(vf x, float (*function)(float)) {
    for (int l = 0; l < LANES; l++) x[l] = function(x[l]);
    return x;
}
INLINE vf sigmoid_v(vf x) { return 1.0f / (1.0f + exp_v(pick(-x > 88.0f, splat(88.0f), -x))); }

INLINE vf apply(const int kind, vf x, float value) {
    switch (kind) {
    case NEG: return -x;
    case RELU: return pick(x < 0.0f, (vf){0}, x);
    case SILU: return x * sigmoid_v(x);
    case GELU: return 0.5f * x * (1.0f + each(x * 0.70710678118654752f, erff));
    case GELU_TANH: return 0.5f * x * (1.0f + tanh_v(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case TANH: return tanh_v(x);
    case SIGMOID: return sigmoid_v(x);
    case COS: return each(x, cosf);
    case SIN: return each(x, sinf);
    case RECIPROCAL: return 1.0f / x;
    case SQRT: return each(x, sqrtf);
    case RSQRT: return 1.0f / each(x, sqrtf);
    default: /* POW */
        if (value == 2.0f) return x * x;
        if (value == 3.0f) return x * x * x;
        for (int l = 0; l < LANES; l++) x[l] = powf(x[l], value);
        return x;
    }
}

INLINE vf load_part(const float *p, int64_t step, int64_t n) { /* n <= LANES elements, the others 0 */
    vf x = {0};
    for (int64_t l = 0; l < n; l++) x[l] = p[l * step];
    return x;
}

/* out = apply(a) * gate: `gate` NULL for a plain function. */
INLINE void apply_row(const int kind, float value, float *out, const float *a, int64_t step, const float *gate, int64_t n) {
    int64_t i = 0;
    if (step == 1)
        for (; i + LANES <= n; i += LANES) {
            vf y = apply(kind, load(a + i), value);
            store(out + i, gate ? y * load(gate + i) : y);
        }
    for (; i < n; i += LANES) {
        const int64_t part = min64(LANES, n - i);
        vf y = apply(kind, load_part(a + i * step, step, part), value);
        if (gate) y *= load_part(gate + i, 1, part);
        for (int64_t l = 0; l < part; l++) out[i + l] = y[l];
    }
}

static void unary_row(int64_t kind, float value, float *out, const float *a, int64_t step, const float *gate, int64_t n) {
#define CASE(K) case K: apply_row(K, value, out, a, step, gate, n); break;
    switch (kind) {
        CASE(NEG) CASE(RELU) CASE(SILU) CASE(GELU) CASE(GELU_TANH) CASE(TANH) CASE(SIGMOID)
        CASE(COS) CASE(SIN) CASE(POW) CASE(RECIPROCAL) CASE(SQRT) CASE(RSQRT)
    }
#undef CASE
}

INLINE void binary_loop(const int kind, float alpha, float *restrict out, const float *a, int64_t sa, const float *b,
                        int64_t sb, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float x = a[i * sa], y = b[i * sb];
        out[i] = kind == ADD ? x + alpha * y : kind == SUB ? x - alpha * y : kind == MUL ? x * y : x / y;
    }
}

static void binary_row(int64_t kind, float alpha, float *out, const float *a, int64_t sa, const float *b, int64_t sb,
                       int64_t n) {
#define LOOPS(K)                                                        \
    case K:                                                             \
        if (sa == 1 && sb == 1) binary_loop(K, alpha, out, a, 1, b, 1, n);      \
        else if (sa == 1 && sb == 0) binary_loop(K, alpha, out, a, 1, b, 0, n); \
        else binary_loop(K, alpha, out, a, sa, b, sb, n);                       \
        break;
    switch (kind) { LOOPS(ADD) LOOPS(SUB) LOOPS(MUL) LOOPS(DIV) }
#undef LOOPS
}

static void binary_int_row(int64_t kind, int64_t alpha, int64_t *out, const int64_t *a, int64_t sa, const int64_t *b,
                           int64_t sb, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const int64_t x = a[i * sa], y = b[i * sb];
        out[i] = kind == ADD ? x + alpha * y : kind == SUB ? x - alpha * y : x * y;
    }
}

static void copy_row(int64_t kind, char *out, int64_t so, const char *a, int64_t sa, int64_t n) {
    if (kind == INT_TO_FLOAT)
        for (int64_t i = 0; i < n; i++) ((float *)out)[i * so] = (float)((const int64_t *)a)[i * sa];
    else if (so == 1 && sa == 1)
        memcpy(out, a, (size_t)(n * (kind == SAME4 ? 4 : 8)));
    else if (kind == SAME4)
        for (int64_t i = 0; i < n; i++) ((float *)out)[i * so] = ((const float *)a)[i * sa];
    else
        for (int64_t i = 0; i < n; i++) ((int64_t *)out)[i * so] = ((const int64_t *)a)[i * sa];
}

INLINE float total(vf x) { return sums_of(x, x, x, x)[0]; }

/* x: [1] input, [2] weight or NULL, [3] residual or NULL, [4] written: the sum of input and residual. */
static void rms_norm_row(const instr_t *p, float *out, const float *x, const float *residual, float *sum_out, int64_t n) {
    const float *weight = (const float *)p->x[2].at;
    if (residual) {
        for (int64_t i = 0; i < n; i++) sum_out[i] = x[i] + residual[i];
        x = sum_out;
    }
    vf squares = {0};
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < n; i++) rest += x[i] * x[i];
    const float factor = 1.0f / sqrtf((total(squares) + rest) / (float)n + (float)p->value[0]), offset = (float)p->value[1];
    if (weight)
        for (i = 0; i < n; i++) out[i] = x[i] * factor * (weight[i] + offset);
    else
        for (i = 0; i < n; i++) out[i] = x[i] * factor;
}

static void layer_norm_row(const instr_t *p, float *out, const float *x, int64_t n) {
    const float *weight = (const float *)p->x[2].at, *bias = (const float *)p->x[3].at;
    double sum = 0.0, squares = 0.0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    const float mean = (float)(sum / (double)n);
    for (int64_t i = 0; i < n; i++) squares += (double)(x[i] - mean) * (x[i] - mean);
    const float factor = (float)(1.0 / sqrt(squares / (double)n + p->value[0]));
    for (int64_t i = 0; i < n; i++)
        out[i] = (x[i] - mean) * factor * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
}

static void rope_row(int64_t interleaved, float *out, const float *x, const float *cosine, const float *sine, int64_t rotated,
                     int64_t n) {
    const int64_t half = rotated / 2;
    if (interleaved)
        for (int64_t i = 0; i < rotated; i += 2) {
            out[i] = x[i] * cosine[i] - x[i + 1] * sine[i];
            out[i + 1] = x[i + 1] * cosine[i + 1] + x[i] * sine[i + 1];
        }
    else
        for (int64_t i = 0; i < half; i++) {
            out[i] = x[i] * cosine[i] - x[i + half] * sine[i];
            out[i + half] = x[i + half] * cosine[i + half] + x[i] * sine[i + half];
        }
    memcpy(out + rotated, x + rotated, sizeof(float) * (size_t)(n - rotated));
}

/* One row (the last of the four sizes) of the operators that work along rows. */
static void row(const instr_t *p, char *const *at) {
    const int64_t n = p->size[3];
    float *out = (float *)at[0];
    const float *a = (const float *)at[1], *b = (const float *)at[2];
    switch (p->op) {
    case COPY: copy_row(p->kind, at[0], p->x[0].step[3], at[1], p->x[1].step[3], n); break;
    case UNARY: unary_row(p->kind, (float)p->value[0], out, a, p->x[1].step[3], NULL, n); break;
    case BINARY: binary_row(p->kind, (float)p->value[0], out, a, p->x[1].step[3], b, p->x[2].step[3], n); break;
    case BINARY_INT:
        binary_int_row(p->kind, p->number[0], (int64_t *)at[0], (const int64_t *)at[1], p->x[1].step[3],
                       (const int64_t *)at[2], p->x[2].step[3], n);
        break;
    case RMS_NORM: rms_norm_row(p, out, a, (const float *)at[3], (float *)at[4], n); break;
    case LAYER_NORM: layer_norm_row(p, out, a, n); break;
    case MEAN: {
        double sum = 0.0;
        for (int64_t i = 0; i < n; i++) sum += a[i];
        *out = (float)(sum / (double)n);
        break;
    }
    case ROPE: rope_row(p->kind, out, a, b, (const float *)at[3], p->number[0], n); break;
    case GLU: unary_row(p->kind, 0.0f, out, a, 1, a + n, n); break;
    }
}

static void rows(const instr_t *p) {
    const int64_t read = p->op == BINARY_INT || (p->op == COPY && p->kind != SAME4) ? 8 : 4; /* bytes of an element */
    const int64_t written = p->op == COPY && p->kind == INT_TO_FLOAT ? 4 : read;
    for (int64_t i = 0; i < p->size[0]; i++)
        for (int64_t j = 0; j < p->size[1]; j++)
            for (int64_t k = 0; k < p->size[2]; k++) {
                char *at[5];
                for (int o = 0; o < 5; o++) {
                    const operand_t *x = &p->x[o];
                    const int64_t offset = i * x->step[0] + j * x->step[1] + k * x->step[2];
                    at[o] = x->at ? x->at + offset * (o ? read : written) : NULL;
                }
                row(p, at);
            }
}

/* out[i][j] = table[i][index[j]]: size {i, j, -, row}, number[0] rows in the table. Returns the first bad index + 1. */
static int64_t gather(const instr_t *p) {
    const int64_t n = p->size[3];
    const int64_t *index = (const int64_t *)p->x[2].at;
    for (int64_t j = 0; j < p->size[1]; j++)
        if (index[j] < 0 || index[j] >= p->number[0]) return j + 1;
    for (int64_t i = 0; i < p->size[0]; i++)
        for (int64_t j = 0; j < p->size[1]; j++)
            memcpy((float *)p->x[0].at + (i * p->size[1] + j) * n,
                   (const float *)p->x[1].at + i * p->x[1].step[0] + index[j] * p->x[1].step[1], sizeof(float) * (size_t)n);
    return 0;
}

/* Small products, such as of positions and frequencies: size {batch, m, n, k}; x[1] steps {batch, m, k}, x[2] {batch, k, n}. */
static void matmul(const instr_t *p) {
    float *out = (float *)p->x[0].at;
    for (int64_t b = 0; b < p->size[0]; b++)
        for (int64_t m = 0; m < p->size[1]; m++)
            for (int64_t n = 0; n < p->size[2]; n++) {
                float sum = 0.0f;
                for (int64_t k = 0; k < p->size[3]; k++)
                    sum += ((const float *)p->x[1].at)[b * p->x[1].step[0] + m * p->x[1].step[1] + k * p->x[1].step[2]] *
                           ((const float *)p->x[2].at)[b * p->x[2].step[0] + k * p->x[2].step[1] + n * p->x[2].step[2]];
                *out++ = sum;
            }
}
