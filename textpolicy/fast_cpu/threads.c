/* The threads of the loops: what gcc calls for `#pragma omp parallel`.

   In a decode step, a loop takes some microseconds and the next one follows at once. The threads of
   gcc's own library sleep as soon as there are more threads than processors, and to wake one takes
   longer than a loop. Here the calling thread begins at once and takes the parts that no other thread
   has begun, so it never waits for a thread that has yet to wake. The others look for work for a while
   before they sleep.

   A loop is cut into as many parts as `num_threads` says, and what a part computes depends on the
   number of parts alone. If several threads begin loops at the same time, one of them gets the others'
   help. */

#if defined(__GNUC__) && !defined(__clang__)

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "loops.h"

#define HIDDEN __attribute__((visibility("hidden")))

enum { MOST_THREADS = 256, LOOK_FOR_NANOSECONDS = 100000 };

/* The job that is being done: its number, how many parts it has, and the next part, in one word, so that
   one step takes a part of the right job. */
static _Atomic uint64_t ticket;
enum { BITS = 16, PART = (1 << BITS) - 1 };
static void (*work)(void *);
static void *data;
static atomic_int done, sleeping, helpers_wanted;

static int helpers;
static pthread_mutex_t one_job = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t asleep = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER;
static __thread int part, parts = 1;

HIDDEN int omp_get_thread_num(void) { return part; }
HIDDEN int omp_get_num_threads(void) { return parts; }

static void do_part(void (*function)(void *), void *argument, int number, int all) {
    int outer_part = part, outer_parts = parts;
    part = number, parts = all;
    function(argument);
    part = outer_part, parts = outer_parts;
}

static int has_parts(uint64_t t) { return (t & PART) < (t >> BITS & PART); }

/* Do the parts that nobody has begun. */
static void help(void) {
    while (has_parts(atomic_load(&ticket))) {
        uint64_t taken = atomic_fetch_add(&ticket, 1);
        if (!has_parts(taken)) return;
        /* The job cannot end before this part is done, so these are its function and its data. */
        do_part(work, data, taken & PART, taken >> BITS & PART);
        atomic_fetch_add(&done, 1);
    }
}

static void rest(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int is_wanted(int number) {
    return number < atomic_load(&helpers_wanted) && has_parts(atomic_load(&ticket));
}

static void *helper(void *own_number) {
    int number = (int)(intptr_t)own_number;
    int64_t since = nanoseconds();
    for (;;) {
        for (int turn = 0; turn < 64 && !is_wanted(number); turn++) rest();
        if (is_wanted(number)) {
            help();
            since = nanoseconds();
        } else if (nanoseconds() - since > LOOK_FOR_NANOSECONDS) {
            pthread_mutex_lock(&asleep);
            atomic_fetch_add(&sleeping, 1);
            while (!is_wanted(number)) pthread_cond_wait(&begun, &asleep);
            atomic_fetch_sub(&sleeping, 1);
            pthread_mutex_unlock(&asleep);
        }
    }
    return NULL;
}

/* A child process of fork has no helpers. */
static void forget_helpers(void) {
    helpers = 0;
    atomic_store(&sleeping, 0);
    atomic_store(&ticket, 0);
    pthread_mutex_init(&one_job, NULL);
    pthread_mutex_init(&asleep, NULL);
    pthread_cond_init(&begun, NULL);
}

static void start_helpers(int wanted) {
    static int is_known;
    if (!is_known) is_known = !pthread_atfork(NULL, NULL, forget_helpers);
    atomic_store(&helpers_wanted, wanted);
    for (; helpers < least(wanted, MOST_THREADS); helpers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper, (void *)(intptr_t)helpers)) return;
        pthread_detach(thread);
    }
}

/* Let all threads do the parts of a job; `one_job` is locked. */
static void do_job(void (*function)(void *), void *argument, int count, int threads) {
    start_helpers(threads - 1);
    work = function;
    data = argument;
    atomic_store(&done, 0);
    atomic_store(&ticket, ((atomic_load(&ticket) >> 2 * BITS) + 1) << 2 * BITS |
                              (uint64_t)count << BITS);
    if (atomic_load(&sleeping)) {
        pthread_mutex_lock(&asleep);
        pthread_cond_broadcast(&begun);
        pthread_mutex_unlock(&asleep);
    }
    help();
    /* A helper that the system has stopped needs a processor to go on. */
    for (int turn = 0; atomic_load(&done) < count; turn++)
        turn < 1 << 12 ? rest() : (void)sched_yield();
}

HIDDEN void GOMP_parallel(void (*function)(void *), void *argument, unsigned count, unsigned flags) {
    (void)flags;
    int threads = threads_for(1);
    if (count < 2 || threads < 2 || parts > 1 || pthread_mutex_trylock(&one_job)) {
        for (int number = 0; number < (int)count; number++)
            do_part(function, argument, number, count);
        return;
    }
    do_job(function, argument, count, threads);
    pthread_mutex_unlock(&one_job);
}

typedef void OpenBLASJob(int number, void *job, int buffer);

typedef struct {
    OpenBLASJob *run;
    char *jobs;
    size_t size;
    int buffer;
} OpenBLASJobs;

static void run_job(void *argument) {
    OpenBLASJobs *all = argument;
    all->run(part, all->jobs + part * all->size, all->buffer);
}

/* Run the jobs of a product of OpenBLAS, which wait for each other: each needs a thread of its own. */
static void run_jobs(int wait, OpenBLASJob *run, int count, size_t size, void *jobs, int buffer) {
    (void)wait;
    OpenBLASJobs all = {run, jobs, size, buffer};
    pthread_mutex_lock(&one_job);
    do_job(run_job, &all, count, count);
    pthread_mutex_unlock(&one_job);
}

typedef void OpenBLASThreads(int, OpenBLASJob *, int, size_t, void *, int);

/* Let OpenBLAS compute with these threads, if there can be so many. Two sets of threads, each of which
   looks for work, would keep each other from the processors. */
int threads_begin(void (*use)(OpenBLASThreads *), int threads) {
    pthread_mutex_lock(&one_job);
    start_helpers(threads - 1);
    int are_there = helpers >= threads - 1;
    pthread_mutex_unlock(&one_job);
    if (are_there) use(run_jobs);
    return are_there;
}

#endif
