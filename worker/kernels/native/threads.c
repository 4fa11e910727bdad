/* Shares work out over the team of threads that torch has: it waits for work already, and another one would be in its
   way. */

#include "step.h"

typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);

static parallel_t parallel; /* GOMP_parallel of the OpenMP library that torch has loaded */

void start(parallel_t function) { parallel = function; }

struct work {
    part_t part;
    const void *what;
    index_t count, grain;
    index_t next;
};

static void take_parts(void *given)
{
    struct work *work = given;
    for (;;) {
        index_t begin = __atomic_fetch_add(&work->next, work->grain, __ATOMIC_RELAXED);
        if (begin >= work->count)
            return;
        index_t end = begin + work->grain;
        work->part(work->what, begin, end < work->count ? end : work->count);
    }
}

void share(part_t part, const void *what, index_t count, index_t grain, int threads)
{
    struct work work = {part, what, count, grain, 0};
    if (threads < 2 || count <= grain || !parallel)
        part(what, 0, count);
    else
        parallel(take_parts, &work, (unsigned)threads, 0);
}
