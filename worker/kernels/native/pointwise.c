/* What is done to each token by itself: norms, gates, and turning queries and keys by their positions. */

#include "parts.h"

float exponent_bounds[2] = {-87.0f, 88.0f};

/* ---- y = w x / rms(x) ---- */

void norm_part(const void *given, index_t begin, index_t end)
{
    const struct norm *a = given;
    for (index_t t = begin; t < end; t++) {
        const element *x = a->x + t * a->width;
        element *y = a->y + t * a->width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (index_t i = 0; i < a->width; i++)
            sum += wide(x[i]) * wide(x[i]);
        float scale = 1.0f / __builtin_sqrtf(sum / (float)a->width + a->eps);
#pragma omp simd
        for (index_t i = 0; i < a->width; i++)
            y[i] = narrow(wide(x[i]) * scale * wide(a->weight[i]));
    }
}

/* ---- y = silu(gate) up, of x = [gate | up] ---- */

void gate_part(const void *given, index_t begin, index_t end)
{
    const struct gate *a = given;
    const float least = exponent_bounds[0], most = exponent_bounds[1];
    for (index_t t = begin; t < end; t++) {
        const element *gate = a->x + 2 * t * a->width, *up = gate + a->width;
        element *y = a->y + t * a->width;
#pragma omp simd
        for (index_t i = 0; i < a->width; i++) {
            float g = wide(gate[i]);
            y[i] = narrow(g / (1.0f + exponential(-g, least, most)) * wide(up[i]));
        }
    }
}

/* ---- q and k of x = [q | k | v] turned in place by their positions, k and v written to the cache ---- */

void turn_part(const void *given, index_t begin, index_t end)
{
    const struct turn *a = given;
    index_t half = a->width / 2, kept = a->groups * a->width;
    for (index_t t = begin; t < end; t++) {
        element *x = a->x + t * (a->queries + 2 * a->groups) * a->width;
        const element *cos = a->cos + t * a->width, *sin = a->sin + t * a->width;
        for (index_t h = 0; h < a->queries + a->groups; h++) {
            element *first = x + h * a->width, *second = first + half;
#pragma omp simd
            for (index_t i = 0; i < half; i++) {
                float one = wide(first[i]), two = wide(second[i]);
                first[i] = narrow(one * wide(cos[i]) - two * wide(sin[i]));
                second[i] = narrow(two * wide(cos[half + i]) + one * wide(sin[half + i]));
            }
        }
        const element *k = x + a->queries * a->width;
        memcpy(a->keys + a->where[t] * kept, k, (size_t)kept * sizeof(element));
        memcpy(a->values + a->where[t] * kept, k + kept, (size_t)kept * sizeof(element));
    }
}

