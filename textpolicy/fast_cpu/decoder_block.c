/* A block of a transformer that computes one position of each row, as two operations.

   As operations of mlx, such a block has some seventy nodes, and takes longer to begin than to compute.
   The cache takes the new keys and values between the two. */

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

/* Norm and turn each head where it lies; without a norm or angles these are NULL. */
static void finish_heads(int rows, int heads, int width, float *x, const float *norm, float epsilon,
                         const float *cosine, const float *sine) {
    if (!norm && !cosine) return;
#pragma omp parallel for THREADS(rows * heads * width)
    for (int row = 0; row < rows; row++)
        for (int head = 0; head < heads; head++) {
            float *at = x + ((long)row * heads + head) * width;
            if (norm) {
                float scale = scale_of(at, width, epsilon);
                for (int i = 0; i < width; i++) at[i] = at[i] * scale * norm[i];
            }
            if (cosine)
                turn_head(at, width, cosine + (long)row * width, sine + (long)row * width, at);
        }
}

/* Of x, the weights of a norm, the layers of queries, keys and values, perhaps the norms of queries and
   keys, and perhaps cosines and sines: queries, keys and values of the position. The numbers are rows,
   the width of x, heads, key heads, widths of a key and of a value, the bits of the epsilons of the
   norms, whether queries and keys have norms, whether there are angles, and two numbers for each layer. */
FUNCTION(compiled_block_inputs) {
    int rows = numbers[0], hidden = numbers[1], heads = numbers[2], key_heads = numbers[3];
    int width = numbers[4], value_width = numbers[5], has_norms = numbers[8];
    int has_angles = numbers[9];
    Inputs inputs = inputs_of(in, numbers, 10);
    long step = inputs.step[1];
    const float *x = take(&inputs), *norm = take(&inputs);
    Linear layers[3] = {
        take_linear(&inputs, hidden, heads * width),
        take_linear(&inputs, hidden, key_heads * width),
        take_linear(&inputs, hidden, key_heads * value_width),
    };
    const float *norms[2] = {NULL, NULL}, *cosine = NULL, *sine = NULL;
    if (has_norms)
        for (int i = 0; i < 2; i++) norms[i] = take(&inputs);
    if (has_angles) cosine = take(&inputs), sine = take(&inputs);
    float *normed = scratch_of_block((long)rows * hidden);
    if (normed) norm_rows(rows, hidden, x, step, float_of(numbers[6]), norm, normed);
    for (int i = 0; i < 3; i++)
        if (!normed || !linear(&layers[i], rows, normed, hidden, out[i], 0))
            /* Without memory there is no result, and nobody shall take another number for it. */
            fill(out[i], (long)rows * layers[i].outputs, NAN);
    for (int i = 0; i < 2; i++)
        finish_heads(rows, i ? key_heads : heads, width, out[i], norms[i], float_of(numbers[7]), cosine,
                     sine);
}

/* Of x, queries, all keys and values, the weights of a norm, the layers that follow attention, those of
   the gate, of the values it multiplies and of the result, and perhaps a mask: x after the block. The
   numbers are rows, the width of x, key heads, query heads of each, keys, widths of a key and of a
   value, the width of the gate, the bits of the scale and of epsilon, whether there is a mask, and two
   numbers for each layer. */
FUNCTION(compiled_block_outputs) {
    int rows = numbers[0], hidden = numbers[1], key_heads = numbers[2], sharing = numbers[3];
    int value_width = numbers[6], inner = numbers[7], has_mask = numbers[10];
    int attended_width = key_heads * sharing * value_width;
    Inputs inputs = inputs_of(in, numbers, 11);
    long x_step = inputs.step[1];
    const float *x = take(&inputs);
    AttentionStep attention = {
        .rows = rows,
        .key_heads = key_heads,
        .sharing = sharing,
        .seen = numbers[4],
        .width = numbers[5],
        .value_width = value_width,
        .scale = float_of(numbers[8]),
    };
    attention.query_step = inputs.step, attention.queries = take(&inputs);
    attention.key_step = inputs.step, attention.keys = take(&inputs);
    attention.value_step = inputs.step, attention.values = take(&inputs);
    const float *norm = take(&inputs);
    Linear attended = take_linear(&inputs, attended_width, hidden);
    Linear gate = take_linear(&inputs, hidden, inner), up = take_linear(&inputs, hidden, inner);
    Linear down = take_linear(&inputs, inner, hidden);
    if (has_mask) {
        attention.mask_step = inputs.step;
        attention.mask = (const uint8_t *)take(&inputs);
    }
    float *y = out[0];
    float *some = scratch_of_block((long)rows * (attended_width + hidden + 2 * inner));
    if (!some) {
        fill(y, (long)rows * hidden, NAN);
        return;
    }
    float *normed = some + (long)rows * attended_width;
    float *gates = normed + (long)rows * hidden, *ups = gates + (long)rows * inner;
    attention.out = some;
    attend_step(&attention);
    for (int row = 0; row < rows; row++)
        memcpy(y + (long)row * hidden, x + row * x_step, sizeof(float) * hidden);
    int is_done = linear(&attended, rows, some, attended_width, y, 1);
    norm_rows(rows, hidden, y, hidden, float_of(numbers[9]), norm, normed);
    is_done &= linear(&gate, rows, normed, hidden, gates, 0);
    is_done &= linear(&up, rows, normed, hidden, ups, 0);
    long size = (long)rows * inner;
#pragma omp parallel for simd THREADS(size)
    for (long i = 0; i < size; i++) gates[i] = swiglu_of(gates[i], ups[i]);
    is_done &= linear(&down, rows, gates, inner, y, 1);
    if (!is_done) fill(y, (long)rows * hidden, NAN);
}
