/* A whole decode step in one call: an interpreter of the flat programs that native_step.py writes, float32.
 *
 *     program:  | gather | rms_norm | linear | rope | rope | attention | linear | add_rms_norm | linear | glu | ...
 *
 * For few tokens a step is bound by reading the weights once. `linear` therefore reads them as bfloat16 where that
 * holds their values exactly (the copy's layout is drawn in step_ops.c), and is cut into chunks that threads take
 * from a common counter; so are the integer weights of step_quantized.c. The calling thread walks through the program
 * and does everything else itself: it never waits for a thread that has not begun, so a busy machine only makes it
 * slower. Worker threads spin while a step runs and sleep between steps.
 *
 * Sizes and pointers were checked when the program was written; what changes from step to step (token ids, sample rows,
 * block tables) is checked here.
 */
#include "step_quantized.c"

#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#define SPIN_LIMIT 20000    /* looks at the counter (about 0.5 ms) after which a worker sleeps until the next step */
#define YIELD_EVERY 512     /* looks between offers of the core to others */
#define ATTENTION_WORK 60000 /* multiply-adds below which attention stays on the calling thread */

typedef struct { const int64_t *slot_mapping; const int32_t *block_tables; int64_t table_row, table_width; } group_t;
typedef struct { char *to; const char *from; int64_t bytes; } transfer_t;

/* What a step brings; native_step.py's _STEP is the same list. */
typedef struct {
    const instr_t *program;
    int64_t length, num_threads;
    transfer_t inputs[3], output;
    const int32_t *query_start, *seq_lens;
    const uint64_t *tree_mask; /* NULL: none */
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

/* ------------------------------------------------------------------------------------------------ threads and steps */
static int64_t rows_per_tile(const args_t *a) { return max64(1, TILE_QUERIES / (a->num_heads / a->num_kv_heads)); }

/* One (sequence, tile of rows, kv head) of attention. */
static void attention_chunk(pool_t *pool, const args_t *a, int64_t item) {
    const int64_t per_tile = rows_per_tile(a);
    scratch_t *scratch = scratch_get(a, per_tile * (a->num_heads / a->num_kv_heads));
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
    else if (p->op == LINEAR_INT) linear_int(p, chunk);
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
    a->tree_mask = step->tree_mask;
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
        case LINEAR:
        case LINEAR_INT: parallel(pool, i, p->chunks); break;
        case ROUND_ROWS: round_rows(p); break;
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
