/* A block of a transformer that computes one position of each row, as one operation.

   As operations of mlx, such a block has some seventy nodes, and takes longer to begin than to compute. */

#include "rows.h"

/* The inputs of an operation in their order, and what its numbers say of them. */
typedef struct {
    const float *const *in;
    const int64_t *numbers, *step;
} Inputs;

static Inputs inputs_of(const float *const *in, const int64_t *numbers, int first_number) {
    return (Inputs){in, numbers + first_number, numbers + MOST_NUMBERS};
}

static const float *take(Inputs *inputs) {
    inputs->step += 3;
    return *inputs->in++;
}

/* The next numbers are 4 rank + 2 if there are ratios + 1 if there is a bias, and 4 groups + the format. */
static Linear take_linear(Inputs *inputs, int width, int outputs) {
    int64_t number = *inputs->numbers++, stored = *inputs->numbers++;
    Linear l = {.inputs = width, .outputs = outputs, .rank = number / 4, .weights_step = width,
                .format = stored % 4, .groups = stored / 4};
    l.weights = take(inputs);
    if (l.format != FLOATS) l.scales = take(inputs);
    if (l.format == AFFINE_4 || l.format == AFFINE_8) l.biases = take(inputs);
    if (number % 2) l.bias = take(inputs);
    if (l.rank) {
        l.a = take(inputs), l.a_step = l.rank;
        l.b = take(inputs), l.b_step = outputs;
        l.scale = take(inputs);
        if (number / 2 % 2) l.ratio = take(inputs);
    }
    return l;
}

#define THREADS(size) num_threads(threads_for((size) >= 1 << 13))

static void norm_rows(int rows, int width, const float *x, long step, float epsilon,
                      const float *weight, float *y) {
#pragma omp parallel for THREADS(rows * width)
    for (int row = 0; row < rows; row++)
        norm_row(x + row * step, width, epsilon, weight, y + (long)row * width);
}

/* Norm and turn each head where it lies; without a norm it is NULL. */
static void finish_heads(int rows, int heads, int width, float *x, const float *norm, float epsilon,
                         const float *cosine, const float *sine) {
#pragma omp parallel for THREADS(rows * heads * width)
    for (int row = 0; row < rows; row++)
        for (int head = 0; head < heads; head++) {
            float *at = x + ((long)row * heads + head) * width;
            if (norm) {
                float scale = scale_of(at, width, epsilon);
                for (int i = 0; i < width; i++) at[i] = at[i] * scale * norm[i];
            }
            turn_head(at, width, cosine + (long)row * width, sine + (long)row * width, at);
        }
}

typedef struct {
    int rows, hidden, heads, key_heads, width, value_width, inner;
} Sizes;

/* The layers up to the heads of a position. Without norms of the heads these are NULL. */
typedef struct {
    Linear queries, keys, values;
    const float *query_norm, *key_norm, *cosine, *sine;
    float epsilon;
} Heads;

/* The layers that follow the norm after attention. */
typedef struct {
    Linear gate, up, down;
} FeedForward;

/* The keys or values of all rows, as rows x heads x places x numbers, and the steps along these axes. */
typedef struct {
    float *at;
    int heads, width;
    int64_t step[3];
} Cache;

static Cache cache_of(float *at, int heads, int places, int width) {
    int64_t of_head = (int64_t)places * width;
    return (Cache){at, heads, width, {heads * of_head, of_head, width}};
}

/* Put the keys or values of a position into their place. */
static void store(const Cache *cache, int rows, int place, const float *made) {
    for (long head = 0; head < (long)rows * cache->heads; head++)
        memcpy(cache->at + head * cache->step[1] + place * cache->step[2], made + head * cache->width,
               sizeof(float) * cache->width);
}

/* Compute the queries of a position, and put its keys and values, for which `made` has memory, into the
   caches. Return 0 if there was no memory. */
static int add_position(const Heads *h, const Sizes *n, const float *normed, int place, float *queries,
                        float *made, const Cache *keys, const Cache *values) {
    if (!linear(&h->queries, n->rows, normed, n->hidden, queries, 0)) return 0;
    finish_heads(n->rows, n->heads, n->width, queries, h->query_norm, h->epsilon, h->cosine, h->sine);
    if (!linear(&h->keys, n->rows, normed, n->hidden, made, 0)) return 0;
    finish_heads(n->rows, n->key_heads, n->width, made, h->key_norm, h->epsilon, h->cosine, h->sine);
    store(keys, n->rows, place, made);
    if (!linear(&h->values, n->rows, normed, n->hidden, made, 0)) return 0;
    store(values, n->rows, place, made);
    return 1;
}

