/* A loop over tasks on a pool of threads of our own, made to share its cores with others.
 *
 * OpenMP gives each thread its part and waits for all of them: a thread that the system has put aside stalls everybody
 * for a time slice. Here a thread that comes late finds nothing left to do, and nobody has waited for it.
 */
#include <pthread.h>
#include <sched.h>

#include "common.h"

#define SPINS_BEFORE_SLEEP 20000 /* a worker's, 0.2 to 0.5 ms: longer than the pauses inside a step */
#define MAX_WORKERS 255
#define CLOSED (1 << 30)

static struct {
    task_fn task;
    void *args;
    int64_t num_tasks, next;
    int state;           /* number of workers inside; CLOSED: nobody may enter */
    unsigned generation; /* counts jobs */
    int num_sleeping;
} pool = {.state = CLOSED};

static pthread_mutex_t one_job = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t new_job = PTHREAD_COND_INITIALIZER;
static int num_workers;          /* started */
static int num_workers_used = 0; /* of them, those that may enter */

static void do_tasks(void) {
    for (;;) {
        const int64_t index = __atomic_fetch_add(&pool.next, 1, __ATOMIC_RELAXED);
        if (index >= pool.num_tasks) return;
        pool.task(pool.args, index);
    }
}

static unsigned wait_for_job(unsigned seen) {
    for (int i = 0; i < SPINS_BEFORE_SLEEP; i++) {
        const unsigned now = __atomic_load_n(&pool.generation, __ATOMIC_ACQUIRE);
        if (now != seen) return now;
        _mm_pause();
    }
    pthread_mutex_lock(&sleep_lock);
    __atomic_fetch_add(&pool.num_sleeping, 1, __ATOMIC_SEQ_CST);
    unsigned now;
    while ((now = __atomic_load_n(&pool.generation, __ATOMIC_SEQ_CST)) == seen) pthread_cond_wait(&new_job, &sleep_lock);
    __atomic_fetch_sub(&pool.num_sleeping, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&sleep_lock);
    return now;
}

static void *run_worker(void *argument) {
    const int number = (int)(intptr_t)argument;
    for (unsigned seen = 0;;) {
        seen = wait_for_job(seen);
        if (number >= __atomic_load_n(&num_workers_used, __ATOMIC_RELAXED)) continue;
        int state = __atomic_load_n(&pool.state, __ATOMIC_ACQUIRE);
        while (!(state & CLOSED) &&
               !__atomic_compare_exchange_n(&pool.state, &state, state + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        }
        if (state & CLOSED) continue;
        do_tasks();
        __atomic_fetch_sub(&pool.state, 1, __ATOMIC_RELEASE);
    }
    return NULL;
}

void run_tasks(task_fn task, void *args, int64_t num_tasks) {
    /* Two engines of one process take turns; the one that comes second does not wait. */
    if (num_tasks < 2 || num_workers_used == 0 || pthread_mutex_trylock(&one_job) != 0) {
        for (int64_t i = 0; i < num_tasks; i++) task(args, i);
        return;
    }
    pool.task = task;
    pool.args = args;
    pool.num_tasks = num_tasks;
    __atomic_store_n(&pool.next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&pool.state, 0, __ATOMIC_RELEASE);
    __atomic_fetch_add(&pool.generation, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool.num_sleeping, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&new_job);
        pthread_mutex_unlock(&sleep_lock);
    }
    do_tasks();
    __atomic_fetch_or(&pool.state, CLOSED, __ATOMIC_ACQ_REL);
    for (int i = 0; __atomic_load_n(&pool.state, __ATOMIC_ACQUIRE) != CLOSED; i++) {
        if (i < 1000)
            _mm_pause();
        else
            sched_yield(); /* a worker was put aside in the middle of a task: give it our core */
    }
    pthread_mutex_unlock(&one_job);
}

/* Use this many threads from now on, the caller's included. Those that do not start are done without. */
void chorus_set_threads(int32_t num_threads) {
    pthread_mutex_lock(&one_job);
    int wanted = num_threads - 1 < MAX_WORKERS ? num_threads - 1 : MAX_WORKERS;
    while (num_workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run_worker, (void *)(intptr_t)num_workers) != 0) break;
        pthread_detach(thread);
        num_workers++;
    }
    num_workers_used = wanted < num_workers ? wanted : num_workers;
    pthread_mutex_unlock(&one_job);
}

/* ---- memory that a thread keeps */

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

typedef struct {
    void *data;
    size_t bytes;
} buffer;

static void free_scratch(void *pointer) {
    buffer *buffers = pointer;
    for (int i = 0; i < NUM_SCRATCH; i++) free(buffers[i].data);
    free(buffers);
}

static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

void *scratch_memory(scratch_use use, size_t bytes) {
    pthread_once(&scratch_once, make_scratch_key);
    buffer *buffers = pthread_getspecific(scratch_key);
    if (!buffers) {
        buffers = calloc(NUM_SCRATCH, sizeof *buffers);
        if (!buffers || pthread_setspecific(scratch_key, buffers) != 0) return NULL;
    }
    buffer *b = buffers + use;
    if (b->bytes < bytes) {
        free(b->data);
        b->bytes = 0;
        if (posix_memalign(&b->data, 64, bytes) != 0) return b->data = NULL;
        b->bytes = bytes;
    }
    return b->data;
}
