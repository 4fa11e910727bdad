/* The parts of a step: what each computes, for a range of tokens, of heads or of columns. */

#pragma once

#include "step.h"

/* y = w x / rms(x); by tokens. */
struct norm {
    const element *x, *weight;
    element *y;
    index_t width;
    float eps;
};

/* y = silu(gate) up, of x = [gate | up]; by tokens. */
struct gate {
    const element *x;
    element *y;
    index_t width;
};

/* q and k of x = [q | k | v] turned in place by their positions, k and v written to the cache; by tokens. */
struct turn {
    element *x;
    const element *cos, *sin;
    element *keys, *values;
    const index_t *where;
    index_t queries, groups, width;
};

/* softmax(scale q k^T) v of each token, over `count` positions of the cache from `first` on; by tokens times groups. */
struct attention {
    const element *x; /* the H query heads of a token follow each other */
    index_t stride;
    const element *keys, *values;
    const index_t *first, *count;
    element *y; /* (T, H, D) */
    index_t queries, groups, width;
    float scale;
};

/* y += weight (x A^T) B of each token's own adapters, in place; by pieces. */
struct piece {
    index_t token, tokens;         /* up to TOKENS_AT_ONCE that follow each other */
    index_t share, shares;         /* which go through these */
};

struct share_of {
    const element *a;              /* (N layers, members r, I) */
    index_t rank, member, members; /* which of the site's linear layers it changes */
    double weight;
};

struct member {
    const element *b;              /* (N layers, r, O) */
    index_t column, size;          /* where in y its O features are */
};

struct update {
    const element *x;
    element *y;
    const struct piece *pieces;
    const struct share_of *shares;
    const struct member *members;
    index_t layer, in_features, stride;
};

/* y = (y0 +) x W^T (+ b); by blocks of columns. */
struct product {
    const element *x;
    const element *weight; /* in bfloat16 (O / 32, I / 2, 32, 2): pairs of neighbours; else (O / 32, I, 32) */
    const element *bias, *onto; /* or null */
    element *y;
    index_t tokens, in_features, out_features;
};

void norm_part(const void *norm, index_t begin, index_t end);
void gate_part(const void *gate, index_t begin, index_t end);
void turn_part(const void *turn, index_t begin, index_t end);
void attention_part(const void *attention, index_t begin, index_t end);
void update_part(const void *update, index_t begin, index_t end);
void product_part(const void *product, index_t begin, index_t end);

#define BLOCK_COLUMNS 32

/* Each thread takes blocks that follow each other, so that it reads one stretch of memory. */
INLINE struct phase product_phase(const struct product *product, int threads)
{
    index_t blocks = product->out_features / BLOCK_COLUMNS;
    return (struct phase){product_part, product, blocks, (blocks + threads - 1) / threads, 0, 0};
}
