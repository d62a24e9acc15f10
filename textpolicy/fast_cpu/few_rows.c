/* C = alpha A B' + beta C for a matrix A of few rows, with the arguments of cblas_sgemm.

   A BLAS first copies B into the order in which the processor reads it best. With few rows in A,
   the copy takes longer than the product. `bfloat16_copies.c` has made its copy before. Of other
   matrices, the loops here read B once, from where it lies: at any time four rows of A meet four
   rows of B, while the next four rows of B are on their way.

   Each number of C is summed in an order that depends only on its own row of A and its own row of
   B, so what a row gives does not depend on the rows beside it. Other products go to the function
   that `few_rows_begin` was given. */

#include <stdlib.h>
#include <string.h>

#include "loops.h"

/* Shorter sums than this spend their time on adding up the lanes of a vector. */
enum { SHORTEST_SUM = 64 };

/* With more rows, a BLAS that copies B first is as fast. MOST_ROWS is what measurements say. */
enum { MOST_ROWS = LANES == 16 ? 48 : 16 };

typedef void Blas(int order, int transpose_a, int transpose_b, int rows, int columns, int inner,
                  float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                  float *c, int ldc);

static Blas *other_products;
static int (*thread_count)(void);

/* What is kept for each thread, and its bytes. */
typedef struct {
    float *memory;
    size_t bytes;
} Kept;

static __thread Kept kept, kept_of_layer, kept_of_block;

void few_rows_begin(Blas *others, int (*threads)(void)) {
    other_products = others;
    thread_count = threads;
}

int threads_for(int is_large) { return is_large && thread_count ? thread_count() : 1; }

static float *enough(Kept *kept, long numbers) {
    size_t bytes = (sizeof(float) * numbers + 63) / 64 * 64;
    if (bytes > kept->bytes) {
        free(kept->memory);
        kept->memory = aligned_alloc(64, bytes);
        kept->bytes = kept->memory ? bytes : 0;
    }
    return kept->memory;
}

float *scratch(long numbers) { return enough(&kept, numbers); }
float *scratch_of_layer(long numbers) { return enough(&kept_of_layer, numbers); }
float *scratch_of_block(long numbers) { return enough(&kept_of_block, numbers); }

/* `rows` x `columns` numbers of C from row i and column j on, at most four each way. The compiler
   makes a loop without any branch for each pair of numbers. With `fetch`, the next rows of B are
   fetched into the cache. */
INLINE void tile(const int fetch, const int rows, const int columns, const Product *p, int i,
                 int j) {
    const float *a = p->a + i * p->lda, *b = p->b + j * p->ldb;
    const long lda = p->lda, ldb = p->ldb;
    Vector sums[TILE][TILE];
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int s = 0; s < TILE; s++) sums[r][s] = (Vector){0};
    int k = 0;
    for (; k + LANES <= p->inner; k += LANES) {
        Vector x[TILE];
        UNROLL for (int r = 0; r < rows; r++) {
            x[r] = *(const Vector *)(a + r * lda + k);
            IN_REGISTER(x[r]);
        }
        UNROLL for (int s = 0; s < columns; s++) {
            Vector y = *(const Vector *)(b + s * ldb + k);
            IN_REGISTER(y);
            if (fetch) __builtin_prefetch(b + (s + TILE) * ldb + k);
            UNROLL for (int r = 0; r < rows; r++) sums[r][s] += x[r] * y;
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        Four total = sums_of(sums[r]);
        if (__builtin_expect(k < p->inner, 0))
            for (int s = 0; s < columns; s++)
                for (int l = k; l < p->inner; l++) total[s] += a[r * lda + l] * b[s * ldb + l];
        total *= p->alpha;
        float *out = p->c + (i + r) * p->ldc + j;
        if (columns == TILE && p->beta == 0)
            *(Four *)out = total;
        else
            for (int s = 0; s < columns; s++)
                out[s] = total[s] + (p->beta == 0 ? 0 : p->beta * out[s]);
    }
}

#define CASE(rows, columns)                                \
    case rows * 8 + columns:                               \
        if (fetch && columns == TILE)                      \
            tile(1, rows, columns, product, i, j);         \
        else                                               \
            tile(0, rows, columns, product, i, j);         \
        break;

static void any_tile(const Product *product, int fetch, int i, int j, int rows, int columns) {
    switch (rows * 8 + columns) {
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4)
        CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4)
        CASE(3, 1) CASE(3, 2) CASE(3, 3) CASE(3, 4)
        CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(4, 4)
    }
}

void columns_of(const Product *p, int first, int last) {
    for (int j = first; j < last; j += TILE)
        for (int i = 0; i < p->rows; i += TILE)
            any_tile(p, i == 0 && j + 2 * TILE <= last, i, j, least(TILE, p->rows - i),
                     least(TILE, last - j));
}

/* Replace A by a copy in which no vector lies across two lines of the cache; return whether it is
   done. */
static int align(Product *product) {
    long width = (product->inner + 15) / 16 * 16;
    float *aligned = scratch(product->rows * width);
    if (!aligned) return 0;
    for (int i = 0; i < product->rows; i++)
        memcpy(aligned + i * width, product->a + i * product->lda, sizeof(float) * product->inner);
    product->a = aligned;
    product->lda = width;
    return 1;
}

/* Compute the product from B as it is stored; return whether that is done. */
static int multiply_few_rows(Product *product, int threads) {
    if (product->rows > MOST_ROWS || product->inner < SHORTEST_SUM ||
        (product->rows > 1 && !align(product)))
        return 0;
    int share = ((product->columns + threads - 1) / threads + TILE - 1) / TILE * TILE;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int part = 0; part < threads; part++)
        columns_of(product, part * share, least(product->columns, (part + 1) * share));
    return 1;
}

void few_rows_product(int order, int transpose_a, int transpose_b, int rows, int columns, int inner,
                      float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                      float *c, int ldc) {
    if (order == ROW_MAJOR && transpose_a == AS_STORED && transpose_b == TRANSPOSED) {
        Product product = {rows, columns, inner, alpha, beta, a, b, c, lda, ldb, ldc};
        int threads = threads_for((double)rows * columns * inner >= SMALLEST_SHARED);
        if (multiply_by_copy(&product, threads) || multiply_few_rows(&product, threads)) return;
    }
    other_products(order, transpose_a, transpose_b, rows, columns, inner, alpha, a, lda, b, ldb,
                   beta, c, ldc);
}
