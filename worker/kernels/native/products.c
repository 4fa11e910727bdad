/* y = (y0 +) x W^T (+ b). With few tokens, what counts is that W streams from memory, once and without a pause. */

#include "step.h"

#define ROWS_AT_ONCE 8
#define BLOCK_COLUMNS 32
#define FETCH_AHEAD 8192 /* elements: as far as memory answers late; measured */

struct product {
    const element *x;
    const element *weight; /* (O / 32, I / 2, 32, 2): pairs of neighbours of 32 rows of W */
    const element *bias, *onto; /* or null */
    element *y;
    index_t tokens, in_features, out_features;
};

#ifdef MULTIPLIES_BFLOAT16
int has_product(void) { return 1; }

INLINE __m512 widened(const element *x)
{
    return (__m512)wide_vector(x);
}

INLINE void product_tile(const struct product *a, index_t token, index_t block,
                                                               index_t rows)
{
    const index_t width = a->in_features, columns = a->out_features, at = block * BLOCK_COLUMNS;
    const element *x = a->x + token * width, *weight = a->weight + at * width;
    __m512 sums[ROWS_AT_ONCE][2];
    for (index_t r = 0; r < rows; r++)
        for (index_t half = 0; half < 2; half++) {
            const index_t column = at + half * LANES;
            __m512 sum = a->bias ? widened(a->bias + column) : _mm512_setzero_ps();
            if (a->onto)
                sum = _mm512_add_ps(sum, widened(a->onto + (token + r) * columns + column));
            sums[r][half] = sum;
        }
    for (index_t k = 0; k < width / 2; k++, weight += 2 * BLOCK_COLUMNS) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(weight);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(weight + BLOCK_COLUMNS);
        _mm_prefetch((const char *)(weight + FETCH_AHEAD), _MM_HINT_T0);
        _mm_prefetch((const char *)(weight + FETCH_AHEAD + BLOCK_COLUMNS), _MM_HINT_T0);
        for (index_t r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * width + 2 * k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
    }
    for (index_t r = 0; r < rows; r++)
        for (index_t half = 0; half < 2; half++) {
            const __m256bh rounded = _mm512_cvtneps_pbh(sums[r][half]);
            memcpy(a->y + (token + r) * columns + at + half * LANES, &rounded, sizeof rounded);
        }
}

static void product_part(const void *given, index_t begin, index_t end)
{
    const struct product *a = given;
    for (index_t block = begin; block < end; block++)
        for (index_t token = 0; token < a->tokens; token += ROWS_AT_ONCE)
            switch (a->tokens - token) {
            case 1: product_tile(a, token, block, 1); break;
            case 2: product_tile(a, token, block, 2); break;
            case 3: product_tile(a, token, block, 3); break;
            case 4: product_tile(a, token, block, 4); break;
            case 5: product_tile(a, token, block, 5); break;
            case 6: product_tile(a, token, block, 6); break;
            case 7: product_tile(a, token, block, 7); break;
            default: product_tile(a, token, block, ROWS_AT_ONCE); break;
            }
}
#else
int has_product(void) { return 0; }

static void product_part(const void *given, index_t begin, index_t end)
{
    (void)given, (void)begin, (void)end;
}
#endif

/* Each thread takes blocks that follow each other, so that it reads one stretch of memory. */
void product(const element *x, const element *weight, const element *bias, const element *onto, element *y,
             index_t tokens, index_t in_features, index_t out_features, int threads)
{
    struct product a = {x, weight, bias, onto, y, tokens, in_features, out_features};
    index_t blocks = out_features / BLOCK_COLUMNS;
    share(product_part, &a, blocks, (blocks + threads - 1) / threads, threads);
}
