/* A token for each row, drawn with the row's own key from softmax(logits), as one operation.

   As in `sampling.py`, the first random number chooses a block of the vocabulary and the second one a
   token of the block. */

#include "rows.h"

enum { BLOCK = 128, ROUNDS = 20 };

/* The first two random words of a key: Threefry-2x32, Salmon et al. 2011, Parallel Random Numbers: As
   Easy as 1, 2, 3. They are those of `mx.random.bits`. */
static void random_words(const uint32_t key[2], uint32_t words[2]) {
    const int rotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
    const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA};
    uint32_t a = keys[0], b = 1 + keys[1];
    for (int round = 0; round < ROUNDS; round++) {
        int turn = rotations[round % 8];
        a += b;
        b = (b << turn | b >> (32 - turn)) ^ a;
        if (round % 4 == 3) {
            int n = round / 4 + 1;
            a += keys[n % 3];
            b += keys[(n + 1) % 3] + n;
        }
    }
    words[0] = a, words[1] = b;
}

/* A number from 0 up to, but not including, 1, as `mx.random.uniform` makes it of a word. */
static float uniform(uint32_t word) {
    float x = word / 4294967296.0f;
    return x < 1 ? x : 1 - 1.0f / (1 << 24);
}

/* Where the sum of the weights up to there first exceeds this share of the sum of all, or 0 if there is
   no such place, as with weights that are not numbers. A weight of 0 is never chosen. */
static int choose(const float *weights, int count, float share, double *total) {
    *total = 0;
    for (int i = 0; i < count; i++) *total += weights[i];
    double wanted = share * *total, seen = 0;
    for (int i = 0; i < count; i++)
        if ((seen += weights[i]) > wanted) return i;
    return 0;
}

/* Write e to the power of each logit less `top`; return the sum. */
static float weigh(const float *logits, int count, float top, float *weights) {
    float sum;
    for (int i = 0; i < count; i++) weights[i] = exp_of(logits[i] - top);
    SUM(sum, count, weights[i]);
    return sum;
}

/* `sums` has memory for a number for each block. */
static void draw(const float *logits, int size, const uint32_t key[2], float *sums, uint32_t *token,
                 float *logprob) {
    float top = largest(logits, size), weights[BLOCK];
    double total, of_block;
    uint32_t words[2];
    int blocks = (size + BLOCK - 1) / BLOCK;
    for (int b = 0; b < blocks; b++)
        sums[b] = weigh(logits + b * BLOCK, least(BLOCK, size - b * BLOCK), top, weights);
    random_words(key, words);
    int first = choose(sums, blocks, uniform(words[0]), &total) * BLOCK;
    int count = least(BLOCK, size - first);
    weigh(logits + first, count, top, weights);
    *token = first + choose(weights, count, uniform(words[1]), &of_block);
    *logprob = logits[*token] - top - log(total);
}

/* Of logits and keys: the bits of tokens, which are whole numbers, and their log-probabilities. The
   numbers are rows and the size of the vocabulary. */
FUNCTION(compiled_drawn_tokens) {
    int rows = numbers[0], size = numbers[1];
    const uint32_t *keys = (const uint32_t *)in[1];
#pragma omp parallel for num_threads(threads_for((double)rows * size >= SMALLEST_SHARED))
    for (int row = 0; row < rows; row++) {
        float *sums = scratch(size / BLOCK + 1);
        uint32_t token = 0;
        /* Without memory there is no result, and nobody shall take another number for it. */
        out[1][row] = NAN;
        if (sums) draw(in[0] + (long)row * size, size, keys + 2 * row, sums, &token, out[1] + row);
        memcpy(out[0] + row, &token, sizeof token);
    }
}
