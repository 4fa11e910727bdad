/* y += weight (x A^T) B of each token's own adapters, in place. */

#include "parts.h"

#define MOST_RANK 256       /* r */
#define MOST_FEATURES 16384 /* I */
#define TOKENS_AT_ONCE 4
#define COLUMN_VECTORS 4

/* low = x A^T for `tokens` tokens at once: each element of A is then widened once for all of them. */
INLINE void down(const floats *x, index_t width, const element *a, index_t rank, index_t tokens,
                 float low[][MOST_RANK])
{
    index_t vectors = width / LANES;
    for (index_t r = 0; r < rank; r += LANES / TOKENS_AT_ONCE) {
        floats sums[LANES]; /* lane j of what they add up to: token j % 4, row r + j / 4 */
        index_t left = rank - r, n = left < LANES / TOKENS_AT_ONCE ? left : LANES / TOKENS_AT_ONCE;
        for (index_t j = 0; j < LANES; j++)
            sums[j] = (floats){0};
        for (index_t j = 0; j < n; j++) {
            const element *row = a + (r + j) * width;
            floats s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
            for (index_t i = 0; i < vectors; i++) {
                floats one = wide_vector(row + i * LANES);
                s0 += one * x[i];
                if (tokens > 1)
                    s1 += one * x[vectors + i];
                if (tokens > 2)
                    s2 += one * x[2 * vectors + i];
                if (tokens > 3)
                    s3 += one * x[3 * vectors + i];
            }
            sums[j * TOKENS_AT_ONCE] = s0;
            sums[j * TOKENS_AT_ONCE + 1] = s1;
            sums[j * TOKENS_AT_ONCE + 2] = s2;
            sums[j * TOKENS_AT_ONCE + 3] = s3;
        }
        floats all = sums_of(sums);
        for (index_t j = 0; j < n; j++)
            for (index_t t = 0; t < tokens; t++)
                low[t][r + j] = all[j * TOKENS_AT_ONCE + t];
    }
}

/* y += weight low B for `vectors` vectors of columns. */
INLINE void up_columns(float low[][MOST_RANK], const element *b, index_t rank, index_t size, index_t tokens,
                       index_t vectors, float weight, element *y, index_t stride)
{
    floats sums[TOKENS_AT_ONCE * COLUMN_VECTORS];
    for (index_t i = 0; i < tokens * vectors; i++)
        sums[i] = (floats){0};
    for (index_t r = 0; r < rank; r++)
        for (index_t i = 0; i < vectors; i++) {
            floats one = wide_vector(b + r * size + i * LANES);
            for (index_t t = 0; t < tokens; t++)
                sums[t * vectors + i] += low[t][r] * one;
        }
    for (index_t t = 0; t < tokens; t++)
        for (index_t i = 0; i < vectors; i++) {
            element *own = y + t * stride + i * LANES;
            floats all = wide_vector(own) + weight * sums[t * vectors + i];
            for (index_t lane = 0; lane < LANES; lane++)
                own[lane] = narrow(all[lane]);
        }
}

INLINE void up(float low[][MOST_RANK], const element *b, index_t rank, index_t size, index_t tokens, float weight,
               element *y, index_t stride)
{
    index_t at = 0;
    for (; at + COLUMN_VECTORS * LANES <= size; at += COLUMN_VECTORS * LANES)
        up_columns(low, b + at, rank, size, tokens, COLUMN_VECTORS, weight, y + at, stride);
    for (; at < size; at += LANES)
        up_columns(low, b + at, rank, size, tokens, 1, weight, y + at, stride);
}

INLINE void add_shares(const struct update *a, const struct piece *piece, index_t tokens)
{
    float low[TOKENS_AT_ONCE][MOST_RANK];
    floats x[TOKENS_AT_ONCE * MOST_FEATURES / LANES];
    index_t width = a->in_features;
    for (index_t i = 0; i < tokens * width / LANES; i++)
        x[i] = wide_vector(a->x + piece->token * width + i * LANES);
    for (index_t s = 0; s < piece->shares; s++) {
        const struct share_of *share = a->shares + piece->share + s;
        for (index_t m = 0; m < share->members; m++) {
            const struct member *member = a->members + share->member + m;
            down(x, width, share->a + ((a->layer * share->members + m) * share->rank) * width, share->rank, tokens, low);
            up(low, member->b + a->layer * share->rank * member->size, share->rank, member->size, tokens,
               (float)share->weight, a->y + piece->token * a->stride + member->column, a->stride);
        }
    }
}

void update_part(const void *given, index_t begin, index_t end)
{
    const struct update *a = given;
    for (index_t i = begin; i < end; i++) {
        const struct piece *piece = a->pieces + i;
        switch (piece->tokens) {
        case 1: add_shares(a, piece, 1); break;
        case 2: add_shares(a, piece, 2); break;
        case 3: add_shares(a, piece, 3); break;
        default: add_shares(a, piece, 4); break;
        }
    }
}

void add_updates(const element *x, element *y, const struct piece *pieces, index_t num_pieces,
                 const struct share_of *shares, const struct member *members, index_t layer, index_t in_features,
                 index_t stride, int threads)
{
    struct update a = {x, y, pieces, shares, members, layer, in_features, stride};
    struct phase phase = {update_part, &a, num_pieces, 1, 0, 0};
    run(&phase, 1, threads);
}
