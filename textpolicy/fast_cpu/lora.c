/* A linear layer with LoRA, y = x W' + bias + s (x A) B, and its gradients, each as one operation.

   As operations of mlx, the update and the sum would be written and read as often as there are
   operations. W is outputs x inputs, A is inputs x rank, and B is rank x outputs. */

#include "loops.h"

/* y += x W' + s (x A) B, or y = that. */
static int add_products(const Linear *l, int rows, const float *x, long x_step, float *y, int adds) {
    if (l->format == FLOATS)
        few_rows_product(ROW_MAJOR, AS_STORED, TRANSPOSED, rows, l->outputs, l->inputs, 1, x, x_step,
                         l->weights, l->weights_step, adds, y, l->outputs);
    else if (!packed_product(l, rows, x, x_step, y, adds))
        return 0;
    if (!l->rank) return 1;
    float *narrow = scratch((long)rows * l->rank);
    if (!narrow) return 0;
    few_rows_product(ROW_MAJOR, AS_STORED, AS_STORED, rows, l->rank, l->inputs, *l->scale, x, x_step,
                     l->a, l->a_step, 0, narrow, l->rank);
    few_rows_product(ROW_MAJOR, AS_STORED, AS_STORED, rows, l->outputs, l->rank, 1, narrow, l->rank,
                     l->b, l->b_step, 1, y, l->outputs);
    return 1;
}

int linear(const Linear *l, int rows, const float *x, long x_step, float *y, int adds) {
    float *products = l->ratio ? scratch_of_layer((long)rows * l->outputs) : NULL;
    if (l->ratio && (!products || !add_products(l, rows, x, x_step, products, 0))) return 0;
    if (l->bias || l->ratio)
        for (long row = 0; row < rows; row++)
            for (int i = 0; i < l->outputs; i++) {
                float *at = y + row * l->outputs + i, sum = adds ? *at : 0;
                if (l->bias) sum += l->bias[i];
                *at = products ? sum + l->ratio[i] * products[row * l->outputs + i] : sum;
            }
    return products || add_products(l, rows, x, x_step, y, adds || l->bias);
}

/* Of x, W, A, B, s and perhaps a bias: y. The numbers are rows, inputs, outputs, rank, and whether there
   is a bias. */
FUNCTION(compiled_lora) {
    int rows = numbers[0];
    Linear layer = {
        .inputs = numbers[1],
        .outputs = numbers[2],
        .rank = numbers[3],
        .weights = in[1],
        .a = in[2],
        .b = in[3],
        .scale = in[4],
        .bias = numbers[4] ? in[5] : NULL,
        .weights_step = numbers[1],
        .a_step = numbers[3],
        .b_step = numbers[2],
    };
    if (!linear(&layer, rows, in[0], layer.inputs, out[0], 0))
        /* Without memory there is no result, and nobody shall take another number for it. */
        fill(out[0], (long)rows * layer.outputs, __builtin_nanf(""));
}

typedef struct {
    int rows, inputs, outputs, rank;
} Sizes;

/* Of x, W, A, B, s and the gradient of y: the gradients of x, A and B. */
FUNCTION(compiled_lora_gradients) {
    Sizes n = {numbers[0], numbers[1], numbers[2], numbers[3]};
    const float *x = in[0], *weights = in[1], *a = in[2], *b = in[3], scale = *in[4], *of_y = in[5];
    float *of_x = out[0], *of_a = out[1], *of_b = out[2], *narrow = out[3];
    /* The gradient of s x A, and then s x A itself. */
    few_rows_product(ROW_MAJOR, AS_STORED, TRANSPOSED, n.rows, n.rank, n.outputs, scale, of_y,
                     n.outputs, b, n.outputs, 0, narrow, n.rank);
    few_rows_product(ROW_MAJOR, AS_STORED, AS_STORED, n.rows, n.inputs, n.outputs, 1, of_y, n.outputs,
                     weights, n.inputs, 0, of_x, n.inputs);
    few_rows_product(ROW_MAJOR, AS_STORED, TRANSPOSED, n.rows, n.inputs, n.rank, 1, narrow, n.rank, a,
                     n.rank, 1, of_x, n.inputs);
    few_rows_product(ROW_MAJOR, TRANSPOSED, AS_STORED, n.inputs, n.rank, n.rows, 1, x, n.inputs, narrow,
                     n.rank, 0, of_a, n.rank);
    few_rows_product(ROW_MAJOR, AS_STORED, AS_STORED, n.rows, n.rank, n.inputs, scale, x, n.inputs, a,
                     n.rank, 0, narrow, n.rank);
    few_rows_product(ROW_MAJOR, TRANSPOSED, AS_STORED, n.rank, n.outputs, n.rows, 1, narrow, n.rank,
                     of_y, n.outputs, 0, of_b, n.outputs);
}
