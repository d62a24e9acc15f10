/* Attention of one position of each row to the keys and values in a cache, read where they lie.

   A row's keys begin with the first one that its mask shows, and end with the last one. So what a row
   gives does not depend on the rows beside it, nor on unused positions before and after its keys. */

#include "rows.h"

/* Each number of the output is summed over so many keys at a time, which keeps its error small. */
enum { SUMMED = 256 };

/* For at most so many query heads, and for so many vectors of each, sums are in registers at once. */
enum { HEADS = 4, MOST_VECTORS = 8 };

/* What one key head has to do: `sharing` query heads use it, and `seen` keys are in the cache. The
   outputs of the query heads lie side by side. */
typedef struct {
    int sharing, seen, width, value_width;
    long query_step, key_step, value_step;
    float scale;
    const float *queries, *keys, *values;
    const uint8_t *mask;
    float *out;
} Group;

/* The first key that a mask shows, or the first of all if it shows none. */
static int first_seen(const uint8_t *mask, int keys) {
    if (!mask) return 0;
    for (int key = 0; key < keys; key++)
        if (mask[key]) return key;
    return 0;
}

/* Replace each score by e to the power of its difference from the largest one; return the sum. */
static float exponentials(float *restrict scores, int keys, const uint8_t *mask) {
    /* A hidden key weighs 0. Where no key is seen, all weigh alike. */
    if (mask)
        for (int key = 0; key < keys; key++) scores[key] = mask[key] ? scores[key] : -1e30f;
    float top = largest(scores, keys), sum;
    for (int key = 0; key < keys; key++) scores[key] = exp_of(scores[key] - top);
    SUM(sum, keys, scores[i]);
    return sum;
}

/* For each of `heads` heads, write `vectors` vectors of the weighted mean of the values, from a column
   on. `sums` are those of the heads' weights. */
INLINE void mean_of_vectors(const int heads, const int vectors, const Group *g,
                            const float *weights, const float *sums, int column, float *out) {
    const float *values = g->values + column;
    const Vector zero = {0};
    Vector totals[HEADS][MOST_VECTORS];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++) totals[h][v] = zero;
    for (int start = 0; start < g->seen; start += SUMMED) {
        Vector own[HEADS][MOST_VECTORS];
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int v = 0; v < vectors; v++) own[h][v] = zero;
        for (int key = start; key < least(g->seen, start + SUMMED); key++) {
            Vector some[MOST_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++) {
                some[v] = *(const Vector *)(values + key * g->value_step + v * LANES);
                IN_REGISTER(some[v]);
            }
            UNROLL for (int h = 0; h < heads; h++) {
                Vector weight = weights[(long)h * g->seen + key] - zero;
                UNROLL for (int v = 0; v < vectors; v++)
                    ADD_PRODUCT(own[h][v], weight, some[v]);
            }
        }
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int v = 0; v < vectors; v++) totals[h][v] += own[h][v];
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++)
            *(Vector *)(out + (long)h * g->value_width + column + v * LANES) = totals[h][v] / sums[h];
}

/* The same for one number of one head. */
static __attribute__((noinline)) float mean_of_numbers(const Group *g, const float *weights,
                                                       float sum, int column) {
    float total = 0;
    for (int start = 0; start < g->seen; start += SUMMED) {
        float own = 0;
        for (int key = start; key < least(g->seen, start + SUMMED); key++)
            own += weights[key] * g->values[key * g->value_step + column];
        total += own;
    }
    return total / sum;
}

/* With fewer heads there are registers for more vectors. */
#define VECTORS(heads) ((heads) == 1 ? 8 : (heads) == 2 ? 4 : 2)
#define COLUMNS(heads) (VECTORS(heads) * LANES)
#define CASE(heads)                                                                   \
    case heads:                                                                       \
        for (; column + COLUMNS(heads) <= g->value_width; column += COLUMNS(heads))   \
            mean_of_vectors(heads, VECTORS(heads), g, weights, sums, column, out);    \
        for (; column + LANES <= g->value_width; column += LANES)                     \
            mean_of_vectors(heads, 1, g, weights, sums, column, out);                 \
        break;

