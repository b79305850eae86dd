/* Paged attention for the CPU, computed in float32: writes the new keys and values, then attends over the cache.
 *
 * One piece of work is (sequence, kv head, tile of query rows). The tile's rows times the G query heads of the kv head
 * are M query vectors that share every key and value row, so the cache is read once for all of them:
 *
 *     query vectors (M = rows x G)      keys, TILE_KEYS at a time
 *     row 0: head 0 .. head G-1    x    k[j0 .. j0+63]   -> scores [M, 64] -> softmax so far -> += scores . v
 *     row 1: head 0 .. head G-1
 *
 * The softmax is kept online (Milakov and Gimelshein 2018, algorithm 3; Dao et al. 2022, section 3.1): a running
 * maximum and sum per query vector, the output rescaled where the maximum grows.
 *
 * An infinite or NaN score gives what torch's softmax gives. A cache of bytes (kv_cache.c) becomes float32 a tile of keys at a
 * time, once for the M query vectors. See cpu.py for how it is compiled and called.
 */
#include "kv_cache.c"

#include <pthread.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define TILE_KEYS 64    /* keys per step of the online softmax; a multiple of 2 * LANES */
#define TILE_QUERIES 64 /* query vectors per piece of work (more only where G alone is more) */
#define PACK_FROM 12    /* from this many query vectors on, transposing the keys pays */
#define SERIAL_WORK 400000 /* multiply-adds below which waking threads costs more than it brings */

/* Eight bytes a field, so that Python packs it without padding; cpu.py's _LAYOUT is the same list. */
typedef struct {
    const float *q, *k, *v;
    char *k_cache, *v_cache;
    const int64_t *slot_mapping;
    const int32_t *block_tables, *query_start, *seq_lens;
    const float *sinks, *alibi_slopes; /* NULL: none */
    const uint64_t *tree_mask;         /* NULL: none */
    float *out;                        /* [T, H, Dv], contiguous */
    int64_t q_token, q_head, k_token, k_head, v_token, v_head; /* strides, in elements */
    int64_t kc_block, kc_offset, kc_head, vc_block, vc_offset, vc_head, table_row;
    int64_t num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, value_dim;
    int64_t num_blocks, block_size, table_width, window, num_threads;
    int64_t cache_dtype; /* of kv_cache.c */
    double scale, softcap;
} args_t;

enum { BAD_SLOT = 1, BAD_QUERY_START = 2, BAD_SEQ_LEN = 3, BAD_BLOCK = 4, NO_MEMORY = 5 };
#define FAIL(code, index) ((int64_t)(index) * 8 + (code))

/* scores[i][0..3] = query i . key 0..3 for `count` queries: few queries, so vectors run along the head dimension. */
INLINE void dot_tile(const int count, const float *q, const float *const *rows, float *scores, int64_t dim) {
    vf sum[2][4];
    for (int i = 0; i < count; i++)
        for (int j = 0; j < 4; j++) sum[i][j] = (vf){0};
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
        vf key[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) key[j] = load(rows[j] + d);
#pragma GCC unroll 2
        for (int i = 0; i < count; i++) {
            vf query = load(q + i * dim + d);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] += query * key[j];
        }
    }
    for (int i = 0; i < count; i++) {
        v4 s = sums_of(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        for (int64_t e = d; e < dim; e++)
            s += q[i * dim + e] * (v4){rows[0][e], rows[1][e], rows[2][e], rows[3][e]};
        store4(scores + i * TILE_KEYS, s);
    }
}

static void scores_by_dots(const float *q, const float *const *rows, float *scores, int64_t m, int64_t n, int64_t dim) {
    for (int64_t j = 0; j < n; j += 4) {
        int64_t i = 0;
        for (; i + 2 <= m; i += 2) dot_tile(2, q + i * dim, rows + j, scores + i * TILE_KEYS + j, dim);
        if (i < m) dot_tile(1, q + i * dim, rows + j, scores + i * TILE_KEYS + j, dim);
    }
}

