/* C = alpha A B' + beta C for a matrix A of few rows, with the arguments of cblas_sgemm.

   A BLAS first copies B into the order in which the processor reads it best. With few rows in A,
   the copy takes longer than the product. These loops read B once, from where it lies: at any time
   four rows of A meet four rows of B, while the next four rows of B are on their way.

   Each number of C is summed in an order that depends only on its own row of A and its own row of
   B, so what a row gives does not depend on the rows beside it. Other products go to the function
   that `few_rows_begin` was given. */

#include <stdlib.h>
#include <string.h>

enum { ROW_MAJOR = 101, AS_STORED = 111, TRANSPOSED = 112 };

/* Shorter sums than this spend their time on adding up the lanes of a vector. */
enum { SHORTEST_SUM = 64 };
/* Smaller products than this take less time than to wake a thread. */
enum { SMALLEST_SHARED = 1 << 17 };

/* With more rows, a BLAS that copies B first is as fast. MOST_ROWS is what measurements say. */
#define TILE 4
#if defined(__AVX512F__)
#define LANES 16
#define MOST_ROWS 48
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__AVX__)
#define LANES 8
#define MOST_ROWS 16
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define LANES 4
#define MOST_ROWS 16
#define IN_REGISTER(v)
#endif
#define UNROLL _Pragma("GCC unroll 4")

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef void Product(int order, int transpose_a, int transpose_b, int rows, int columns, int inner,
                     float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                     float *c, int ldc);

static Product *other_products;
static int (*thread_count)(void);

/* The aligned copy of A that each thread keeps, and its bytes. */
static __thread float *aligned_a;
static __thread size_t aligned_bytes;

void few_rows_begin(Product *others, int (*threads)(void)) {
    other_products = others;
    thread_count = threads;
}

static inline int least(int a, int b) { return a < b ? a : b; }

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

/* `rows` x `columns` numbers of C, at most four each way. The compiler makes a loop without any
   branch for each pair of numbers. With `fetch`, the next rows of B are fetched into the cache. */
static inline __attribute__((always_inline)) void tile(
    const int fetch, const int rows, const int columns, int inner, float alpha, const float *a,
    long lda, const float *b, long ldb, float beta, float *c, long ldc) {
    Vector sums[TILE][TILE];
    UNROLL for (int i = 0; i < TILE; i++)
        UNROLL for (int j = 0; j < TILE; j++) sums[i][j] = (Vector){0};
    int k = 0;
    for (; k + LANES <= inner; k += LANES) {
        Vector x[TILE];
        UNROLL for (int i = 0; i < rows; i++) {
            x[i] = *(const Vector *)(a + i * lda + k);
            IN_REGISTER(x[i]);
        }
        UNROLL for (int j = 0; j < columns; j++) {
            Vector y = *(const Vector *)(b + j * ldb + k);
            IN_REGISTER(y);
            if (fetch) __builtin_prefetch(b + (j + TILE) * ldb + k);
            UNROLL for (int i = 0; i < rows; i++) sums[i][j] += x[i] * y;
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        Four total = sums_of(sums[i]);
        if (__builtin_expect(k < inner, 0))
            for (int j = 0; j < columns; j++)
                for (int l = k; l < inner; l++) total[j] += a[i * lda + l] * b[j * ldb + l];
        total *= alpha;
        float *out = c + i * ldc;
        if (columns == TILE && beta == 0)
            *(Four *)out = total;
        else
            for (int j = 0; j < columns; j++) out[j] = total[j] + (beta == 0 ? 0 : beta * out[j]);
    }
}

#define CASE(rows, columns)                                                                     \
    case rows * 8 + columns:                                                                    \
        if (fetch && columns == TILE)                                                           \
            tile(1, rows, columns, inner, alpha, a, lda, b, ldb, beta, c, ldc);                 \
        else                                                                                    \
            tile(0, rows, columns, inner, alpha, a, lda, b, ldb, beta, c, ldc);                 \
        break;

static void any_tile(int fetch, int rows, int columns, int inner, float alpha, const float *a,
                     long lda, const float *b, long ldb, float beta, float *c, long ldc) {
    switch (rows * 8 + columns) {
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4)
        CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4)
        CASE(3, 1) CASE(3, 2) CASE(3, 3) CASE(3, 4)
        CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(4, 4)
    }
}

/* All rows of C, from column `first` to `last`. */
static void columns_of(int rows, int first, int last, int inner, float alpha, const float *a,
                       long lda, const float *b, long ldb, float beta, float *c, long ldc) {
    for (int j = first; j < last; j += TILE)
        for (int i = 0; i < rows; i += TILE)
            any_tile(i == 0 && j + 2 * TILE <= last, least(TILE, rows - i), least(TILE, last - j),
                     inner, alpha, a + i * lda, lda, b + j * ldb, ldb, beta, c + i * ldc + j, ldc);
}

/* Copy A so that no vector of it lies across two lines of the cache; return whether it is done. */
static int align(int rows, int inner, const float *a, long lda, long *width) {
    *width = (inner + 15) / 16 * 16;
    size_t bytes = sizeof(float) * rows * *width;
    if (bytes > aligned_bytes) {
        free(aligned_a);
        aligned_a = aligned_alloc(64, bytes);
        aligned_bytes = aligned_a ? bytes : 0;
    }
    if (!aligned_a) return 0;
    for (int i = 0; i < rows; i++)
        memcpy(aligned_a + i * *width, a + i * lda, sizeof(float) * inner);
    return 1;
}

void few_rows_product(int order, int transpose_a, int transpose_b, int rows, int columns, int inner,
                      float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                      float *c, int ldc) {
    long width = lda;
    if (order != ROW_MAJOR || transpose_a != AS_STORED || transpose_b != TRANSPOSED ||
        rows > MOST_ROWS || inner < SHORTEST_SUM ||
        (rows > 1 && !align(rows, inner, a, lda, &width))) {
        other_products(order, transpose_a, transpose_b, rows, columns, inner, alpha, a, lda, b, ldb,
                       beta, c, ldc);
        return;
    }
    const float *rows_of_a = rows > 1 ? aligned_a : a;
    int parts = (double)rows * columns * inner < SMALLEST_SHARED ? 1 : thread_count();
    if (parts < 2) {
        columns_of(rows, 0, columns, inner, alpha, rows_of_a, width, b, ldb, beta, c, ldc);
        return;
    }
    int share = ((columns + parts - 1) / parts + TILE - 1) / TILE * TILE;
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; part++)
        columns_of(rows, part * share, least(columns, (part + 1) * share), inner, alpha, rows_of_a,
                   width, b, ldb, beta, c, ldc);
}
