/* Log-probabilities of tokens under softmax(logits / temperature), in one reading of the logits. */

#include "rows.h"

/* So many numbers of a row are added up in float32, and these sums in float64. */
enum { SUMMED = 4096 };

/* In these functions a row's slope is (onehot(token) - p) / temperature: that of the log-probability by
   the logits. Write it to `slope`, which may be the row itself, unless it is NULL. */
static void read_row(const float *logits, int64_t width, float temperature, int32_t token,
                     float *logp, float *entropy, float *slope) {
    float top = largest(logits, width), sharpness = 1 / temperature, part, scaled[SUMMED], e[SUMMED];
    double total = 0, weighted = 0;
    int is_known = token >= 0 && token < width;
    float chosen = is_known ? (logits[token] - top) * sharpness : NAN;
    for (int64_t start = 0; start < width; start += SUMMED) {
        int64_t size = width - start < SUMMED ? width - start : SUMMED;
        for (int64_t i = 0; i < size; i++) {
            scaled[i] = (logits[start + i] - top) * sharpness;
            e[i] = exp_of(scaled[i]);
        }
        SUM(part, size, e[i]);
        total += part;
        /* Of an infinite logit, the product is 0 too. */
        SUM(part, size, e[i] == 0 ? 0 : e[i] * scaled[i]);
        weighted += part;
        if (slope) memcpy(slope + start, e, sizeof(float) * size);
    }
    *logp = chosen - log(total);
    *entropy = log(total) - weighted / total;
    if (!slope) return;
    float factor = -sharpness / total;
    for (int64_t i = 0; i < width; i++) slope[i] *= factor;
    if (is_known) slope[token] += sharpness;
}

#define THREADS(size) num_threads(threads_for((size) >= SMALLEST_SHARED))

/* Of logits, temperatures and tokens: log-probabilities and entropies. The numbers are rows and the size
   of the vocabulary. */
FUNCTION(compiled_logprobs_of_logits) {
    int64_t width = numbers[1];
    const int32_t *tokens = (const int32_t *)in[2];
#pragma omp parallel for THREADS(numbers[0] * width)
    for (int64_t row = 0; row < numbers[0]; row++)
        read_row(in[0] + row * width, width, in[1][row], tokens[row], out[0] + row, out[1] + row, NULL);
}

/* Of hidden states, the matrix of an output head, temperatures and tokens: log-probabilities, entropies,
   perhaps slopes by the hidden states, and last some memory, for the logits of a chunk of rows. The
   numbers are rows, the width of a hidden state, the size of the vocabulary, the rows of a chunk, and
   whether there are slopes. */
FUNCTION(compiled_logprobs_of_hidden) {
    int64_t rows = numbers[0], inner = numbers[1], width = numbers[2], most = numbers[3];
    int has_slopes = numbers[4];
    const int32_t *tokens = (const int32_t *)in[3];
    float *logits = out[2 + has_slopes];
    for (int64_t start = 0; start < rows; start += most) {
        int64_t some = rows - start < most ? rows - start : most;
        const float *hidden = in[0] + start * inner;
        few_rows_product(ROW_MAJOR, AS_STORED, TRANSPOSED, some, width, inner, 1, hidden, inner, in[1],
                         inner, 0, logits, width);
#pragma omp parallel for THREADS(some * width)
        for (int64_t row = 0; row < some; row++) {
            int64_t at = start + row;
            float *own = logits + row * width;
            read_row(own, width, in[2][at], tokens[at], out[0] + at, out[1] + at,
                     has_slopes ? own : NULL);
        }
        if (has_slopes)
            few_rows_product(ROW_MAJOR, AS_STORED, AS_STORED, some, inner, width, 1, logits, width,
                             in[1], inner, 0, out[2] + start * inner, inner);
    }
}
