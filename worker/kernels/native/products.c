/* y = (y0 +) x W^T (+ b). With few tokens, what counts is that W streams from memory, once and without a pause. */

#include "parts.h"

#define FETCH_AHEAD (16384 / sizeof(element)) /* as far as memory answers late; measured */
#ifdef __AVX512F__
#define ROWS_AT_ONCE 8
#else
#define ROWS_AT_ONCE 2 /* as many sums as there are registers */
#endif

/* A token's inputs times the weights of 2 vectors of columns, added to its sums: bfloat16 two by two. */
#ifdef MULTIPLIES_BFLOAT16
#define STEP_FEATURES 2

INLINE void multiply(const element *x, index_t width, const element *weight, index_t rows, floats sums[][2])
{
    const __m512bh left = (__m512bh)_mm512_loadu_si512(weight);
    const __m512bh right = (__m512bh)_mm512_loadu_si512(weight + BLOCK_COLUMNS);
    for (index_t r = 0; r < rows; r++) {
        int32_t pair;
        memcpy(&pair, x + r * width, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        sums[r][0] = (floats)_mm512_dpbf16_ps((__m512)sums[r][0], both, left);
        sums[r][1] = (floats)_mm512_dpbf16_ps((__m512)sums[r][1], both, right);
    }
}
#elif defined(BFLOAT16)
#define STEP_FEATURES 2

INLINE void multiply(const element *x, index_t width, const element *weight, index_t rows, floats sums[][2])
{
    typedef uint32_t pairs __attribute__((vector_size(LANES * sizeof(uint32_t))));
    for (index_t half = 0; half < 2; half++) {
        pairs both;
        memcpy(&both, weight + half * BLOCK_COLUMNS, sizeof both);
        const floats one = (floats)(both << 16), other = (floats)(both & 0xffff0000);
        for (index_t r = 0; r < rows; r++)
            sums[r][half] += wide(x[r * width]) * one + wide(x[r * width + 1]) * other;
    }
}
#else
#define STEP_FEATURES 1

INLINE void multiply(const element *x, index_t width, const element *weight, index_t rows, floats sums[][2])
{
    const floats left = wide_vector(weight), right = wide_vector(weight + LANES);
    for (index_t r = 0; r < rows; r++) {
        sums[r][0] += x[r * width] * left;
        sums[r][1] += x[r * width] * right;
    }
}
#endif

INLINE void product_tile(const struct product *a, index_t token, index_t block, index_t rows)
{
    const index_t width = a->in_features, columns = a->out_features, at = block * BLOCK_COLUMNS;
    const element *x = a->x + token * width, *weight = a->weight + at * width;
    floats sums[ROWS_AT_ONCE][2];
    for (index_t r = 0; r < rows; r++)
        for (index_t half = 0; half < 2; half++) {
            const index_t column = at + half * LANES;
            sums[r][half] = a->bias ? wide_vector(a->bias + column) : (floats){0};
            if (a->onto)
                sums[r][half] += wide_vector(a->onto + (token + r) * columns + column);
        }
    for (index_t k = 0; k < width; k += STEP_FEATURES, weight += STEP_FEATURES * BLOCK_COLUMNS) {
        for (index_t line = 0; line < STEP_FEATURES * BLOCK_COLUMNS; line += 64 / sizeof(element))
            __builtin_prefetch(weight + FETCH_AHEAD + line);
        multiply(x + k, width, weight, rows, sums);
    }
    for (index_t r = 0; r < rows; r++)
        for (index_t half = 0; half < 2; half++)
            for (index_t lane = 0; lane < LANES; lane++)
                a->y[(token + r) * columns + at + half * LANES + lane] = narrow(sums[r][half][lane]);
}

void product_part(const void *given, index_t begin, index_t end)
{
    const struct product *a = given;
    for (index_t block = begin; block < end; block++)
        for (index_t token = 0; token < a->tokens; token += ROWS_AT_ONCE)
            switch (a->tokens - token) {
            case 1: product_tile(a, token, block, 1); break;
#if ROWS_AT_ONCE > 2
            case 2: product_tile(a, token, block, 2); break;
            case 3: product_tile(a, token, block, 3); break;
            case 4: product_tile(a, token, block, 4); break;
            case 5: product_tile(a, token, block, 5); break;
            case 6: product_tile(a, token, block, 6); break;
            case 7: product_tile(a, token, block, 7); break;
#endif
            default: product_tile(a, token, block, ROWS_AT_ONCE); break;
            }
}

void product(const element *x, const element *weight, const element *bias, const element *onto, element *y,
             index_t tokens, index_t in_features, index_t out_features, int threads)
{
    struct product a = {x, weight, bias, onto, y, tokens, in_features, out_features};
    struct phase phase = product_phase(&a, threads);
    run(&phase, 1, threads);
}
