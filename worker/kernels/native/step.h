/* What the kernels of a generation step have in common: the type of element, vectors of them, e^x and threads.

   Elements are bfloat16 with -DBFLOAT16, else float. All sums are formed in float and rounded once. A token's result
   never depends on the tokens beside it.

   Shapes: T tokens, I in features, O out features, H query heads, G key-value heads, D head width, r rank. Matrices are
   row-major; a "stride" is the number of elements from one row to the next. */

#pragma once

#include <stdint.h>
#include <string.h>
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#include <immintrin.h>
#define MULTIPLIES_BFLOAT16
#endif

#define INLINE static inline __attribute__((always_inline))

typedef int64_t index_t;

#ifdef BFLOAT16
typedef uint16_t element;

INLINE float wide(element x)
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

INLINE element narrow(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (element)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
#else
typedef float element;

INLINE float wide(element x) { return x; }
INLINE element narrow(float x) { return x; }
#endif

/* ---- Vectors: a compiler splits those that are wider than its processor's. ---- */

#define LANES 16

typedef float floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t lanes __attribute__((vector_size(LANES * sizeof(int32_t))));

INLINE floats wide_vector(const element *x)
{
#ifdef BFLOAT16
    typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
    typedef uint32_t bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
    halves narrow_ones;
    memcpy(&narrow_ones, x, sizeof narrow_ones);
    return (floats)(__builtin_convertvector(narrow_ones, bits) << 16);
#else
    floats y;
    memcpy(&y, x, sizeof y);
    return y;
#endif
}

#ifdef __clang__
#define PICK(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define PICK(one, other, ...) __builtin_shuffle(one, other, (lanes){__VA_ARGS__})
#endif

/* The sums of pairs of lanes that lie 8, 4, 2 or 1 apart in both vectors, those of the first vector first. */
INLINE floats pairs_8_apart(floats one, floats other)
{
    return PICK(one, other, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
         + PICK(one, other, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

INLINE floats pairs_4_apart(floats one, floats other)
{
    return PICK(one, other, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
         + PICK(one, other, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

INLINE floats pairs_2_apart(floats one, floats other)
{
    return PICK(one, other, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29)
         + PICK(one, other, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}

INLINE floats neighbours(floats one, floats other)
{
    return PICK(one, other, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
         + PICK(one, other, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* Lane j is the sum of all lanes of x[j]. */
INLINE floats sums_of(const floats *x)
{
    floats by_8[8], by_4[4];
    for (int i = 0; i < 8; i++)
        by_8[i] = pairs_8_apart(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4; i++)
        by_4[i] = pairs_4_apart(by_8[2 * i], by_8[2 * i + 1]);
    return neighbours(pairs_2_apart(by_4[0], by_4[1]), pairs_2_apart(by_4[2], by_4[3]));
}

/* ---- e^x ---- */

/* Where e^x stays finite and normal. Not constants, or the compiler would compute
   both ends apart, with a division each. */
extern float exponent_bounds[2];

/* e^x by 2^n e^r, |r| <= ln 2 / 2, within 2 units in the last place; x is held within the bounds. */
INLINE float exponential(float x, float least, float most)
{
    x = x < least ? least : x;
    x = x > most ? most : x;
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    float shifted = x * 1.44269504f + shift;
    float n = shifted - shift;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (int32_t)((uint32_t)(bits + 127) << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* ---- Threads ---- */

typedef void (*part_t)(const void *what, index_t begin, index_t end);

/* `count` pieces of work, taken `grain` at a time by whichever thread is free. `next` and `done` begin at 0. */
struct phase {
    part_t part;
    const void *what;
    index_t count, grain;
    index_t next, done;
};

/* Do phases one after the other, each when all of the one before is done, on up to so many of torch's own threads. */
void run(struct phase *phases, int num_phases, int threads);
