/* Functions of arrays of float32 numbers, by vector instructions and by several threads.

   `mlx_operations.cpp` lets mlx call them. Each takes the memory of its inputs and its outputs, and
   numbers: how many numbers an array has, then the width of a row if the function has rows. */

#include "rows.h"

/* Smaller arrays than this take less time than to wake a thread. */
enum { SMALLEST_SHARED_ARRAY = 1 << 15 };

#define THREADS(size) num_threads(threads_for((size) >= SMALLEST_SHARED_ARRAY))

FUNCTION(compiled_exp) {
    const float *x = in[0];
    float *restrict y = out[0];
#pragma omp parallel for simd THREADS(numbers[0])
    for (int64_t i = 0; i < numbers[0]; i++) y[i] = exp_of(x[i]);
}

FUNCTION(compiled_exp2) {
    const float *x = in[0];
    float *restrict y = out[0];
#pragma omp parallel for simd THREADS(numbers[0])
    for (int64_t i = 0; i < numbers[0]; i++) y[i] = exp2_of(x[i]);
}

/* The softmax of each row. */
FUNCTION(compiled_softmax) {
    int64_t width = numbers[1];
#pragma omp parallel for THREADS(numbers[0])
    for (int64_t start = 0; start < numbers[0]; start += width) {
        const float *x = in[0] + start;
        float *restrict y = out[0] + start, top = largest(x, width);
        for (int64_t i = 0; i < width; i++) y[i] = exp_of(x[i] - top);
        float sum;
        SUM(sum, width, y[i]);
        for (int64_t i = 0; i < width; i++) y[i] /= sum;
    }
}

/* Each row over its root mean square, times a vector of weights. The third of the numbers is the bits of
   epsilon. */
FUNCTION(compiled_rms_norm) {
    int64_t width = numbers[1];
#pragma omp parallel for THREADS(numbers[0])
    for (int64_t start = 0; start < numbers[0]; start += width) {
        norm_row(in[0] + start, width, float_of(numbers[2]), in[1], out[0] + start);
    }
}

/* The gradient of x, from x, the gradient of the result, and the weights. */
FUNCTION(compiled_rms_norm_gradient) {
    int64_t width = numbers[1];
#pragma omp parallel for THREADS(numbers[0])
    for (int64_t start = 0; start < numbers[0]; start += width) {
        const float *x = in[0] + start, *result = in[1] + start, *weight = in[2];
        float *restrict of_x = out[0] + start, sum;
        float scale = scale_of(x, width, float_of(numbers[2]));
        SUM(sum, width, x[i] * result[i] * weight[i]);
        float back = scale * scale * sum / width;
        for (int64_t i = 0; i < width; i++)
            of_x[i] = scale * (result[i] * weight[i] - x[i] * back);
    }
}

/* silu(gate) x of gate and x. */
FUNCTION(compiled_swiglu) {
    const float *gate = in[0], *x = in[1];
    float *restrict y = out[0];
#pragma omp parallel for simd THREADS(numbers[0])
    for (int64_t i = 0; i < numbers[0]; i++) y[i] = swiglu_of(gate[i], x[i]);
}

/* The gradients of gate and of x, from gate, x and the gradient of the result. */
FUNCTION(compiled_swiglu_gradients) {
    const float *gate = in[0], *x = in[1], *result = in[2];
    float *restrict of_gate = out[0], *restrict of_x = out[1];
#pragma omp parallel for simd THREADS(numbers[0])
    for (int64_t i = 0; i < numbers[0]; i++) {
        float s = 1 / (1 + exp_of(-gate[i])), silu = gate[i] * s;
        of_gate[i] = result[i] * s * x[i] * (1 + gate[i] * (1 - s));
        of_x[i] = result[i] * silu;
    }
}

/* Each head x cos + (second half of x, first half of x) sin, with the cosines and sines of its row.
   The numbers are the size, the width of a head, and how many heads a row has. */
FUNCTION(compiled_rotation) {
    int64_t width = numbers[1], heads = numbers[2];
#pragma omp parallel for THREADS(numbers[0])
    for (int64_t start = 0; start < numbers[0]; start += width) {
        int64_t angles = start / (width * heads) * width;
        turn_head(in[0] + start, width, in[1] + angles, in[2] + angles, out[0] + start);
    }
}

/* Each head turned by the angles of its position, written as rows x positions x heads x numbers. The
   numbers are rows, heads, positions, the width of a head, and 1, or -1 to turn it back; then come the
   steps of each input: heads by row, head and position, cosines and sines by row and position. */
FUNCTION(compiled_rotation_of_positions) {
    int64_t heads = numbers[1], time = numbers[2], width = numbers[3], half = width / 2;
    int64_t units = numbers[0] * time;
    const int64_t *step = numbers + MOST_NUMBERS;
    float sign = numbers[4];
#pragma omp parallel for THREADS(units * heads * width)
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t row = unit / time, at = unit % time;
        const float *x = in[0] + row * step[0] + at * step[2];
        const float *cosine = in[1] + row * step[4] + at * step[5];
        const float *sine = in[2] + row * step[7] + at * step[8];
        float *restrict y = out[0] + unit * heads * width;
        for (int64_t head = 0; head < heads; head++, x += step[1], y += width) {
            const float *first = x, *second = x + half;
            for (int64_t i = 0; i < half; i++) {
                float turn = sign * sine[i];
                y[i] = first[i] * cosine[i] - second[i] * turn;
                y[i + half] = second[i] * cosine[i] + first[i] * turn;
            }
        }
    }
}
