/* Attention of many positions of each row, and its gradients.

   With scores S = scale Q K' and weights P = softmax(S), the result is O = P V, and

       dV = P' dO        dS = P (dO V' - sum(dO O))        dQ = scale dS K        dK = scale dS' Q

   Scores exist for BLOCK positions of one query head at a time, in the processor's caches. Each number
   is summed in an order that depends on its own row only. Widths of heads are multiples of 16. */

#include "rows.h"

enum { BLOCK = 32 };

/* A hidden key weighs 0. Where a position sees no key, all that its block has weigh alike. */
static const float HIDDEN = -1e30f;

/* The sums of so many rows and vectors are in registers at once. */
enum { ROWS = 6, VECTORS = LANES == 16 ? 4 : 2 };

/* Each sum has so many terms at a time, which keeps its error small. */
enum { SUMMED = 256 };

/* A matrix with steps from row to row and from column to column. */
typedef struct {
    const float *at;
    long row, column;
} Matrix;

INLINE void tile(const int rows, const int vectors, int inner, Matrix a, const float *b, long ldb,
                 float *c, long ldc, int add) {
    Vector sums[ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = (Vector){0};
    for (int k = 0; k < inner; k++) {
        Vector y[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) {
            y[v] = *(const Vector *)(b + k * ldb + v * LANES);
            IN_REGISTER(y[v]);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            Vector x = a.at[r * a.row + k * a.column] - (Vector){0};
            UNROLL for (int v = 0; v < vectors; v++) ADD_PRODUCT(sums[r][v], x, y[v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) {
            Vector *out = (Vector *)(c + r * ldc + v * LANES);
            if (add) sums[r][v] += *out;
            *out = sums[r][v];
        }
}

#define CASE(rows, vectors)                                        \
    case rows * 8 + vectors:                                       \
        tile(rows, vectors, inner, a, b, ldb, c, ldc, add);        \
        break;
#define CASES(vectors) \
    CASE(1, vectors) CASE(2, vectors) CASE(3, vectors) CASE(4, vectors) CASE(5, vectors) CASE(6, vectors)

static void any_tile(int rows, int vectors, int inner, Matrix a, const float *b, long ldb, float *c,
                     long ldc, int add) {
    switch (rows * 8 + vectors) {
        CASES(1) CASES(2)
#if LANES == 16
        CASES(3) CASES(4)
#endif
    }
}

/* C = A B, or C += A B, for `columns` of B and C in whole vectors. */
static void multiply(int rows, int columns, int inner, Matrix a, const float *b, long ldb, float *c,
                     long ldc, int add) {
    for (int k = 0; k < inner; k += SUMMED)
        for (int j = 0, vectors; j < columns; j += vectors * LANES) {
            vectors = least(VECTORS, (columns - j + LANES - 1) / LANES);
            for (int i = 0; i < rows; i += ROWS) {
                Matrix part = {a.at + i * a.row + k * a.column, a.row, a.column};
                any_tile(least(ROWS, rows - i), vectors, least(SUMMED, inner - k), part,
                         b + k * ldb + j, ldb, c + i * ldc + j, ldc, add || k);
            }
        }
}

/* What one key head of one row has to do. Its query heads are `sharing` and lie side by side. */
typedef struct {
    int sharing, time, seen, width, value_width, is_causal;
    float scale;
    Matrix keys, values;      /* keys x numbers */
    const uint8_t *mask;      /* or NULL */
    const int64_t *mask_step; /* along rows, heads and positions; 0 along an axis of length 1 */
} Group;

/* A matrix of keys as its transpose, with `width` numbers in a row. */
static void transpose(Matrix x, int rows, int columns, float *restrict to, int width) {
    for (int row = 0; row < width; row += LANES)
        for (int column = 0; column < columns; column++)
            for (int i = row; i < row + LANES; i++)
                to[(long)column * width + i] = i < rows ? x.at[i * x.row + column] : 0;
}

static int padded(int numbers) { return (numbers + LANES - 1) / LANES * LANES; }

/* The keys that the positions of a head before `position` may see. */
static int seen_before(const Group *g, int position) {
    return g->is_causal ? g->seen - g->time + position : g->seen;
}

/* Some positions of a query head, and the keys that they may see. */
typedef struct {
    int head, position, positions, key, keys;
} Block;

static const uint8_t *mask_of(const Group *g, const Block *b, int position) {
    long head = b->head * g->mask_step[1];
    return g->mask + head + (b->position + position) * g->mask_step[2] + b->key;
}

/* Keys before the first one that any of the positions sees are left out: padding before a row then
   changes no bit of what it gives, if each position sees all keys from one on. */
static Block block_of(const Group *g, int head, int position) {
    int positions = least(BLOCK, g->time - position);
    Block b = {head, position, positions, 0, seen_before(g, position + positions)};
    if (!g->mask) return b;
    int first = b.keys;
    for (int p = 0; p < positions; p++) {
        const uint8_t *mask = mask_of(g, &b, p);
        int key = 0;
        while (key < first && !mask[key]) key++;
        first = key;
    }
    b.key = first < b.keys ? first : 0;
    b.keys -= b.key;
    return b;
}

/* Set the numbers of the keys that a position of the block may not see. */
static void hide(const Group *g, const Block *b, int position, float *numbers, float with) {
    if (g->is_causal)
        for (int key = seen_before(g, b->position + position + 1); key < b->keys; key++)
            numbers[key] = with;
    if (!g->mask) return;
    const uint8_t *mask = mask_of(g, b, position);
    for (int key = 0; key < b->keys; key++) numbers[key] = mask[key] ? numbers[key] : with;
}

/* Write the scores of a block. */
static void score(const Group *g, const Block *b, Matrix queries, const float *transposed, long ld,
                  float *scores) {
    multiply(b->positions, b->keys, g->width, queries, transposed + b->key, ld, scores, ld, 0);
    for (int p = 0; p < b->positions; p++) {
        float *row = scores + p * ld;
        for (int key = 0; key < b->keys; key++) row[key] *= g->scale;
        hide(g, b, p, row, HIDDEN);
    }
}

typedef struct {
    const float *queries;
    long query_step[2]; /* along heads and positions */
    float *out, *stats; /* `stats` has the largest score and 1 / sum for each position */
    long out_step[2];
} Forward;

static void attend(const Group *g, const Forward *f, float *memory) {
    long ld = padded(g->seen);
    float *transposed = memory, *scores = transposed + g->width * ld + LANES;
    transpose(g->keys, g->seen, g->width, transposed, ld);
    for (int head = 0; head < g->sharing; head++)
        for (int first = 0; first < g->time; first += BLOCK) {
            Block b = block_of(g, head, first);
            float *out = f->out + head * f->out_step[0] + first * f->out_step[1];
            float *stats = f->stats + 2 * ((long)head * g->time + first);
            const float *at = f->queries + head * f->query_step[0] + first * f->query_step[1];
            score(g, &b, (Matrix){at, f->query_step[1], 1}, transposed, ld, scores);
            for (int p = 0; p < b.positions; p++) {
                float *restrict row = scores + p * ld, top = largest(row, b.keys), sum;
                for (int key = 0; key < b.keys; key++) row[key] = exp_of(row[key] - top);
                SUM(sum, b.keys, row[i]);
                stats[2 * p] = top;
                stats[2 * p + 1] = 1 / sum;
            }
            multiply(b.positions, g->value_width, b.keys, (Matrix){scores, ld, 1},
                     g->values.at + b.key * g->values.row, g->values.row, out, f->out_step[1], 0);
            for (int p = 0; p < b.positions; p++)
                for (int i = 0; i < g->value_width; i++)
                    out[p * f->out_step[1] + i] *= stats[2 * p + 1];
        }
}

typedef struct {
    Matrix queries, out, of_out; /* positions x numbers, of the first query head */
    long query_head, out_head, of_out_head;
    const float *stats;
    float *of_queries, *of_keys, *of_values;
    long of_queries_step[2];
} Backward;

static Matrix at_position(Matrix x, long head_step, int head, int position) {
    return (Matrix){x.at + head * head_step + position * x.row, x.row, x.column};
}

static Matrix transposed_of(Matrix x) { return (Matrix){x.at, x.column, x.row}; }

static void attend_back(const Group *g, const Backward *f, float *memory) {
    long ld = padded(g->seen);
    float *keys_by_number = memory, *values_by_number = keys_by_number + g->width * ld;
    float *weights = values_by_number + g->value_width * ld + LANES, *slopes = weights + BLOCK * ld;
    transpose(g->keys, g->seen, g->width, keys_by_number, ld);
    transpose(g->values, g->seen, g->value_width, values_by_number, ld);
    memset(f->of_keys, 0, sizeof(float) * g->seen * g->width);
    memset(f->of_values, 0, sizeof(float) * g->seen * g->value_width);
    for (int head = 0; head < g->sharing; head++)
        for (int first = 0; first < g->time; first += BLOCK) {
            Block b = block_of(g, head, first);
            Matrix queries = at_position(f->queries, f->query_head, head, first);
            Matrix out = at_position(f->out, f->out_head, head, first);
            Matrix of_out = at_position(f->of_out, f->of_out_head, head, first);
            const float *stats = f->stats + 2 * ((long)head * g->time + first);
            score(g, &b, queries, keys_by_number, ld, weights);
            multiply(b.positions, b.keys, g->value_width, of_out, values_by_number + b.key, ld, slopes,
                     ld, 0);
            for (int p = 0; p < b.positions; p++) {
                float *restrict weight = weights + p * ld, *restrict slope = slopes + p * ld, mean;
                const float *x = out.at + p * out.row, *y = of_out.at + p * of_out.row;
                float top = stats[2 * p], share = stats[2 * p + 1];
                SUM(mean, g->value_width, x[i] * y[i]);
                for (int key = 0; key < b.keys; key++) {
                    weight[key] = exp_of(weight[key] - top) * share;
                    slope[key] = weight[key] * (slope[key] - mean) * g->scale;
                }
                hide(g, &b, p, slope, 0);
            }
            Matrix weight = {weights, ld, 1}, slope = {slopes, ld, 1};
            multiply(b.positions, g->width, b.keys, slope, g->keys.at + b.key * g->keys.row,
                     g->keys.row,
                     f->of_queries + head * f->of_queries_step[0] + first * f->of_queries_step[1],
                     f->of_queries_step[1], 0);
            multiply(b.keys, g->width, b.positions, transposed_of(slope), queries.at, queries.row,
                     f->of_keys + (long)b.key * g->width, g->width, 1);
            multiply(b.keys, g->value_width, b.positions, transposed_of(weight), of_out.at,
                     of_out.row, f->of_values + (long)b.key * g->value_width, g->value_width, 1);
        }
}

/* The numbers of both functions: rows, key heads, query heads of each, positions, keys, widths of a
   key and of a value, the bits of the scale, and 0, 1 for a causal mask, or 2 for the last input, a
   mask with a byte for each key. Then come the steps of each input. */
typedef struct {
    int rows, key_heads, kind;
    Group group;
    const int64_t *step;
} Sizes;

static Sizes sizes_of(const int64_t *numbers) {
    Sizes s = {numbers[0], numbers[1], numbers[8], {0}, numbers + MOST_NUMBERS};
    s.group = (Group){
        .sharing = numbers[2],
        .time = numbers[3],
        .seen = numbers[4],
        .width = numbers[5],
        .value_width = numbers[6],
        .is_causal = s.kind == 1,
        .scale = float_of(numbers[7]),
    };
    return s;
}

static Group group_of(const Sizes *s, const float *const *in, int mask, int row, int head) {
    Group g = s->group;
    const int64_t *key = s->step + 3, *value = s->step + 6;
    g.keys = (Matrix){in[1] + row * key[0] + head * key[1], key[2], 1};
    g.values = (Matrix){in[2] + row * value[0] + head * value[1], value[2], 1};
    if (s->kind == 2) {
        g.mask_step = s->step + 3 * mask;
        g.mask = (const uint8_t *)in[mask] + row * g.mask_step[0] +
                 head * g.sharing * g.mask_step[1];
    }
    return g;
}

#define THREADS(s)                                                                            \
    num_threads(threads_for((double)s.rows * s.key_heads * s.group.sharing * s.group.time *   \
                                s.group.seen * s.group.width >=                               \
                            SMALLEST_SHARED))

/* Of queries, keys, values and perhaps a mask: the result, as rows x positions x heads x numbers, and
   the two numbers of each row, head and position that the gradient needs. */
FUNCTION(compiled_attention_of_positions) {
    Sizes s = sizes_of(numbers);
    const Group *all = &s.group;
    int heads = s.key_heads * all->sharing;
    long ld = padded(all->seen), number_of_scratch = (all->width + BLOCK) * ld + LANES;
#pragma omp parallel for THREADS(s)
    for (int unit = 0; unit < s.rows * s.key_heads; unit++) {
        int row = unit / s.key_heads, first = unit % s.key_heads * all->sharing;
        Group g = group_of(&s, in, 3, row, unit % s.key_heads);
        Forward f = {
            .queries = in[0] + row * s.step[0] + first * s.step[1],
            .query_step = {s.step[1], s.step[2]},
            .out = out[0] + ((long)row * all->time * heads + first) * all->value_width,
            .stats = out[1] + 2 * ((long)row * heads + first) * all->time,
            .out_step = {all->value_width, (long)heads * all->value_width},
        };
        float *memory = scratch(number_of_scratch);
        if (memory)
            attend(&g, &f, memory);
        else
            /* Without memory there is no result, and nobody shall take another number for it. */
            for (int p = 0; p < all->time; p++)
                fill(f.out + p * f.out_step[1], (long)all->sharing * all->value_width, NAN);
    }
}

/* Of queries, keys, values, the result, its two numbers for each position, its gradient and perhaps a
   mask: the gradients of queries, as rows x positions x heads x numbers, keys and values. */
FUNCTION(compiled_attention_gradients) {
    Sizes s = sizes_of(numbers);
    const Group *all = &s.group;
    int heads = s.key_heads * all->sharing;
    long ld = padded(all->seen);
    long number_of_scratch = (all->width + all->value_width + 2 * BLOCK) * ld + LANES;
    const int64_t *result = s.step + 9, *of_result = s.step + 15;
#pragma omp parallel for THREADS(s)
    for (int unit = 0; unit < s.rows * s.key_heads; unit++) {
        int row = unit / s.key_heads, first = unit % s.key_heads * all->sharing;
        Group g = group_of(&s, in, 6, row, unit % s.key_heads);
        Backward b = {
            .queries = {in[0] + row * s.step[0] + first * s.step[1], s.step[2], 1},
            .query_head = s.step[1],
            .out = {in[3] + row * result[0] + first * result[1], result[2], 1},
            .out_head = result[1],
            .stats = in[4] + 2 * ((long)row * heads + first) * all->time,
            .of_out = {in[5] + row * of_result[0] + first * of_result[1], of_result[2], 1},
            .of_out_head = of_result[1],
            .of_queries = out[0] + ((long)row * all->time * heads + first) * all->width,
            .of_queries_step = {all->width, (long)heads * all->width},
            .of_keys = out[1] + (long)unit * all->seen * all->width,
            .of_values = out[2] + (long)unit * all->seen * all->value_width,
        };
        float *memory = scratch(number_of_scratch);
        if (memory)
            attend_back(&g, &b, memory);
        else
            fill(b.of_keys, (long)all->seen * all->width, NAN);
    }
}