/* packed[d][j] = rows[j][d], four by four. */
static void transpose_keys(const float *const *rows, float *packed, int64_t n, int64_t dim) {
    for (int64_t j = 0; j < n; j += 4) {
        int64_t d = 0;
        for (; d + 4 <= dim; d += 4) {
            v4 a = load4(rows[j] + d), b = load4(rows[j + 1] + d), c = load4(rows[j + 2] + d), e = load4(rows[j + 3] + d);
            v4 ab0 = SHUFFLE(a, b, 0, 4, 1, 5), ab1 = SHUFFLE(a, b, 2, 6, 3, 7);
            v4 ce0 = SHUFFLE(c, e, 0, 4, 1, 5), ce1 = SHUFFLE(c, e, 2, 6, 3, 7);
            store4(packed + d * TILE_KEYS + j, SHUFFLE(ab0, ce0, 0, 1, 4, 5));
            store4(packed + (d + 1) * TILE_KEYS + j, SHUFFLE(ab0, ce0, 2, 3, 6, 7));
            store4(packed + (d + 2) * TILE_KEYS + j, SHUFFLE(ab1, ce1, 0, 1, 4, 5));
            store4(packed + (d + 3) * TILE_KEYS + j, SHUFFLE(ab1, ce1, 2, 3, 6, 7));
        }
        for (; d < dim; d++)
            for (int64_t i = j; i < j + 4; i++) packed[d * TILE_KEYS + i] = rows[i][d];
    }
}

/* Many queries: vectors run along the keys. q has whole groups of four rows (the last ones zero). */
static void scores_by_tiles(const float *q, const float *packed, float *scores, int64_t m, int64_t n, int64_t dim) {
    for (int64_t j = 0; j < n; j += 2 * LANES)
        for (int64_t i = 0; i < m; i += 4) {
            const float *q0 = q + i * dim;
            vf sum[4][2] = {{{0}}};
            for (int64_t d = 0; d < dim; d++) {
                vf k0 = load(packed + d * TILE_KEYS + j), k1 = load(packed + d * TILE_KEYS + j + LANES);
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    vf x = splat(q0[r * dim + d]);
                    sum[r][0] += x * k0;
                    sum[r][1] += x * k1;
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                store(scores + (i + r) * TILE_KEYS + j, sum[r][0]);
                store(scores + (i + r) * TILE_KEYS + j + LANES, sum[r][1]);
            }
        }
}

/* out[r][0..width vectors) += sum over keys of p[r][j] * value row j, for `count` queries. */
INLINE void values_tile(const int count, const int width, const float *p, const float *const *rows, float *out,
                        int64_t n, int64_t dim) {
    vf sum[4][2];
    for (int r = 0; r < count; r++)
        for (int w = 0; w < width; w++) sum[r][w] = load(out + r * dim + w * LANES);
    for (int64_t j = 0; j < n; j++) {
        vf value[2];
        for (int w = 0; w < width; w++) value[w] = load(rows[j] + w * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            vf x = splat(p[r * TILE_KEYS + j]);
            for (int w = 0; w < width; w++) sum[r][w] += x * value[w];
        }
    }
    for (int r = 0; r < count; r++)
        for (int w = 0; w < width; w++) store(out + r * dim + w * LANES, sum[r][w]);
}

INLINE void values_rows(const int count, const float *p, const float **rows, float *out, int64_t n, int64_t dim) {
    int64_t d = 0;
    const float *at[TILE_KEYS];
    while (d + LANES <= dim) {
        for (int64_t j = 0; j < n; j++) at[j] = rows[j] + d;
        if (d + 2 * LANES <= dim) {
            values_tile(count, 2, p, at, out + d, n, dim);
            d += 2 * LANES;
        } else {
            values_tile(count, 1, p, at, out + d, n, dim);
            d += LANES;
        }
    }
    for (; d < dim; d++)
        for (int r = 0; r < count; r++)
            for (int64_t j = 0; j < n; j++) out[r * dim + d] += p[r * TILE_KEYS + j] * rows[j][d];
}

