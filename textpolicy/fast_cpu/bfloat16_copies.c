/* Products of few rows with weights that have a copy in bfloat16, which is half as large.

   A float32 number whose last 16 bits are 0 is a bfloat16 number. Checkpoints in bfloat16 have no
   other weights, so the copy loses nothing, and the processor reads half as many bytes.

   The copy is made in the order in which it is read. A panel has the weights of 2 LANES outputs.
   For each input, a word has the weights of two outputs that are LANES apart: the first in its low
   half, the second in its high half. One vector of words gives two vectors of weights, by a shift
   and by a mask.

   Each number of C is summed in the order of the inputs, by SUMMED at a time, whatever the rows
   beside it. */

#include <pthread.h>
#include <stdlib.h>

#include "loops.h"

/* At most as many rows of A meet a panel at once as there are registers for their sums. */
#if LANES == 16
#define TALLEST 12
#else
#define TALLEST 6
#endif
/* With so few rows, several panels are read at once. */
#define PANELS(rows) ((rows) <= TALLEST / 4 ? MOST_PANELS : (rows) <= TALLEST / 2 ? 2 : 1)
/* MOST_ROWS and AHEAD, in words, are what measurements say. */
enum { PANEL = 2 * LANES, MOST_PANELS = 4, MOST_ROWS = 64, SUMMED = 256, AHEAD = 256 };

typedef struct Copy {
    const float *weights;
    int outputs, inputs;
    uint32_t *words;
    struct Copy *next;
} Copy;

enum { CHAINS = 4096 };
static Copy *chains[CHAINS];
static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;

static Copy **chain_of(const float *weights) {
    return &chains[((uintptr_t)weights >> 6) % CHAINS];
}

static Copy *find(const float *weights) {
    Copy *copy = *chain_of(weights);
    while (copy && copy->weights != weights) copy = copy->next;
    return copy;
}

static int panels_of(int outputs) { return (outputs + PANEL - 1) / PANEL; }

/* The bits of a weight; 0 for an output that fills up the last panel. */
static inline uint32_t bits(const Copy *copy, int output, int input) {
    const uint32_t *all = (const uint32_t *)copy->weights;
    return output < copy->outputs ? all[(long)output * copy->inputs + input] : 0;
}

static int is_exact(const float *weights, long numbers) {
    const uint32_t *all = (const uint32_t *)weights;
    for (long start = 0; start < numbers; start += 4096) {
        uint32_t lost = 0;
        for (long i = start; i < numbers && i < start + 4096; i++) lost |= all[i];
        if (lost & 0xffff) return 0;
    }
    return 1;
}

static void write_panel(const Copy *copy, int panel) {
    uint32_t *words = copy->words + (long)panel * copy->inputs * LANES;
    for (int input = 0; input < copy->inputs; input++)
        for (int lane = 0; lane < LANES; lane++) {
            int output = panel * PANEL + lane;
            *words++ = bits(copy, output, input) >> 16 |
                       (bits(copy, output + LANES, input) & 0xffff0000);
        }
}

/* Make a copy of a matrix of outputs x inputs; return its bytes, or 0 if it would lose a bit.

   The matrix must stay as it is until `bfloat16_copies_drop` is called. */
long bfloat16_copies_add(const float *weights, int outputs, int inputs, int threads) {
    if (!is_exact(weights, (long)outputs * inputs)) return 0;
    long bytes = (long)panels_of(outputs) * inputs * LANES * sizeof(uint32_t);
    Copy *copy = malloc(sizeof *copy);
    uint32_t *words = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!copy || !words) {
        free(copy);
        free(words);
        return 0;
    }
    *copy = (Copy){weights, outputs, inputs, words, NULL};
#pragma omp parallel for num_threads(threads)
    for (int panel = 0; panel < panels_of(outputs); panel++) write_panel(copy, panel);
    pthread_rwlock_wrlock(&lock);
    Copy **chain = chain_of(weights);
    copy->next = *chain;
    *chain = copy;
    pthread_rwlock_unlock(&lock);
    return bytes;
}

void bfloat16_copies_drop(const float *weights) {
    pthread_rwlock_wrlock(&lock);
    Copy **place = chain_of(weights), *copy = find(weights);
    while (copy && *place != copy) place = &(*place)->next;
    if (copy) *place = copy->next;
    pthread_rwlock_unlock(&lock);
    if (copy) free(copy->words);
    free(copy);
}

/* Add to `sums` the products of some inputs: `rows` rows of x with `panels` panels. For each input,
   ask for the words at `next`, which moves on by `step` words. */
