/* A whole decode step in one call: an interpreter of the flat programs that native_step.py writes, float32.
 *
 *     program:  | gather | rms_norm | linear | rope | rope | attention | linear | add_rms_norm | linear | glu | ...
 *
 * For few tokens a step is bound by reading the weights once. `linear` therefore reads them as bfloat16 where that
 * holds their values exactly (the copy's layout is drawn at WIDE), and is cut into chunks that threads take
 * from a common counter. The calling thread walks through the program and does everything else itself: it never waits
 * for a thread that has not begun, so a busy machine only makes it slower. Worker threads spin while a step runs and
 * sleep between steps.
 *
 * Numbers, strides and sizes are in elements. Sizes and pointers were checked when the program was written; what changes
 * from step to step (token ids, sample rows, block tables) is checked here.
 */
#include "cpu.c"

#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#define SPIN_LIMIT 20000    /* looks at the counter (about 0.5 ms) after which a worker sleeps until the next step */
#define YIELD_EVERY 512     /* looks between offers of the core to others */
#define ATTENTION_WORK 60000 /* multiply-adds below which attention stays on the calling thread */

typedef struct { char *at; int64_t step[4]; } operand_t; /* step: strides */

/* native_program.py's _INSTRUCTION is the same list. Operands: [0] is written, the others are read, except as noted. */
typedef struct {
    int64_t op, kind, chunks; /* chunks: pieces that may run at the same time */
    int64_t size[4];          /* what is looped over */
    int64_t number[2];
    double value[2];
    operand_t x[5];
} instr_t;

enum { COPY, UNARY, BINARY, BINARY_INT, GATHER, RMS_NORM, LAYER_NORM, MEAN, ROPE, GLU, MATMUL, LINEAR, ATTENTION };
enum { SAME4, SAME8, INT_TO_FLOAT };
enum { NEG, RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID, COS, SIN, POW, RECIPROCAL, SQRT, RSQRT };
enum { ADD, SUB, MUL, DIV };
enum { BAD_INDEX = 6 };

typedef struct { const int64_t *slot_mapping; const int32_t *block_tables; int64_t table_row, table_width; } group_t;
typedef struct { char *to; const char *from; int64_t bytes; } transfer_t;

/* What a step brings; native_step.py's _STEP is the same list. */
typedef struct {
    const instr_t *program;
    int64_t length, num_threads;
    transfer_t inputs[3], output;
    const int32_t *query_start, *seq_lens;
    int64_t num_seqs;
    const group_t *groups;
    int64_t failed_at, failed_value; /* written: instruction and value of a failure */
} step_t;

typedef struct {
    pthread_mutex_t one_step, lock;
    pthread_cond_t wake;
    pthread_t *threads;
    int64_t num_workers, num_wanted, generation;
    int quit;
    pid_t pid; /* of the process that the threads live in */
    const step_t *current;
    /* instruction << 32 | chunks not yet taken; written by the calling thread, counted down by whoever takes one */
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int64_t done; /* chunks finished */
    _Atomic int running, out_of_memory;
} pool_t;

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

/* ------------------------------------------------------------------------------------------------ threads and steps */
static int64_t rows_per_tile(const args_t *a) { return max64(1, TILE_QUERIES / (a->num_heads / a->num_kv_heads)); }

/* One (sequence, tile of rows, kv head) of attention. */
static void attention_chunk(pool_t *pool, const args_t *a, int64_t item) {
    const int64_t per_tile = rows_per_tile(a);
    scratch_t *scratch = scratch_get(per_tile * (a->num_heads / a->num_kv_heads), a->head_dim, a->value_dim);
    if (!scratch) {
        atomic_store(&pool->out_of_memory, 1);
        return;
    }
    int64_t tile = item / a->num_kv_heads, seq = 0;
    for (;; seq++) {
        const int64_t tiles = (a->query_start[seq + 1] - a->query_start[seq] + per_tile - 1) / per_tile;
        if (tile < tiles) break;
        tile -= tiles;
    }
    const int64_t start = a->query_start[seq], count = a->query_start[seq + 1] - start, first = tile * per_tile;
    attend(a, scratch, seq, item % a->num_kv_heads, start + first, min64(per_tile, count - first),
           a->seq_lens[seq] - count + first);
}

static void run_chunk(pool_t *pool, int64_t index, int64_t chunk) {
    const instr_t *p = &pool->current->program[index];
    if (p->op == LINEAR) linear(p, chunk);
    else attention_chunk(pool, (const args_t *)p->x[1].at, chunk);
}

/* Takes a chunk of the running instruction, if there is one left, and runs it. */
static int take_chunk(pool_t *pool) {
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    if (!(uint32_t)ticket) return 0;
    if (atomic_compare_exchange_strong(&pool->ticket, &ticket, ticket - 1)) {
        run_chunk(pool, (int64_t)(ticket >> 32), (int64_t)(uint32_t)ticket - 1);
        atomic_fetch_add_explicit(&pool->done, 1, memory_order_release);
    }
    return 1;
}

INLINE void wait_a_little(int spins) {
    if (spins % YIELD_EVERY == YIELD_EVERY - 1) sched_yield(); /* whom we wait for may be waiting for this core */
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void parallel(pool_t *pool, int64_t index, int64_t chunks) {
    if (chunks == 1 || pool->num_workers == 0) {
        for (int64_t chunk = 0; chunk < chunks; chunk++) run_chunk(pool, index, chunk);
        return;
    }
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->ticket, (uint64_t)index << 32 | (uint64_t)chunks, memory_order_release);
    while (take_chunk(pool)) {}
    for (int spins = 0; atomic_load_explicit(&pool->done, memory_order_acquire) < chunks; spins++) wait_a_little(spins);
}