static void add_values(const float *p, const float **rows, float *out, int64_t m, int64_t n, int64_t dim) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) values_rows(4, p + i * TILE_KEYS, rows, out + i * dim, n, dim);
    p += i * TILE_KEYS;
    out += i * dim;
    if (m - i == 3) values_rows(3, p, rows, out, n, dim);
    if (m - i == 2) values_rows(2, p, rows, out, n, dim);
    if (m - i == 1) values_rows(1, p, rows, out, n, dim);
}

typedef struct { /* one thread's memory; kept between calls, freed when the thread ends */
    size_t size;
    float *q, *out, *scores, *packed, *maximum, *sum;
    float *keys, *values; /* rows of a tile of a cache of bytes */
    const float *key_rows[TILE_KEYS], *value_rows[TILE_KEYS];
    float *memory;
} scratch_t;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static void scratch_free(void *pointer) {
    free(((scratch_t *)pointer)->memory);
    free(pointer);
}
static void scratch_make_key(void) { pthread_key_create(&scratch_key, scratch_free); }

/* For m query vectors. */
static scratch_t *scratch_get(const args_t *a, int64_t m) {
    const int64_t head_dim = a->head_dim, value_dim = a->value_dim, row = a->cache_dtype == FLOAT32 ? 0 : TILE_KEYS;
    pthread_once(&scratch_once, scratch_make_key);
    scratch_t *s = pthread_getspecific(scratch_key);
    if (!s) {
        if (!(s = calloc(1, sizeof *s))) return NULL;
        pthread_setspecific(scratch_key, s);
    }
    m = (m + 15) / 16 * 16; /* keeps every part aligned to 64 bytes */
    size_t size = (size_t)(m * (head_dim + value_dim + TILE_KEYS + 2) + head_dim * (TILE_KEYS + row) + value_dim * row);
    size *= sizeof(float);
    if (s->size < size) {
        free(s->memory);
        s->size = 0;
        if (posix_memalign((void **)&s->memory, 64, size)) {
            s->memory = NULL;
            return NULL;
        }
        s->size = size;
    }
    s->scores = s->memory;
    s->packed = s->scores + m * TILE_KEYS;
    s->keys = s->packed + head_dim * TILE_KEYS;
    s->values = s->keys + head_dim * row;
    s->maximum = s->values + value_dim * row;
    s->sum = s->maximum + m;
    s->q = s->sum + m;
    s->out = s->q + m * head_dim;
    return s;
}

INLINE void cap_scores(float *scores, int64_t padded, float softcap) {
    if (softcap != 0.0f)
        for (int64_t j = 0; j < padded; j += LANES)
            store(scores + j, tanh_v(load(scores + j) * (1.0f / softcap)) * softcap);
}

/* One row of scores for keys j0 .. j0+n-1 (room for `padded`): softcap, alibi, mask. lo and hi bound the visible columns; dist
 * is (j0 - the row's position). */
static void shape_row(float *scores, int64_t lo, int64_t hi, int64_t padded, float softcap, float slope, int64_t dist) {
    const float inf = __builtin_inff();
    vf lanes;
    for (int l = 0; l < LANES; l++) lanes[l] = (float)l;
    cap_scores(scores, padded, softcap);
    if (slope != 0.0f)
        for (int64_t j = 0; j < padded; j += LANES)
            store(scores + j, load(scores + j) + (lanes + (float)(dist + j)) * slope);
    for (int64_t j = 0; j < lo; j++) scores[j] = -inf;
    for (int64_t j = hi; j < padded; j++) scores[j] = -inf;
}

/* The same for a row of a token tree, which sees the rows of `mask`, itself the last, and the `before` tokens in front of them.
 * Ancestors between two rows are the bits between theirs. */
static void shape_tree_row(float *scores, uint64_t mask, int64_t before, int64_t j0, int64_t n, int64_t padded, int64_t window,
                           float softcap, float slope) {
    const int64_t position = before + __builtin_popcountll(mask) - 1;
    cap_scores(scores, padded, softcap);
    for (int64_t j = 0; j < padded; j++) {
        const int64_t row = j0 + j - before, distance = row < 0 ? position - j0 - j
                                                      : row < 63 ? __builtin_popcountll(mask >> (row + 1)) : 0;
        const int seen = j < n && (row < 0 || (row < 64 && mask >> row & 1)) && (!window || distance < window);
        scores[j] = seen ? scores[j] - slope * (float)distance : -__builtin_inff();
    }
}