static void mean_of_values(const Group *g, int heads, const float *weights, const float *sums,
                           float *out) {
    int column = 0;
    switch (heads) { CASE(1) CASE(2) CASE(3) CASE(4) }
    for (; column < g->value_width; column++)
        for (int h = 0; h < heads; h++)
            out[(long)h * g->value_width + column] =
                mean_of_numbers(g, weights + (long)h * g->seen, sums[h], column);
}

static void attend(Group *g) {
    int first = first_seen(g->mask, g->seen);
    if (g->mask && g->mask[first])
        while (!g->mask[g->seen - 1]) g->seen--;
    g->seen -= first;
    g->keys += first * g->key_step;
    g->values += first * g->value_step;
    if (g->mask) g->mask += first;
    for (int head = 0; head < g->sharing; head += HEADS) {
        int heads = least(HEADS, g->sharing - head);
        float *scores = scratch((long)heads * g->seen), sums[HEADS];
        if (!scores) {
            /* Without memory there is no result, and nobody shall take another number for it. */
            for (int i = 0; i < heads * g->value_width; i++)
                g->out[(long)head * g->value_width + i] = NAN;
            continue;
        }
        Product product = {heads, g->seen, g->width, g->scale, 0, g->queries + head * g->query_step,
                           g->keys, scores, g->query_step, g->key_step, g->seen};
        columns_of(&product, 0, g->seen);
        for (int h = 0; h < heads; h++)
            sums[h] = exponentials(scores + (long)h * g->seen, g->seen, g->mask);
        mean_of_values(g, heads, scores, sums, g->out + (long)head * g->value_width);
    }
}

void attend_step(const AttentionStep *s) {
    int units = s->rows * s->key_heads;
    double work = (double)units * s->sharing * s->seen * (s->width + s->value_width);
#pragma omp parallel for num_threads(threads_for(work >= SMALLEST_SHARED))
    for (int unit = 0; unit < units; unit++) {
        int row = unit / s->key_heads, head = unit % s->key_heads;
        attend(&(Group){
            .sharing = s->sharing,
            .seen = s->seen,
            .width = s->width,
            .value_width = s->value_width,
            .query_step = s->query_step[1],
            .key_step = s->key_step[2],
            .value_step = s->value_step[2],
            .scale = s->scale,
            .queries = s->queries + row * s->query_step[0] + head * s->sharing * s->query_step[1],
            .keys = s->keys + row * s->key_step[0] + head * s->key_step[1],
            .values = s->values + row * s->value_step[0] + head * s->value_step[1],
            .mask = s->mask ? s->mask + row * s->mask_step[0] : NULL,
            .out = s->out + (long)unit * s->sharing * s->value_width,
        });
    }
}

/* Of queries, keys, values and, unless there is none, a mask with a byte for each key. The numbers
   are rows, key heads, query heads of each, keys, widths of a key and of a value, the bits of the
   scale, and whether there is a mask; then the steps of each input along its first three axes: row,
   head and position. */
FUNCTION(compiled_attention) {
    const int64_t *step = numbers + MOST_NUMBERS;
    attend_step(&(AttentionStep){
        .rows = numbers[0],
        .key_heads = numbers[1],
        .sharing = numbers[2],
        .seen = numbers[3],
        .width = numbers[4],
        .value_width = numbers[5],
        .scale = float_of(numbers[6]),
        .queries = in[0],
        .keys = in[1],
        .values = in[2],
        .mask = numbers[7] ? (const uint8_t *)in[3] : NULL,
        .query_step = step,
        .key_step = step + 3,
        .value_step = step + 6,
        .mask_step = step + 9,
        .out = out[0],
    });
}
