/* What the loops have in common: vectors of this processor, and the arguments of cblas_sgemm. */

#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__AVX__)
#define LANES 8
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define LANES 4
#define IN_REGISTER(v)
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
/* A function that `mlx_operations.cpp` lets mlx call, with at most MOST_NUMBERS numbers. A function
   that reads its inputs as they are stored finds their steps after these. */
#define FUNCTION(name) void name(const float *const *in, float *const *out, const int64_t *numbers)
enum { MOST_NUMBERS = 32 };

/* Smaller products than this take less time than to wake a thread. */
enum { SMALLEST_SHARED = 1 << 17 };

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

/* a b + c, rounded once where the processor can do so. Of `a * b + c`, a compiler rounds the product
   in some loops and not in others. */
INLINE Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && LANES == 8
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* sum += a b, rounded once where the processor can do so. The instruction is written out because gcc
   otherwise copies sums from one register to another in each turn of a loop. */
#if defined(__AVX512F__)
#define ADD_PRODUCT(sum, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#elif defined(__FMA__) && LANES == 8
#define ADD_PRODUCT(sum, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b))
#else
#define ADD_PRODUCT(sum, a, b) (sum = fused(a, b, sum))
#endif

/* C = alpha A B' + beta C, where A is rows x inner and B is columns x inner. */
typedef struct {
    int rows, columns, inner;
    float alpha, beta;
    const float *a, *b;
    float *c;
    long lda, ldb, ldc;
} Product;

/* At most so many outputs, and in few_rows.c rows, meet at any time. */
enum { TILE = 4 };

static inline int least(int a, int b) { return a < b ? a : b; }

static inline void fill(float *x, long numbers, float with) {
    for (long i = 0; i < numbers; i++) x[i] = with;
}

/* The number of threads for work that is worth sharing, or 1. */
int threads_for(int is_large);

/* Parts of a loop for these threads: more than threads, so that one that begins late does less. */
#define PARTS(threads) ((threads) > 1 ? 4 * (threads) : 1)

/* Memory of this thread for as many numbers, or NULL; a later call may move it. The functions of a layer
   and of a block have memory beside that of the products that they call. */
float *scratch(long numbers);
float *scratch_of_layer(long numbers);
float *scratch_of_block(long numbers);

/* cblas_sgemm, which gives products of few rows to the loops. */
enum { ROW_MAJOR = 101, AS_STORED = 111, TRANSPOSED = 112 };
void few_rows_product(int order, int transpose_a, int transpose_b, int rows, int columns, int inner,
                      float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                      float *c, int ldc);

/* How weights are stored: as numbers, or in the formats of packed_weights.c. */
typedef enum { FLOATS, AFFINE_4, AFFINE_8, NF4 } Format;

/* A linear layer, perhaps with LoRA or DoRA: y = ratio (x W' + s (x A) B) + bias. W is outputs x inputs,
   A is inputs x rank, and B is rank x outputs, each with a step from row to row. Without LoRA the rank is
   0, and without DoRA there is no ratio. Packed weights are codes, with a scale and perhaps a bias for
   each group of an output. */
typedef struct {
    int inputs, outputs, rank, groups;
    Format format;
    const float *weights, *scales, *biases, *bias, *a, *b, *scale, *ratio;
    long weights_step, a_step, b_step;
} Linear;

/* y of some rows; with `adds`, y is added to what lies there. Return 0 if there was no memory. */
int linear(const Linear *layer, int rows, const float *x, long x_step, float *y, int adds);

/* y += x W', or y = x W', for packed weights. Return 0 if there was no memory. */
int packed_product(const Linear *layer, int rows, const float *x, long x_step, float *y, int adds);

/* The attention of one position of each row. The steps of queries, keys, values and mask are those
   from row to row, from head to head, and from position to position. Without a mask it is NULL. */
typedef struct {
    int rows, key_heads, sharing, seen, width, value_width;
    float scale;
    const float *queries, *keys, *values;
    const uint8_t *mask;
    const int64_t *query_step, *key_step, *value_step, *mask_step;
    float *out; /* rows x heads x numbers */
} AttentionStep;

void attend_step(const AttentionStep *step);

/* All rows of C, from column `first` to `last`, from B as it is stored. */
void columns_of(const Product *product, int first, int last);

/* Compute the product from a copy of B; return whether there is a copy that can be used. */
int multiply_by_copy(const Product *product, int threads);

/* Fold the lanes of a vector to four. */
static inline Four fold(Vector v) {
#if LANES == 16
    Eight half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LANES == 8
    Eight half = v;
#endif
#if LANES > 4
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
           __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
    return v;
#endif
}

/* The sum of the lanes of each of four vectors. */
static inline Four sums_of(const Vector v[TILE]) {
    Four a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