/* Exponentials of a row of shaped scores, and the running state. Returns the factor for the output so far. */
static float softmax_row(float *scores, int64_t padded, float *maximum, float *sum) {
    const float inf = __builtin_inff();
    vf top_v = splat(-inf);
    for (int64_t j = 0; j < padded; j += LANES) {
        vf s = load(scores + j);
        top_v = pick(s > top_v, s, top_v);
    }
    float before = *maximum, top = before, total = 0.0f;
    for (int l = 0; l < LANES; l++) top = top_v[l] > top ? top_v[l] : top;
    const float base = top == -inf ? 0.0f : top; /* all scores -inf: every exponential is 0, not NaN */
    vf total_v = {0};
    for (int64_t j = 0; j < padded; j += LANES) {
        vf e = exp_v(load(scores + j) - base);
        store(scores + j, e);
        total_v += e;
    }
    for (int l = 0; l < LANES; l++) total += total_v[l];
    if (before == top) {
        *sum += total;
        return 1.0f;
    }
    float factor = exp_v(splat(before - base))[0];
    *maximum = top;
    *sum = *sum * factor + total;
    return factor;
}

typedef struct { const args_t *a; const int32_t *table; int64_t kv, block, offset; } token_t; /* of a sequence's cache */

INLINE token_t token_at(const args_t *a, const int32_t *table, int64_t kv, int64_t j) {
    return (token_t){a, table, kv, j / a->block_size, j % a->block_size};
}
INLINE void next_token(token_t *t) { if (++t->offset == t->a->block_size) t->offset = 0, t->block++; }
INLINE const char *key_of(const token_t *t) {
    const args_t *a = t->a;
    const int64_t at = t->table[t->block] * a->kc_block + t->offset * a->kc_offset + t->kv * a->kc_head;
    return a->k_cache + value_bytes(a->cache_dtype) * at;
}
INLINE const char *value_of(const token_t *t) {
    const args_t *a = t->a;
    const int64_t at = t->table[t->block] * a->vc_block + t->offset * a->vc_offset + t->kv * a->vc_head;
    return a->v_cache + value_bytes(a->cache_dtype) * at;
}

/* Sets t's rows to the keys and values of tokens j0 .. j0+n-1: where they lie, or float32 copies of a cache of bytes. Asks for
 * those of the next tile, up to token `end`: rows of one head lie too far apart for the processor to see them coming. */
static void locate_rows(const args_t *a, scratch_t *t, const int32_t *table, int64_t kv, int64_t j0, int64_t n, int64_t end) {
    const int64_t bytes = value_bytes(a->cache_dtype);
    token_t token = token_at(a, table, kv, j0), later = token_at(a, table, kv, j0 + TILE_KEYS);
    for (int64_t j = 0; j < n; j++) {
        if (j0 + TILE_KEYS + j < end) {
            fetch(key_of(&later), bytes * a->head_dim);
            fetch(value_of(&later), bytes * a->value_dim);
            next_token(&later);
        }
        t->key_rows[j] = read_values(a->cache_dtype, key_of(&token), t->keys + j * a->head_dim, a->head_dim);
        t->value_rows[j] = read_values(a->cache_dtype, value_of(&token), t->values + j * a->value_dim, a->value_dim);
        next_token(&token);
    }
}

/* 0 for a row of a text, otherwise which rows of its sequence a row of a token tree sees, none behind itself. */
INLINE uint64_t tree_of(const args_t *a, int64_t row, int64_t row_in_sequence) {
    const uint64_t mask = a->tree_mask ? a->tree_mask[row] : 0;
    return row_in_sequence < 63 ? mask & (((uint64_t)2 << row_in_sequence) - 1) : mask;
}