INLINE void add_inputs(const int rows, const int panels, const float *x, const uint32_t *words,
                       long panel_words, int inputs, const uint32_t *next, int step, Vector *sums) {
    Vector own[TALLEST][MOST_PANELS][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++)
            own[r][p][0] = own[r][p][1] = (Vector){0};
    for (int input = 0; input < inputs; input++) {
        UNROLL for (int p = 0; p < panels; p++) {
            __builtin_prefetch(next + p * panel_words + (long)input * step);
            Words two = *(const Words *)(words + p * panel_words + (long)input * LANES);
            Vector low = (Vector)(two << 16), high = (Vector)(two & 0xffff0000);
            IN_REGISTER(low);
            IN_REGISTER(high);
            UNROLL for (int r = 0; r < rows; r++) {
                Vector number = x[input * rows + r] - (Vector){0};
                ADD_PRODUCT(own[r][p][0], number, low);
                ADD_PRODUCT(own[r][p][1], number, high);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int half = 0; half < 2; half++)
                sums[(r * panels + p) * 2 + half] += own[r][p][half];
}

#define CASE(rows)                                                                               \
    case rows:                                                                                   \
        if (panels > 1)                                                                          \
            add_inputs(rows, PANELS(rows), x, words, panel_words, inputs, next, step, sums);     \
        else                                                                                     \
            add_inputs(rows, 1, x, words, panel_words, inputs, next, step, sums);                \
        break;

/* The same for any number of rows, with one panel or with PANELS(rows). */
static void add_to_tile(int rows, int panels, const float *x, const uint32_t *words,
                        long panel_words, int inputs, const uint32_t *next, int step,
                        Vector *sums) {
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TALLEST == 12
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

/* Write sums to C from panel `first` on. */
static void write_sums(const Product *product, int first, int panels, const Vector *sums) {
    for (int r = 0; r < product->rows; r++)
        for (int p = 0; p < panels; p++)
            for (int half = 0; half < 2; half++) {
                int column = (first + p) * PANEL + half * LANES;
                float *out = product->c + r * product->ldc + column;
                Vector total = *sums++ * product->alpha;
                if (column + LANES <= product->columns && product->beta == 0)
                    *(Vector *)out = total;
                else
                    for (int l = 0; l < least(LANES, product->columns - column); l++)
                        out[l] = total[l] + (product->beta == 0 ? 0 : product->beta * out[l]);
            }
}

/* The number of tiles that rows of A make, and the rows of tile t: all have about the same height. */
static int tiles_of(int rows) { return (rows + TALLEST - 1) / TALLEST; }
static int height(int rows, int t) { return rows / tiles_of(rows) + (t < rows % tiles_of(rows)); }

/* All rows of C, from panel `first` to `last`. Several tiles meet the same inputs one after another,
   and share the work of asking for the next inputs of the panel, or for those of the next panel. */
static void panels_from(const Product *product, const Copy *copy, const float *x, int first,
                        int last) {
    int rows = product->rows, inputs = copy->inputs, tiles = tiles_of(rows);
    long panel_words = (long)inputs * LANES;
    int most = tiles == 1 ? PANELS(rows) : 1, step = LANES;
    for (int t = tiles; t > 1 && step > 1; t /= 2) step /= 2;
    for (int group = first, panels; group < last; group += panels) {
        panels = group + most <= last ? most : 1;
        const uint32_t *words = copy->words + group * panel_words;
        Vector sums[2 * MOST_ROWS];
        for (int i = 0; i < 2 * rows * panels; i++) sums[i] = (Vector){0};
        for (int start = 0; start < inputs; start += SUMMED, words += SUMMED * LANES) {
            int some = least(SUMMED, inputs - start);
            const uint32_t *next = words + (tiles == 1 ? AHEAD : some * LANES);
            for (int t = 0, i = 0; t < tiles; i += height(rows, t++))
                add_to_tile(height(rows, t), panels,
                            x + (long)i * inputs + (long)start * height(rows, t), words,
                            panel_words, some, next + (long)t * some * step, step,
                            sums + 2 * i * panels);
        }
        write_sums(product, group, panels, sums);
    }
}

/* Write each tile's rows of A side by side: all numbers of an input, then those of the next. */
static void transpose_tiles(const Product *product, float *x) {
    for (int t = 0, i = 0, rows; t < tiles_of(product->rows); t++, i += rows) {
        rows = height(product->rows, t);
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < product->inner; k++)
                x[(long)i * product->inner + (long)k * rows + r] =
                    product->a[(i + r) * product->lda + k];
    }
}

int multiply_by_copy(const Product *product, int threads) {
    if (product->rows < 1 || product->rows > MOST_ROWS) return 0;
    pthread_rwlock_rdlock(&lock);
    const Copy *copy = find(product->b);
    float *x = NULL;
    if (copy && product->inner == copy->inputs && product->ldb == copy->inputs &&
        product->columns <= copy->outputs)
        x = scratch((long)product->rows * product->inner);
    if (x) {
        transpose_tiles(product, x);
        int panels = panels_of(product->columns);
        int parts = PARTS(threads), share = (panels + parts - 1) / parts;
        share = (share + MOST_PANELS - 1) / MOST_PANELS * MOST_PANELS;
#pragma omp parallel for num_threads(parts)
        for (int part = 0; part < parts; part++)
            panels_from(product, copy, x, part * share, least(panels, (part + 1) * share));
    }
    pthread_rwlock_unlock(&lock);
    return x != NULL;
}
