/* Functions of arrays of float32 numbers, by vector instructions and by several threads.

   `mlx_operations.cpp` lets mlx call them. Each takes the memory of its inputs and its outputs, and
   numbers: how many numbers an array has, then the width of a row if the function has rows. */

#include <math.h>
#include <string.h>

#include "loops.h"

/* Smaller arrays than this take less time than to wake a thread. */
enum { SMALLEST_SHARED_ARRAY = 1 << 15 };

#define THREADS(size) num_threads(threads_for((size) >= SMALLEST_SHARED_ARRAY))

/* Adding this, 1.5 * 2^23, leaves the nearest whole number in the last bits of a float32. */
static const float ROUND = 12582912.0f;

/* 2^(f + n) for -1/2 <= f <= 1/2, where `shifted` is n + ROUND. */
INLINE float power_of_2(float f, float shifted) {
    /* The polynomial of this degree with the smallest relative error, 2e-8, that gives 1 at 0. */
    float p = 1.5353362e-4f;
    p = p * f + 1.3398875e-3f;
    p = p * f + 9.6184369e-3f;
    p = p * f + 5.5503324e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    /* 2^n as two factors, because a float32 has no 2^128. */
    int32_t n, half, first, second;
    memcpy(&n, &shifted, 4);
    n -= 0x4B400000;
    half = n >> 1;
    first = (half + 127) << 23;
    second = (n - half + 127) << 23;
    float a, b;
    memcpy(&a, &first, 4);
    memcpy(&b, &second, 4);
    return p * a * b;
}

INLINE float between(float least, float x, float most) {
    x = x > most ? most : x;
    return x < least ? least : x;
}

/* 2^x; 0 for a subnormal result, and infinite from 128 on. */
INLINE float exp2_of(float x) {
    float y = between(-127, x, 129), shifted = y + ROUND;
    return x < -126 ? 0 : power_of_2(y - (shifted - ROUND), shifted);
}

/* e^x; 0 for a subnormal result, and infinite from 88.7 on. */
INLINE float exp_of(float x) {
    const float log2_e = 1.44269504f, least = -87.33654f;
    float y = between(least, x, 89), shifted = y * log2_e + ROUND, n = shifted - ROUND;
    /* The logarithm of 2 in two parts: n times the first part is exact. */
    float rest = y - n * 0.693359375f + n * 2.12194440e-4f;
    return x < least ? 0 : power_of_2(rest * log2_e, shifted);
}

INLINE float largest(const float *x, int64_t size) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; i++) top = x[i] > top ? x[i] : top;
    return top;
}

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

/* Sums are added up in an order that counts from the end of a row, wherever the row lies in memory
   and whatever the compiler does with the loop. Zeros before a row change no bit of its sum: a row of
   attention weights has such zeros beside a longer row. */
enum { LANES_OF_A_SUM = 16 };

INLINE float sum_of_lanes(float *sums) {
    for (int half = LANES_OF_A_SUM / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    return sums[0];
}

/* The sum of `term`, which depends on i, for i from 0 to size - 1. */
#define SUM(result, size, term)                                                       \
    do {                                                                              \
        float sums[LANES_OF_A_SUM] = {0};                                             \
        int64_t first = (size) % LANES_OF_A_SUM;                                      \
        for (int64_t i = 0; i < first; i++) sums[LANES_OF_A_SUM - first + i] = term;  \
        for (int64_t start = first; start < (size); start += LANES_OF_A_SUM)          \
            for (int64_t i = start; i < start + LANES_OF_A_SUM; i++)                  \
                sums[i - start] += term;                                              \
        result = sum_of_lanes(sums);                                                  \
    } while (0)

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