/* Rows [row, row + num_rows) of the packed batch, at positions from `position` on, for one kv head. */
static void attend(const args_t *a, scratch_t *t, int64_t seq, int64_t kv, int64_t row, int64_t num_rows, int64_t position) {
    const int64_t group = a->num_heads / a->num_kv_heads, dim = a->head_dim, vdim = a->value_dim;
    const int64_t m = num_rows * group, whole = (m + 3) / 4 * 4, head = kv * group;
    const int32_t *table = a->block_tables + seq * a->table_row;
    const float scale = (float)a->scale, softcap = (float)a->softcap;
    for (int64_t i = 0; i < m; i++) {
        const float *from = a->q + (row + i / group) * a->q_token + (head + i % group) * a->q_head;
        for (int64_t d = 0; d < dim; d++) t->q[i * dim + d] = from[d] * scale;
        t->maximum[i] = a->sinks ? a->sinks[head + i % group] : -__builtin_inff();
        t->sum[i] = a->sinks ? 1.0f : 0.0f;
    }
    memset(t->q + m * dim, 0, sizeof(float) * (size_t)((whole - m) * dim));
    memset(t->out, 0, sizeof(float) * (size_t)(m * vdim));

    const int64_t end = position + num_rows, first_row = row - a->query_start[seq], before = position - first_row;
    const int64_t seen_from = a->tree_mask ? before : position; /* the first row's position, at least */
    for (int64_t j0 = a->window ? max64(0, seen_from - a->window + 1) : 0; j0 < end; j0 += TILE_KEYS) {
        const int64_t n = min64(TILE_KEYS, end - j0), padded = (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
        locate_rows(a, t, table, kv, j0, n, end);
        for (int64_t j = n; j < padded; j++) t->key_rows[j] = t->key_rows[n - 1]; /* computed, then masked */
        if (m >= PACK_FROM) {
            transpose_keys(t->key_rows, t->packed, padded, dim);
            scores_by_tiles(t->q, t->packed, t->scores, m, padded, dim);
        } else {
            scores_by_dots(t->q, t->key_rows, t->scores, m, padded, dim);
        }
        for (int64_t i = 0; i < m; i++) {
            const int64_t at = position + i / group, hi = min64(n, at - j0 + 1);
            const int64_t lo = a->window ? max64(0, at - a->window + 1 - j0) : 0;
            const float slope = a->alibi_slopes ? a->alibi_slopes[head + i % group] : 0.0f;
            const uint64_t tree = tree_of(a, row + i / group, first_row + i / group);
            float *scores = t->scores + i * TILE_KEYS;
            if (!tree && hi <= lo) {
                memset(scores, 0, sizeof(float) * (size_t)padded);
                continue;
            }
            if (tree) shape_tree_row(scores, tree, before, j0, n, padded, a->window, softcap, slope);
            else shape_row(scores, lo, hi, padded, softcap, slope, j0 - at);
            const float factor = softmax_row(scores, padded, t->maximum + i, t->sum + i);
            if (factor != 1.0f)
                for (int64_t d = 0; d < vdim; d++) t->out[i * vdim + d] *= factor;
        }
        add_values(t->scores, t->value_rows, t->out, m, n, vdim);
    }
    for (int64_t i = 0; i < m; i++) {
        float *to = a->out + ((row + i / group) * a->num_heads + head + i % group) * vdim;
        const float inverse = 1.0f / t->sum[i];
        for (int64_t d = 0; d < vdim; d++) to[d] = t->out[i * vdim + d] * inverse;
    }
}

static void write_row(const args_t *a, int64_t t) {
    const int64_t slot = a->slot_mapping[t];
    if (slot < 0) return;
    const int64_t block = slot / a->block_size, offset = slot % a->block_size, bytes = value_bytes(a->cache_dtype);
    for (int64_t h = 0; h < a->num_kv_heads; h++) {
        char *key = a->k_cache + bytes * (block * a->kc_block + offset * a->kc_offset + h * a->kc_head);
        char *value = a->v_cache + bytes * (block * a->vc_block + offset * a->vc_offset + h * a->vc_head);
        write_values(a->cache_dtype, a->k + t * a->k_token + h * a->k_head, key, a->head_dim);
        write_values(a->cache_dtype, a->v + t * a->v_token + h * a->v_head, value, a->value_dim);
    }
}

/* Everything that addresses memory is checked before anything is written. */
static int64_t check(const args_t *a, int64_t *tiles, int64_t rows_per_tile, double *work) {
    const int64_t num_slots = a->num_blocks * a->block_size;
    for (int64_t t = 0; t < a->num_tokens; t++)
        if (a->slot_mapping[t] < -1 || a->slot_mapping[t] >= num_slots) return FAIL(BAD_SLOT, t);
    tiles[0] = 0;
    *work = 0;
    if (a->query_start[0] != 0) return FAIL(BAD_QUERY_START, 0);
    for (int64_t s = 0; s < a->num_seqs; s++) {
        const int64_t rows = (int64_t)a->query_start[s + 1] - a->query_start[s], len = a->seq_lens[s];
        if (rows < 0 || a->query_start[s + 1] > a->num_tokens) return FAIL(BAD_QUERY_START, s + 1);
        tiles[s + 1] = tiles[s] + (rows + rows_per_tile - 1) / rows_per_tile;
        if (!rows) continue;
        if (len < rows || len > a->table_width * a->block_size) return FAIL(BAD_SEQ_LEN, s);
        const int64_t first = a->window ? max64(0, len - rows - a->window + 1) : 0;
        for (int64_t b = first / a->block_size; b <= (len - 1) / a->block_size; b++) {
            const int32_t block = a->block_tables[s * a->table_row + b];
            if (block < 0 || block >= a->num_blocks) return FAIL(BAD_BLOCK, s);
        }
        *work += (double)rows * (double)(len - first);
    }
    *work *= (double)(a->num_heads * (a->head_dim + a->value_dim));
    return 0;
}

/* 0, or FAIL(code, index): what is wrong and with which row or sequence; then nothing was written. */
int64_t camshaft_paged_attention(const args_t *a) {
    const int64_t group = a->num_heads / a->num_kv_heads;
    const int64_t rows_per_tile = max64(1, TILE_QUERIES / group);
    int64_t small[129], *tiles = a->num_seqs < 129 ? small : malloc(sizeof(int64_t) * (size_t)(a->num_seqs + 1));
    if (!tiles) return FAIL(NO_MEMORY, 0);
    double work;
    int64_t status = check(a, tiles, rows_per_tile, &work);
    if (status == 0) {
        const int64_t used = a->query_start[a->num_seqs], row_size = a->num_heads * a->value_dim;
        memset(a->out + used * row_size, 0, sizeof(float) * (size_t)((a->num_tokens - used) * row_size));
        const int64_t num_items = tiles[a->num_seqs] * a->num_kv_heads;
        int out_of_memory = 0;
        int threads = work < SERIAL_WORK ? 1 : (int)max64(1, min64(a->num_threads, num_items));
        (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < a->num_tokens; t++) write_row(a, t);
            scratch_t *scratch = scratch_get(a, rows_per_tile * group);
            if (!scratch) {
#pragma omp atomic write
                out_of_memory = 1;
            }
            /* the last tiles first: under the causal mask they are the longest */
#pragma omp for schedule(dynamic, 1)
            for (int64_t item = num_items - 1; item >= 0; item--) {
                if (!scratch) continue;
                const int64_t tile = item / a->num_kv_heads;
                int64_t low = 0, high = a->num_seqs - 1; /* the sequence with tiles[s] <= tile < tiles[s + 1] */
                while (low < high) {
                    const int64_t middle = (low + high) / 2;
                    if (tiles[middle + 1] <= tile) low = middle + 1; else high = middle;
                }
                const int64_t start = a->query_start[low], rows = a->query_start[low + 1] - start;
                const int64_t first = (tile - tiles[low]) * rows_per_tile;
                attend(a, scratch, low, item % a->num_kv_heads, start + first, min64(rows_per_tile, rows - first),
                       a->seq_lens[low] - rows + first);
            }
        }
        if (out_of_memory) status = FAIL(NO_MEMORY, 0);
    }
    if (tiles != small) free(tiles);
    return status;
}

/* 1 where OpenMP was compiled in, and what it would start by default. */
int64_t camshaft_openmp_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 0;
#endif
}
