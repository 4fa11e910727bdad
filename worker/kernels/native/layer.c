/* A decoder layer of Llama's kind:  h = x + o(attention(turn(q, k), v)),  y = h + down(silu(gate) up), each of q, k, v,
   o, gate, up and down with the updates of each token's own adapters. */

#include "parts.h"

struct site { /* linear layers that are given the same input */
    const element *weight, *bias;
    index_t out_features;
    index_t place; /* which layer it is among those of its kind */
};

struct table { /* no pieces: no updates */
    const struct piece *pieces;
    index_t num_pieces;
    const struct share_of *shares;
    const struct member *members;
};

struct layer {
    index_t hidden, inner, queries, groups, width;
    const element *attention_norm, *mlp_norm;
    struct site qkv, output, gate_up, down;
    element *keys, *values;
    float attention_eps, mlp_eps, scale;
};

struct step {
    index_t tokens, threads;
    const element *cos, *sin;
    const index_t *where;
    struct table qkv, output, gate_up, down;
    element *normed, *heads, *seen, *middle, *gates, *gated; /* what is formed in between */
};

enum { QKV, OUTPUT, GATE_UP, DOWN, NUM_SEGMENTS };

struct plan {
    struct phase phases[4 * NUM_SEGMENTS];
    int num_phases;
};

INLINE void add(struct plan *plan, part_t part, const void *what, index_t count, index_t grain)
{
    plan->phases[plan->num_phases++] = (struct phase){part, what, count, grain, 0, 0};
}

/* A product and then the updates of its result. */
INLINE void add_site(struct plan *plan, const struct product *product, const struct update *update, index_t num_pieces,
                     int threads)
{
    plan->phases[plan->num_phases++] = product_phase(product, threads);
    if (num_pieces)
        add(plan, update_part, update, num_pieces, 1);
}

INLINE struct product product_of(const struct site *site, const element *x, index_t in_features, const element *onto,
                                 element *y, index_t tokens)
{
    return (struct product){x, site->weight, site->bias, onto, y, tokens, in_features, site->out_features};
}

INLINE struct update update_of(const struct table *table, const struct product *product, index_t place)
{
    return (struct update){product->x, product->y, table->pieces, table->shares, table->members, place,
                           product->in_features, product->out_features};
}

/* The segments of the layer from `from` on, up to but without `to`. Each ends with one of its sites, whose result may
   then be changed before the next is computed. */
void layer(const struct layer *l, const struct step *s, const element *x, element *y, const index_t *first,
           const index_t *count, index_t from, index_t to)
{
    const index_t tokens = s->tokens;
    const int threads = (int)s->threads;
    const struct norm attention_norm = {x, l->attention_norm, s->normed, l->hidden, l->attention_eps};
    const struct product qkv = product_of(&l->qkv, s->normed, l->hidden, 0, s->heads, tokens);
    const struct update qkv_update = update_of(&s->qkv, &qkv, l->qkv.place);
    const struct turn turn = {s->heads, s->cos, s->sin, l->keys, l->values, s->where, l->queries, l->groups, l->width};
    const struct attention attention = {s->heads, l->qkv.out_features, l->keys, l->values, first, count, s->seen,
                                        l->queries, l->groups, l->width, l->scale};
    const struct product output = product_of(&l->output, s->seen, l->queries * l->width, x, s->middle, tokens);
    const struct update output_update = update_of(&s->output, &output, l->output.place);
    const struct norm mlp_norm = {s->middle, l->mlp_norm, s->normed, l->hidden, l->mlp_eps};
    const struct product gate_up = product_of(&l->gate_up, s->normed, l->hidden, 0, s->gates, tokens);
    const struct update gate_up_update = update_of(&s->gate_up, &gate_up, l->gate_up.place);
    const struct gate gate = {s->gates, s->gated, l->inner};
    const struct product down = product_of(&l->down, s->gated, l->inner, s->middle, y, tokens);
    const struct update down_update = update_of(&s->down, &down, l->down.place);

    struct plan plan = {.num_phases = 0};
    for (index_t segment = from; segment < to; segment++)
        switch (segment) {
        case QKV:
            add(&plan, norm_part, &attention_norm, tokens, 4);
            add_site(&plan, &qkv, &qkv_update, s->qkv.num_pieces, threads);
            break;
        case OUTPUT:
            add(&plan, turn_part, &turn, tokens, 4);
            add(&plan, attention_part, &attention, tokens * l->groups, 1);
            add_site(&plan, &output, &output_update, s->output.num_pieces, threads);
            break;
        case GATE_UP:
            add(&plan, norm_part, &mlp_norm, tokens, 4);
            add_site(&plan, &gate_up, &gate_up_update, s->gate_up.num_pieces, threads);
            break;
        default:
            add(&plan, gate_part, &gate, tokens, 4);
            add_site(&plan, &down, &down_update, s->down.num_pieces, threads);
        }
    run(plan.phases, plan.num_phases, threads);
}
