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

/* 1 / sqrt(mean square of a row + epsilon); the bits of epsilon are the third of the numbers. */
INLINE float scale_of(const float *x, const int64_t *numbers) {
    int32_t bits = numbers[2];
    float epsilon, sum;
    memcpy(&epsilon, &bits, 4);
    SUM(sum, numbers[1], x[i] * x[i]);
    return 1 / sqrtf(sum / numbers[1] + epsilon);
}

/* Each row over its root mean square, times a vector of weights. */
FUNCTION(compiled_rms_norm) {
    int64_t width = numbers[1];
#pragma omp parallel for THREADS(numbers[0])
    for (int64_t start = 0; start < numbers[0]; start += width) {
        const float *x = in[0] + start, *weight = in[1];
        float *restrict y = out[0] + start, scale = scale_of(x, numbers);
        for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
    }
}

/* The gradient of x, from x, the gradient of the result, and the weights. */
FUNCTION(compiled_rms_norm_gradient) {
    int64_t width = numbers[1];
#pragma omp parallel for THREADS(numbers[0])
    for (int64_t start = 0; start < numbers[0]; start += width) {
        const float *x = in[0] + start, *result = in[1] + start, *weight = in[2];
        float *restrict of_x = out[0] + start, scale = scale_of(x, numbers), sum;
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
    for (int64_t i = 0; i < numbers[0]; i++) y[i] = gate[i] * x[i] / (1 + exp_of(-gate[i]));
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
    int64_t width = numbers[1], half = width / 2, heads = numbers[2];
#pragma omp parallel for THREADS(numbers[0])
    for (int64_t start = 0; start < numbers[0]; start += width) {
        int64_t angles = start / (width * heads) * width;
        const float *x = in[0] + start, *cosine = in[1] + angles, *sine = in[2] + angles;
        float *restrict y = out[0] + start;
        for (int64_t i = 0; i < half; i++) y[i] = x[i] * cosine[i] + x[i + half] * sine[i];
        for (int64_t i = half; i < width; i++) y[i] = x[i] * cosine[i] + x[i - half] * sine[i];
    }
}