static void *work(void *pointer) {
    pool_t *pool = pointer;
    int64_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&pool->lock);
        while (pool->generation == seen && !pool->quit) pthread_cond_wait(&pool->wake, &pool->lock);
        seen = pool->generation;
        const int quit = pool->quit;
        pthread_mutex_unlock(&pool->lock);
        if (quit) return NULL;
        for (int spins = 0; spins < SPIN_LIMIT && atomic_load_explicit(&pool->running, memory_order_acquire);)
            if (take_chunk(pool)) spins = 0;
            else wait_a_little(spins++);
    }
}

static void stop_workers(pool_t *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->quit = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int64_t i = 0; i < pool->num_workers; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    pool->threads = NULL;
    pool->num_workers = 0;
}

static void start_workers(pool_t *pool, int64_t wanted) {
    pool->quit = 0;
    pool->generation = 0;
    pool->num_wanted = wanted;
    pool->threads = wanted ? calloc((size_t)wanted, sizeof *pool->threads) : NULL;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of the program */
    while (pool->threads && pool->num_workers < wanted)
        if (pthread_create(&pool->threads[pool->num_workers], NULL, work, pool)) break;
        else pool->num_workers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void fresh(pool_t *pool) {
    memset(pool, 0, sizeof *pool);
    pthread_mutex_init(&pool->one_step, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->pid = getpid();
}

pool_t *camshaft_step_create(void) {
    pool_t *pool = NULL;
    if (posix_memalign((void **)&pool, 64, sizeof *pool)) return NULL;
    fresh(pool);
    return pool;
}

void camshaft_step_destroy(pool_t *pool) {
    if (pool->pid == getpid()) stop_workers(pool); /* in a forked child there are none */
    free(pool);
}

static int64_t attention(pool_t *pool, const step_t *step, int64_t index) {
    const instr_t *p = &step->program[index];
    const group_t *group = &step->groups[p->number[0]];
    args_t *a = (args_t *)p->x[1].at;
    a->slot_mapping = group->slot_mapping;
    a->block_tables = group->block_tables;
    a->table_row = group->table_row;
    a->table_width = group->table_width;
    a->query_start = step->query_start;
    a->seq_lens = step->seq_lens;
    a->num_seqs = step->num_seqs;
    int64_t small[129], *tiles = a->num_seqs < 129 ? small : malloc(sizeof(int64_t) * (size_t)(a->num_seqs + 1));
    if (!tiles) return FAIL(NO_MEMORY, 0);
    double work_size;
    const int64_t status = check(a, tiles, rows_per_tile(a), &work_size);
    const int64_t items = status ? 0 : tiles[a->num_seqs] * a->num_kv_heads;
    if (tiles != small) free(tiles);
    if (status) return status;
    const int64_t used = a->query_start[a->num_seqs], row_size = a->num_heads * a->value_dim;
    memset(a->out + used * row_size, 0, sizeof(float) * (size_t)((a->num_tokens - used) * row_size));
    for (int64_t t = 0; t < a->num_tokens; t++) write_row(a, t);
    if (work_size < ATTENTION_WORK)
        for (int64_t item = 0; item < items; item++) attention_chunk(pool, a, item);
    else
        parallel(pool, index, items);
    return atomic_load(&pool->out_of_memory) ? FAIL(NO_MEMORY, 0) : 0;
}

static int64_t run(pool_t *pool, step_t *step) {
    for (int i = 0; i < 3; i++)
        if (step->inputs[i].bytes) memcpy(step->inputs[i].to, step->inputs[i].from, (size_t)step->inputs[i].bytes);
    for (int64_t i = 0; i < step->length; i++) {
        const instr_t *p = &step->program[i];
        int64_t status = 0;
        switch (p->op) {
        case LINEAR: parallel(pool, i, p->chunks); break;
        case ATTENTION: status = attention(pool, step, i); break;
        case MATMUL: matmul(p); break;
        case GATHER: {
            const int64_t bad = gather(p);
            if (bad) {
                step->failed_value = ((const int64_t *)p->x[2].at)[bad - 1];
                status = FAIL(BAD_INDEX, bad - 1);
            }
            break;
        }
        default: rows(p);
        }
        if (status) {
            step->failed_at = i;
            return status;
        }
    }
    memcpy(step->output.to, step->output.from, (size_t)step->output.bytes);
    return 0;
}

/* Runs a step, one at a time per pool; 0, or FAIL(code, index) with failed_at and failed_value filled in. */
int64_t camshaft_step_run(pool_t *pool, step_t *step) {
    if (pool->pid != getpid()) fresh(pool); /* forked: the threads stayed with the parent */
    pthread_mutex_lock(&pool->one_step);
    if (pool->num_wanted != step->num_threads - 1) {
        stop_workers(pool);
        start_workers(pool, step->num_threads - 1);
    }
    pool->current = step;
    atomic_store(&pool->out_of_memory, 0);
    if (pool->num_workers) {
        atomic_store_explicit(&pool->running, 1, memory_order_release);
        pthread_mutex_lock(&pool->lock);
        pool->generation++;
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    const int64_t status = run(pool, step);
    atomic_store_explicit(&pool->running, 0, memory_order_release);
    pthread_mutex_unlock(&pool->one_step);
    return status;
}

int64_t camshaft_step_panel(void) { return WIDE; } /* outputs in a panel of bfloat16 weights */
