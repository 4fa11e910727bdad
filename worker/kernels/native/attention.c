/* softmax(scale q k^T) v of each token, over `count` positions of the cache from `first` on. */

#include "parts.h"

#define MOST_WIDTH 256  /* D */
#define MOST_QUERIES 32 /* H / G */
#define KEYS_AT_ONCE 64
#define KEYS_AHEAD 32   /* fetched before they are needed; measured */

/* scores[h] = q[h] k^T for LANES keys, of which the first n are there; the next ones and these ones' values are fetched
   meanwhile, since no processor guesses where they are. */
INLINE void score(const element *q, index_t heads, index_t width, const element *keys, const element *values,
                  index_t stride, index_t n, floats *scores)
{
    floats products[MOST_QUERIES][LANES];
    for (index_t j = 0; j < n; j++) {
        const element *key = keys + j * stride;
        for (index_t i = 0; i < width; i += 64 / sizeof(element)) {
            __builtin_prefetch(key + KEYS_AHEAD * stride + i);
            __builtin_prefetch(values + j * stride + i);
        }
        for (index_t h = 0; h < heads; h++) {
            const element *own = q + h * width;
#ifdef MULTIPLIES_BFLOAT16
            if (width % (2 * LANES) == 0) {
                __m512 sum = _mm512_setzero_ps();
                for (index_t i = 0; i < width; i += 2 * LANES)
                    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(own + i),
                                           (__m512bh)_mm512_loadu_si512(key + i));
                products[h][j] = (floats)sum;
                continue;
            }
#endif
            floats sum = wide_vector(own) * wide_vector(key);
            for (index_t i = LANES; i < width; i += LANES)
                sum += wide_vector(own + i) * wide_vector(key + i);
            products[h][j] = sum;
        }
    }
    for (index_t h = 0; h < heads; h++) {
        for (index_t j = n; j < LANES; j++)
            products[h][j] = (floats){0};
        scores[h] = sums_of(products[h]);
    }
}

INLINE void attend_one(const struct attention *a, index_t unit, index_t width)
{
    index_t t = unit / a->groups, group = unit % a->groups;
    index_t heads = a->queries / a->groups, stride = a->groups * width, vectors = width / LANES;
    const element *q = a->x + t * a->stride + group * heads * width;
    const element *keys = a->keys + a->first[t] * stride + group * width;
    const element *values = a->values + a->first[t] * stride + group * width;
    element *y = a->y + (t * a->queries + group * heads) * width;
    floats sums[MOST_QUERIES * MOST_WIDTH / LANES], block[KEYS_AT_ONCE * MOST_WIDTH / LANES];
    floats scores[KEYS_AT_ONCE / LANES][MOST_QUERIES];
    float largest[MOST_QUERIES], total[MOST_QUERIES];
    const float least = exponent_bounds[0], most = exponent_bounds[1];
    for (index_t i = 0; i < heads * vectors; i++)
        sums[i] = (floats){0};
    for (index_t h = 0; h < heads; h++) {
        largest[h] = -__builtin_inff();
        total[h] = 0;
    }
    for (index_t from = 0; from < a->count[t]; from += KEYS_AT_ONCE) {
        index_t left = a->count[t] - from, n = left < KEYS_AT_ONCE ? left : KEYS_AT_ONCE;
        index_t parts = (n + LANES - 1) / LANES;
        for (index_t p = 0; p < parts; p++) {
            index_t here = n - p * LANES < LANES ? n - p * LANES : LANES;
            index_t at = (from + p * LANES) * stride;
            score(q, heads, width, keys + at, values + at, stride, here, scores[p]);
        }
        for (index_t j = 0; j < n; j++)
            for (index_t i = 0; i < vectors; i++)
                block[j * vectors + i] = wide_vector(values + (from + j) * stride + i * LANES);
        for (index_t h = 0; h < heads; h++) {
            float s[KEYS_AT_ONCE], before = largest[h], now = before, sum = 0;
            for (index_t p = 0; p < parts; p++) {
                floats scaled = scores[p][h] * a->scale;
                memcpy(s + p * LANES, &scaled, sizeof scaled);
            }
            for (index_t j = n; j < parts * LANES; j++)
                s[j] = -__builtin_inff();
#pragma omp simd reduction(max : now)
            for (index_t j = 0; j < parts * LANES; j++)
                now = s[j] > now ? s[j] : now;
#pragma omp simd reduction(+ : sum)
            for (index_t j = 0; j < parts * LANES; j++) {
                s[j] = exponential(s[j] - now, least, most);
                sum += s[j];
            }
            float fade = exponential(before - now, least, most);
            total[h] = total[h] * fade + sum;
            largest[h] = now;
            floats *own = sums + h * vectors, seen[MOST_WIDTH / LANES];
            for (index_t i = 0; i < vectors; i++)
                seen[i] = own[i] * fade;
            for (index_t j = 0; j < n; j++)
                for (index_t i = 0; i < vectors; i++)
                    seen[i] += s[j] * block[j * vectors + i];
            for (index_t i = 0; i < vectors; i++)
                own[i] = seen[i];
        }
    }
    for (index_t h = 0; h < heads; h++)
        for (index_t i = 0; i < width; i++)
            y[h * width + i] = narrow(((float *)sums)[h * width + i] / total[h]);
}

void attention_part(const void *given, index_t begin, index_t end)
{
    const struct attention *a = given;
    for (index_t unit = begin; unit < end; unit++) {
        if (a->width == 64)
            attend_one(a, unit, 64);
        else if (a->width == 128)
            attend_one(a, unit, 128);
        else
            attend_one(a, unit, a->width);
    }
}

void attend(const element *x, index_t x_stride, const element *keys, const element *values, const index_t *first,
            const index_t *count, element *y, index_t tokens, index_t queries, index_t groups, index_t width,
            float scale, int threads)
{
    struct attention a = {x, x_stride, keys, values, first, count, y, queries, groups, width, scale};
    struct phase phase = {attention_part, &a, tokens * groups, 1, 0, 0};
    run(&phase, 1, threads);
}