/* y += down(silu(gate(x)) up(x)), with memory for two arrays as wide as the gate. */
static int feed_forward(const FeedForward *f, const Sizes *n, const float *x, float *memory, float *y) {
    long size = (long)n->rows * n->inner;
    float *gates = memory, *ups = gates + size;
    if (!linear(&f->gate, n->rows, x, n->hidden, gates, 0)) return 0;
    if (!linear(&f->up, n->rows, x, n->hidden, ups, 0)) return 0;
#pragma omp parallel for simd THREADS(size)
    for (long i = 0; i < size; i++) gates[i] = swiglu_of(gates[i], ups[i]);
    return linear(&f->down, n->rows, gates, n->inner, y, 1);
}

/* x after the block, and all keys and values with those of the position.

   The inputs are:
   - x, all keys and all values
   - the weights of the first norm
   - the layers of queries, keys and values
   - perhaps the weights of the norms of queries and of keys
   - cosines and sines
   - the layer that follows attention
   - the weights of the second norm
   - the layers of the gate, of the values it multiplies, and of the result
   - perhaps a mask

   The numbers are:
   0  rows
   1  the width of x
   2  heads
   3  key heads
   4  the width of a key
   5  the width of a value
   6  the width of the gate
   7  places of the cache
   8  how many of these are used
   9  the bits of the scale of attention
   10 the bits of the epsilons of the first norm, of the second, and of the norms of heads
   13 whether heads have norms
   14 whether there is a mask
   15 two numbers for each layer, which `take_linear` reads */
FUNCTION(compiled_block) {
    Sizes n = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]};
    int places = numbers[7], used = numbers[8], attended_width = n.heads * n.value_width;
    float scale = float_of(numbers[9]), epsilon = float_of(numbers[10]);
    float second_epsilon = float_of(numbers[11]);
    Inputs inputs = inputs_of(in, numbers, 15);
    long x_step = inputs.step[1];
    const float *x = take(&inputs);
    take(&inputs), take(&inputs);
    Cache keys = cache_of(out[1], n.key_heads, places, n.width);
    Cache values = cache_of(out[2], n.key_heads, places, n.value_width);
    const float *norm = take(&inputs);
    Heads heads = {.epsilon = float_of(numbers[12])};
    heads.queries = take_linear(&inputs, n.hidden, n.heads * n.width);
    heads.keys = take_linear(&inputs, n.hidden, n.key_heads * n.width);
    heads.values = take_linear(&inputs, n.hidden, n.key_heads * n.value_width);
    if (numbers[13]) heads.query_norm = take(&inputs), heads.key_norm = take(&inputs);
    heads.cosine = take(&inputs), heads.sine = take(&inputs);
    Linear attended = take_linear(&inputs, attended_width, n.hidden);
    const float *second_norm = take(&inputs);
    FeedForward layers;
    layers.gate = take_linear(&inputs, n.hidden, n.inner);
    layers.up = take_linear(&inputs, n.hidden, n.inner);
    layers.down = take_linear(&inputs, n.inner, n.hidden);
    const int64_t *mask_step = inputs.step;
    const uint8_t *mask = numbers[14] ? (const uint8_t *)take(&inputs) : NULL;

    float *y = out[0];
    long width_of_heads = (long)n.heads * n.width + n.key_heads * (n.width + n.value_width);
    float *normed = scratch_of_block(n.rows * (n.hidden + width_of_heads + attended_width + 2L * n.inner));
    /* Without memory there is no result, and nobody shall take another number for it. */
    if (!normed) {
        fill(y, (long)n.rows * n.hidden, NAN);
        return;
    }
    float *queries = normed + (long)n.rows * n.hidden;
    float *made = queries + (long)n.rows * n.heads * n.width;
    float *some = normed + n.rows * (n.hidden + width_of_heads);
    float *gates = some + (long)n.rows * attended_width;
    norm_rows(n.rows, n.hidden, x, x_step, epsilon, norm, normed);
    int is_done = add_position(&heads, &n, normed, used, queries, made, &keys, &values);
    attend_step(&(AttentionStep){
        .rows = n.rows,
        .key_heads = n.key_heads,
        .sharing = n.heads / n.key_heads,
        .seen = used + 1,
        .width = n.width,
        .value_width = n.value_width,
        .scale = scale,
        .queries = queries,
        .keys = keys.at,
        .values = values.at,
        .mask = mask,
        .query_step = (int64_t[]){(int64_t)n.heads * n.width, n.width, n.width},
        .key_step = keys.step,
        .value_step = values.step,
        .mask_step = mask_step,
        .out = some,
    });
    for (int row = 0; row < n.rows; row++)
        memcpy(y + (long)row * n.hidden, x + row * x_step, sizeof(float) * n.hidden);
    is_done = is_done && linear(&attended, n.rows, some, attended_width, y, 1);
    norm_rows(n.rows, n.hidden, y, n.hidden, second_epsilon, second_norm, normed);
    if (!is_done || !feed_forward(&layers, &n, normed, gates, y)) fill(y, (long)n.rows * n.hidden, NAN);
}
