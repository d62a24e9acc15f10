/* What functions of rows have in common: exponentials, the largest number, and sums in one order. */

#pragma once

#include <math.h>
#include <string.h>

#include "loops.h"

/* The float32 number with these bits. */
INLINE float float_of(int64_t number) {
    int32_t bits = number;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

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

/* 1 / sqrt(mean square of a row + epsilon). */
INLINE float scale_of(const float *x, int64_t width, float epsilon) {
    float sum;
    SUM(sum, width, x[i] * x[i]);
    return 1 / sqrtf(sum / width + epsilon);
}

/* A row over its root mean square, times a vector of weights. */
INLINE void norm_row(const float *x, int64_t width, float epsilon, const float *weight,
                     float *restrict y) {
    float scale = scale_of(x, width, epsilon);
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
}

/* silu(gate) x. */
INLINE float swiglu_of(float gate, float x) { return gate * x / (1 + exp_of(-gate)); }

/* A head x cos + (second half of x, first half of x) sin, where the sines of the first half are negated.
   It may be written to where it lies. */
INLINE void turn_head(const float *x, int64_t width, const float *cosine, const float *sine,
                      float *y) {
    int64_t half = width / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        y[i] = first * cosine[i] + second * sine[i];
        y[i + half] = second * cosine[i + half] + first * sine[i + half];
    }
}
