/* Shares work out over the team of threads that torch has: it waits for work already, and another one would be in its
   way. */

#include <sched.h>

#include "step.h"

#define SPINS 4000 /* until a thread that waits for another lets the system run something else */

typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);

static parallel_t parallel; /* GOMP_parallel of the OpenMP library that torch has loaded */

void start(parallel_t function) { parallel = function; }

struct team {
    struct phase *phases;
    int num_phases;
};

INLINE void wait_for(const struct phase *phase)
{
    for (int spins = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < phase->count; spins++) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
        if (spins >= SPINS)
            sched_yield();
    }
}

static void take_parts(void *given)
{
    const struct team *team = given;
    for (struct phase *phase = team->phases; phase < team->phases + team->num_phases; phase++) {
        for (;;) {
            index_t begin = __atomic_fetch_add(&phase->next, phase->grain, __ATOMIC_RELAXED);
            if (begin >= phase->count)
                break;
            index_t left = phase->count - begin, n = left < phase->grain ? left : phase->grain;
            phase->part(phase->what, begin, begin + n);
            __atomic_fetch_add(&phase->done, n, __ATOMIC_RELEASE);
        }
        wait_for(phase);
    }
}

void run(struct phase *phases, int num_phases, int threads)
{
    struct team team = {phases, num_phases};
    if (threads > 1 && parallel)
        parallel(take_parts, &team, (unsigned)threads, 0);
    else
        take_parts(&team);
}
