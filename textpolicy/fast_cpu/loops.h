/* What the loops have in common: vectors of this processor, and the arguments of cblas_sgemm. */

#pragma once

#include <stdint.h>

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

/* Smaller products than this take less time than to wake a thread. */
enum { SMALLEST_SHARED = 1 << 17 };

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* C = alpha A B' + beta C, where A is rows x inner and B is columns x inner. */
typedef struct {
    int rows, columns, inner;
    float alpha, beta;
    const float *a, *b;
    float *c;
    long lda, ldb, ldc;
} Product;

static inline int least(int a, int b) { return a < b ? a : b; }

/* The number of threads for work that is worth sharing, or 1. */
int threads_for(int is_large);

/* Memory of this thread for as many numbers, or NULL; a later call may move it. */
float *scratch(long numbers);

/* Compute the product from a copy of B; return whether there is a copy that can be used. */
int multiply_by_copy(const Product *product, int threads);
