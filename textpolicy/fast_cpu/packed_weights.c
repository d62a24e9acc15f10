/* y = x W' for a matrix x of few rows, where W is stored in 4 or 8 bits for each weight; and weights
   of 2 to 8 bits as float32 numbers.

   Of a product, the weights are read once, in the form in which memory holds them, and become
   numbers in the processor's registers. A word has the codes of 8 or 4 neighbouring inputs. A vector of
   words gives one vector of weights for each place in a word, so x is put in this order first.

   Each number of y is summed in an order that depends only on the number of inputs, so what a row
   gives does not depend on the rows beside it. */

#include "rows.h"

/* Codes may begin at any byte. */
typedef uint32_t Word __attribute__((aligned(1), may_alias));
typedef uint32_t Codes __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

/* A weight is a code times a scale plus a bias, or a level of NF4 times a scale. */
/* The words of a group share a scale and a bias. A vector of words has several groups; or it is one
   group; or one group has several vectors, or is all that an output has. */
typedef enum { SEVERAL, ONE, PART } Groups;

/* The codes of these formats lie in words. */
#define BITS(format) ((format) == AFFINE_8 ? 8 : 4)
#define PER_WORD(format) (32 / BITS(format))

/* At most as many rows of x meet a vector of weights at once as there are registers for their sums.
   OUTPUTS are those that share the rows of x while these are in the nearest cache. */
enum { TALLEST = LANES == 16 ? 8 : 6, OUTPUTS = 16 };
/* Memory answers while a processor reads about so many words; measurements say how many. */
enum { LATENCY = 768 };
/* The numbers in a line of the cache. */
enum { LINE = 16 };
/* With few rows, the weights of several outputs are read at once. */
#define AT_ONCE(rows) ((rows) <= TALLEST / 3 ? TILE : 2)

/* `groups` are those of an output, and `group` is how many words have the same scale and bias.

   A vector of words may reach beyond the words of its output. For the first `inside` outputs it
   still ends inside `codes`. The codes of the other outputs are copied to `rest`, with zeros behind
   them. Memory is asked for words that lie `ahead` of those that meet x. */
typedef struct {
    int rows, outputs, inputs, per_word, words, groups, group, inside, ahead, adds;
    const float *x;
    long x_step;
    const Word *codes, *rest;
    const float *scales, *biases;
    float *y;
    /* The bits that a turn reads of each word. They lie in memory because the compiler computes
       constants again for each vector of words, which takes longer than reading them. */
    Words masks[8];
    /* Byte n of each level of NF4, twice. */
    uint8_t bytes_of_levels[4][32] __attribute__((aligned(32)));
} Packed;

static const float LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* The numbers at these places of a vector. */
INLINE Vector pick(Vector from, Words places) {
#if defined(__AVX512F__)
    return (Vector)_mm512_permutexvar_ps((__m512i)places, (__m512)from);
#elif defined(__AVX2__)
    return (Vector)_mm256_permutevar8x32_ps((__m256)from, (__m256i)places);
#else
    Vector picked;
    UNROLL for (int lane = 0; lane < LANES; lane++) picked[lane] = from[places[lane] % LANES];
    return picked;
#endif
}

/* The codes of a vector of words are read in PER_WORD turns, which give LANES weights each, without
   the scales of their groups. */

/* With AVX-512, a number is looked up by the last four bits of a word: those before them do no harm.
   Otherwise an affine code stays where it is in the word, unless it is the last: x is divided by the
   power of 2 by which the code is too large there. */
static const float NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#define IS_LOOKED_UP(format) (LANES == 16 && (format) == AFFINE_4)

INLINE Vector affine_weights(const Format format, const int turn, Words words, const Packed *p) {
    if (IS_LOOKED_UP(format)) return pick(*(const Vector *)NUMBERS, words >> BITS(format) * turn);
    Words codes = words & p->masks[turn];
    if (turn == PER_WORD(format) - 1) codes = words >> BITS(format) * turn;
    return __builtin_convertvector((Integers)codes, Vector);
}

static float too_large(const Format format, int turn) {
    int stays = format != NF4 && !IS_LOOKED_UP(format) && turn < PER_WORD(format) - 1;
    return stays ? (float)(1 << BITS(format) * turn) : 1;
}

/* The first of two weights of NF4 is in the upper half of a byte. */
#if defined(__AVX2__) && LANES == 8
/* The processor looks bytes up. So the four bytes of each level come from a table each, for the codes
   of a quarter of the words at a time: first those in the lower halves of bytes. */
INLINE Vector nf4_weights(const int turn, Words words, const Packed *p) {
    __m256i codes = (__m256i)((turn < 4 ? words : words >> BITS(NF4)) & 0x0f0f0f0fu);
    __m256i bytes[4], pairs[2];
    UNROLL for (int n = 0; n < 4; n++)
        bytes[n] = _mm256_shuffle_epi8(*(const __m256i *)p->bytes_of_levels[n], codes);
    UNROLL for (int n = 0; n < 2; n++)
        pairs[n] = turn % 4 < 2 ? _mm256_unpacklo_epi8(bytes[2 * n], bytes[2 * n + 1])
                                : _mm256_unpackhi_epi8(bytes[2 * n], bytes[2 * n + 1]);
    return (Vector)(turn % 2 ? _mm256_unpackhi_epi16(pairs[0], pairs[1])
                             : _mm256_unpacklo_epi16(pairs[0], pairs[1]));
}

/* The word, and the place in it, of the code that a turn reads in a lane. */
static int word_of(const Format format, int turn, int lane) {
    return format == NF4 ? lane / 4 * 4 + turn % 4 : lane;
}
static int place_of(const Format format, int turn, int lane) {
    return format == NF4 ? lane % 4 * 2 + (turn < 4) : turn;
}
#else
INLINE Vector nf4_weights(const int turn, Words words, const Packed *p) {
    Words codes = words >> BITS(NF4) * turn;
#if LANES == 16
    return pick(*(const Vector *)LEVELS, codes);
#else
    Vector levels;
    UNROLL for (int lane = 0; lane < LANES; lane++) levels[lane] = LEVELS[codes[lane] & 15];
    return levels;
#endif
}

/* The word, and the place in it, of the code that a turn reads in a lane. */
static int word_of(const Format format, int turn, int lane) { return lane; }
static int place_of(const Format format, int turn, int lane) {
    return format == NF4 ? turn ^ 1 : turn;
}
#endif

/* The numbers from this address on that lie before `end`, and zeros. */
INLINE Vector read_floats(const float *from, const float *end) {
    const int count = least(end - from, LANES);
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#elif defined(__AVX2__)
    const Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    return (Vector)_mm256_maskload_ps(from, (__m256i)(lanes < count));
#else
    Vector numbers = {0};
    if (count == LANES) return *(const Vector *)from;
    memcpy(&numbers, from, sizeof(float) * count);
    return numbers;
#endif
}

/* The scale of each of LANES words. */
INLINE Vector scales_of(const Groups kind, const float *scales, const float *end, Words places) {
    /* To subtract zero changes no number, so the compiler only copies the scale to all lanes. */
    if (kind != SEVERAL) return *scales - (Vector){0};
    return pick(read_floats(scales, end), places);
}

INLINE const Word *codes_of(const Packed *p, long output) {
    if (output < p->inside) return p->codes + output * p->words;
    return p->rest + (output - p->inside) * p->words;
}

/* Add to `sums` the products of a vector of words of some outputs with rows of x. Words of the next
   output, which a vector may have too, meet zeros of x. */
INLINE void add_words(const Format format, const int rows, const int outputs, const Packed *p,
                      const float *x, const Word *const codes[TILE], int word,
                      const Vector scales[TILE], Vector sums[TALLEST][TILE]) {
    UNROLL for (int o = 0; o < outputs; o++) {
        Words words = *(const Codes *)(codes[o] + word);
        IN_REGISTER(words);
        Vector own[TALLEST];
        UNROLL for (int r = 0; r < rows; r++) own[r] = (Vector){0};
        UNROLL for (int turn = 0; turn < PER_WORD(format); turn++) {
            Vector weights = format == NF4 ? nf4_weights(turn, words, p)
                                           : affine_weights(format, turn, words, p);
            IN_REGISTER(weights);
            UNROLL for (int r = 0; r < rows; r++)
                own[r] = fused(*(const Vector *)(x + (turn * rows + r) * LANES), weights, own[r]);
        }
        UNROLL for (int r = 0; r < rows; r++) sums[r][o] = fused(own[r], scales[o], sums[r][o]);
    }
}

/* The same for one row and 4 bits. Each product waits for the sum before it, so the outputs take turns;
   a processor does not look far enough ahead to find other work by itself. */
INLINE void add_words_in_turns(const Packed *p, const float *x, const Word *const codes[TILE],
                               int word, const Vector scales[TILE], Vector sums[TALLEST][TILE]) {
    Words words[TILE];
    Vector own[TILE];
    UNROLL for (int o = 0; o < TILE; o++) {
        words[o] = *(const Codes *)(codes[o] + word);
        own[o] = (Vector){0};
    }
    UNROLL for (int turn = 0; turn < PER_WORD(AFFINE_4); turn++) {
        Vector numbers = *(const Vector *)(x + turn * LANES);
        UNROLL for (int o = 0; o < TILE; o++) {
            IN_REGISTER(words[o]);
            Vector weights = affine_weights(AFFINE_4, turn, words[o], p);
            ADD_PRODUCT(own[o], numbers, weights);
        }
    }
    UNROLL for (int o = 0; o < TILE; o++) sums[0][o] = fused(own[o], scales[o], sums[0][o]);
}

/* Add to `sums` the products of the biases of some outputs with the sums of x over each group. */
INLINE void add_biases(const int rows, const int outputs, const Packed *p, const float *x,
                       const long numbers[TILE], Vector sums[TALLEST][TILE]) {
    for (int group = 0; group < p->groups; group += LANES, x += rows * LANES)
        UNROLL for (int o = 0; o < outputs; o++) {
            const float *own = p->biases + numbers[o] * p->groups;
            Vector biases = read_floats(own + group, own + p->groups);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][o] = fused(*(const Vector *)(x + r * LANES), biases, sums[r][o]);
        }
}

/* Ask memory for the scales or biases of later outputs. */
INLINE void fetch_groups(const float *of, const Packed *p, int output, int outputs) {
    const float *from = of + ((long)output + p->ahead / p->words) * p->groups;
    for (int k = 0; k < outputs * p->groups; k += LINE) __builtin_prefetch(from + k);
}

/* `sums` of rows of x, which lie side by side, with the outputs from `output` on. */
INLINE void sum_outputs(const Format format, const Groups kind, const int rows, const int outputs,
                        const Packed *p, const float *x, int output, Words places,
                        Vector sums[TALLEST][TILE]) {
    Vector own[TALLEST][TILE];
    const Word *codes[TILE];
    const float *scales[TILE];
    long numbers[TILE];
    UNROLL for (int o = 0; o < outputs; o++) {
        numbers[o] = least(output + o, p->outputs - 1);
        codes[o] = codes_of(p, numbers[o]);
        scales[o] = p->scales + numbers[o] * p->groups;
        UNROLL for (int r = 0; r < rows; r++) own[r][o] = (Vector){0};
    }
    const int step = kind == PART ? p->group : LANES;
    const int groups = kind == SEVERAL ? LANES / p->group : 1;
    fetch_groups(p->scales, p, output, outputs);
    if (format != NF4) fetch_groups(p->biases, p, output, outputs);
    for (int first = 0, group = 0; first < p->words; first += step, group += groups) {
        Vector word_scales[TILE];
        UNROLL for (int o = 0; o < outputs; o++)
            word_scales[o] = scales_of(kind, scales[o] + group, scales[o] + p->groups, places);
        int word = first;
        do {
            /* Memory is slower than this loop unless it is asked for later outputs. */
            UNROLL for (int o = 0; o < outputs; o++) __builtin_prefetch(codes[o] + word + p->ahead);
            if (LANES < 16 && format == AFFINE_4 && rows == 1)
                add_words_in_turns(p, x, codes, word, word_scales, own);
            else
                add_words(format, rows, outputs, p, x, codes, word, word_scales, own);
            x += PER_WORD(format) * rows * LANES;
            word += LANES;
        } while (kind == PART && word < least(p->words, first + step));
    }
    if (format != NF4) add_biases(rows, outputs, p, x, numbers, own);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int o = 0; o < outputs; o++) sums[r][o] = own[r][o];
}

/* `rows` rows of y from row i on, for outputs from `first` to `last`. */
INLINE void tile(const Format format, const Groups kind, const int rows, const Packed *p,
                 const float *x, int i, int first, int last) {
    Words places;
    for (int lane = 0; lane < LANES; lane++) places[lane] = lane / p->group;
    for (int output = first; output < last; output += TILE) {
        Vector sums[TALLEST][TILE];
        for (int o = 0; o < TILE; o += AT_ONCE(rows)) {
            Vector some[TALLEST][TILE];
            sum_outputs(format, kind, rows, AT_ONCE(rows), p, x, output + o, places, some);
            for (int r = 0; r < rows; r++)
                for (int s = 0; s < AT_ONCE(rows); s++) sums[r][o + s] = some[r][s];
        }
        for (int r = 0; r < rows; r++) {
            Four total = sums_of(sums[r]);
            float *out = p->y + (long)(i + r) * p->outputs + output;
            const int count = least(TILE, p->outputs - output);
            if (p->adds)
                for (int o = 0; o < count; o++) total[o] += out[o];
            if (count == TILE)
                *(Four *)out = total;
            else
                for (int o = 0; o < count; o++) out[o] = total[o];
        }
    }
}

#define CASE(count)                                         \
    case count:                                             \
        tile(format, kind, count, p, x, i, first, last);    \
        break;

INLINE void any_tile(const Format format, const Groups kind, const Packed *p, const float *x, int i,
                     int rows, int first, int last) {
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if LANES == 16
        CASE(7) CASE(8)
#endif
    }
}

static int tiles_of(int rows) { return (rows + TALLEST - 1) / TALLEST; }

/* The rows of the tile with this number: all tiles have about the same height. */
static int height(int rows, int number) {
    return rows / tiles_of(rows) + (number < rows % tiles_of(rows));
}

static int whole_vectors(int count) { return (count + LANES - 1) / LANES * LANES; }

/* The numbers that are kept of a row of x: those of its words, and the sums of its groups. */
static long kept_of_row(const Packed *p) {
    return (long)p->per_word * whole_vectors(p->words) + whole_vectors(p->groups);
}

/* All rows of y, for outputs from `first` to `last`. */
INLINE void outputs_from(const Format format, const Groups kind, const Packed *p, const float *x,
                         int first, int last) {
    for (int output = first; output < last; output += OUTPUTS)
        for (int t = 0, i = 0; t < tiles_of(p->rows); i += height(p->rows, t++))
            any_tile(format, kind, p, x + i * kept_of_row(p), i, height(p->rows, t), output,
                     least(last, output + OUTPUTS));
}

/* Write the sum of each group of `rows` rows of x, LANES groups of a row side by side. */
static void add_groups(const Packed *p, const float *x, int rows, float *to) {
    const int size = p->group * p->per_word;
    for (int group = 0; group < p->groups; group++) {
        float *out = to + (long)(group / LANES) * rows * LANES + group % LANES;
        for (int r = 0; r < rows; r++) {
            const float *own = x + r * p->x_step + group * size;
            SUM(out[r * LANES], size, own[i]);
        }
    }
}

/* Write the numbers of a row of x that meet a vector of words in one turn. */
INLINE void arrange_turn(const Format format, const Packed *p, const float *x, int first, int turn,
                         float *to) {
    const float factor = 1 / too_large(format, turn);
    const int inside = p->words - first;
    for (int lane = 0; lane < LANES; lane++) {
        int word = word_of(format, turn, lane);
        if (inside >= LANES || word < inside)
            to[lane] = x[(long)(first + word) * PER_WORD(format) + place_of(format, turn, lane)] * factor;
    }
}

/* Write x in the order in which it is read: of a tile, the numbers of the first turn of a vector of
   words, one row beside the other, then those of the next turn, and last the sums of the groups. */
INLINE void arrange(const Format format, const Packed *p, float *to) {
    memset(to, 0, sizeof(float) * p->rows * kept_of_row(p));
    for (int t = 0, i = 0, rows; t < tiles_of(p->rows); t++, i += rows) {
        rows = height(p->rows, t);
        const float *x = p->x + i * p->x_step;
        for (int first = 0; first < p->words; first += LANES)
            UNROLL for (int turn = 0; turn < PER_WORD(format); turn++)
                for (int r = 0; r < rows; r++, to += LANES)
                    arrange_turn(format, p, x + r * p->x_step, first, turn, to);
        if (format != NF4) add_groups(p, x, rows, to);
        to += rows * whole_vectors(p->groups);
    }
}

/* Copy the codes of the last outputs, where a vector of words would end beyond all codes. */
static void copy_rest(Packed *p, float *to) {
    int beyond = whole_vectors(p->words) - p->words;
    int others = least(p->outputs, (beyond + p->words - 1) / p->words);
    p->inside = p->outputs - others;
    memcpy(to, p->codes + (long)p->inside * p->words, sizeof(Word) * others * p->words);
    p->rest = (const Word *)to;
    memset(to + others * p->words, 0, sizeof(Word) * LANES);
}

typedef void Share(const Packed *p, const float *x, int first, int last);

/* The compiler makes a loop without any branch for each format and each kind of groups. */
#define SHARE(name, format, kind)                                              \
    static void name(const Packed *p, const float *x, int first, int last) {   \
        outputs_from(format, kind, p, x, first, last);                         \
    }
#define SHARES_OF(name, format)            \
    SHARE(name##_several, format, SEVERAL) \
    SHARE(name##_one, format, ONE)         \
    SHARE(name##_part, format, PART)

SHARES_OF(affine_4, AFFINE_4)
SHARES_OF(affine_8, AFFINE_8)
SHARES_OF(nf4, NF4)
static Share *const SHARES[][3] = {
    [AFFINE_4] = {affine_4_several, affine_4_one, affine_4_part},
    [AFFINE_8] = {affine_8_several, affine_8_one, affine_8_part},
    [NF4] = {nf4_several, nf4_one, nf4_part},
};

INLINE int multiply(const Format format, const Linear *l, int rows, const float *given, long x_step,
                    float *y, int adds) {
    Packed p = {.rows = rows, .outputs = l->outputs, .inputs = l->inputs, .groups = l->groups,
                .x = given, .x_step = x_step, .codes = (const Word *)l->weights,
                .scales = l->scales, .biases = l->biases, .y = y, .adds = adds,
                .per_word = PER_WORD(format)};
    p.words = p.inputs / p.per_word;
    p.group = p.words / p.groups;
    /* Those of the next outputs, or as far ahead as memory takes to answer. */
    p.ahead = TILE * p.words * (1 + LATENCY / (TILE * p.words));
    for (int n = 0; n < 4; n++)
        for (int level = 0; level < 32; level++)
            p.bytes_of_levels[n][level] = ((const uint8_t *)&LEVELS[level % 16])[n];
    for (int turn = 0; turn < p.per_word; turn++)
        p.masks[turn] = (Words){0} + (((1u << BITS(format)) - 1) << BITS(format) * turn);
    /* The copied codes are less than a vector and the words of an output. */
    long kept = p.rows * kept_of_row(&p);
    float *x = scratch(kept + p.words + 2 * LANES);
    if (!x) return 0;
    arrange(format, &p, x);
    copy_rest(&p, x + kept);
    Groups kind = p.group == LANES ? ONE : p.group > LANES || p.groups == 1 ? PART : SEVERAL;
    Share *compute = SHARES[format][kind];
    int threads = threads_for((double)p.rows * p.outputs * p.inputs >= SMALLEST_SHARED);
    int share = ((p.outputs + threads - 1) / threads + OUTPUTS - 1) / OUTPUTS * OUTPUTS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int part = 0; part < threads; part++)
        compute(&p, x, least(p.outputs, part * share), least(p.outputs, (part + 1) * share));
    return 1;
}

int packed_product(const Linear *l, int rows, const float *x, long x_step, float *y, int adds) {
    switch (l->format) {
        case AFFINE_4: return multiply(AFFINE_4, l, rows, x, x_step, y, adds);
        case AFFINE_8: return multiply(AFFINE_8, l, rows, x, x_step, y, adds);
        default: return multiply(NF4, l, rows, x, x_step, y, adds);
    }
}

/* Of x, codes, scales, and biases if the format has some: the product. The numbers are those of the rows
   of x, of the outputs, of the inputs, and of an output's groups, and the format. */
FUNCTION(compiled_packed_product) {
    Linear l = {.outputs = numbers[1], .inputs = numbers[2], .groups = numbers[3],
                .format = numbers[4], .weights = in[1], .scales = in[2]};
    if (l.format != NF4) l.biases = in[3];
    if (!packed_product(&l, numbers[0], in[0], l.inputs, out[0], 0))
        /* Without memory for x there is no product. */
        fill(out[0], numbers[0] * l.outputs, NAN);
}

typedef uint32_t EightWords __attribute__((vector_size(32)));
typedef int32_t EightIntegers __attribute__((vector_size(32)));
enum { TOGETHER = 8 };

/* Eight affine codes of at most 8 bits, which lie side by side. */
INLINE EightWords neighbouring_codes(const int bits, const uint8_t *from) {
    uint64_t all = 0;
    UNROLL for (int byte = 0; byte < bits; byte++) all |= (uint64_t)from[byte] << 8 * byte;
    const uint32_t a = all, b = all >> 4 * bits;
    const EightWords words = {a, a, a, a, b, b, b, b}, places = {0, 1, 2, 3, 0, 1, 2, 3};
    return words >> places * (uint32_t)bits & ((1u << bits) - 1);
}

/* Write the weights of 8 neighbouring inputs. */
INLINE void unpack_eight(const int is_nf4, const int bits, const uint8_t *from, float scale,
                         float bias, float *to) {
    const EightWords upper_first = {4, 0, 12, 8, 20, 16, 28, 24};
    EightWords codes;
    if (is_nf4)
        codes = ((EightWords){0} + *(const Word *)from) >> upper_first & 15;
    else
        codes = neighbouring_codes(bits, from);
    Eight weights = __builtin_convertvector((EightIntegers)codes, Eight) * scale + bias;
    if (is_nf4)
        for (int n = 0; n < TOGETHER; n++) weights[n] = LEVELS[codes[n]] * scale;
    *(Eight *)to = weights;
}

/* Write the weights of `size` inputs, which share a scale. */
typedef void Unpack(const uint8_t *from, float scale, float bias, long size, float *to);

/* `numbers` are those of the outputs, of the inputs, and of an output's groups. */
static void unpack(Unpack *one_group, int bits, const float *const *in, const float *biases,
                   float *out, const int64_t *numbers) {
    const long groups = numbers[0] * numbers[2], size = numbers[1] / numbers[2];
#pragma omp parallel for num_threads(threads_for(numbers[0] * numbers[1] >= SMALLEST_SHARED))
    for (long group = 0; group < groups; group++)
        one_group((const uint8_t *)in[0] + group * size * bits / 8, in[1][group],
                  biases ? biases[group] : 0, size, out + group * size);
}

/* The compiler makes a loop without any branch for each format. */
#define UNPACK(name, is_nf4, bits)                                                              \
    static void name(const uint8_t *from, float scale, float bias, long size, float *to) {      \
        for (long k = 0; k < size; k += TOGETHER, from += bits)                                 \
            unpack_eight(is_nf4, bits, from, scale, bias, to + k);                              \
    }                                                                                           \
    FUNCTION(compiled_unpack_##name) {                                                          \
        unpack(name, bits, in, is_nf4 ? NULL : in[2], out[0], numbers);                         \
    }

UNPACK(affine_2, 0, 2)
UNPACK(affine_3, 0, 3)
UNPACK(affine_4, 0, 4)
UNPACK(affine_5, 0, 5)
UNPACK(affine_6, 0, 6)
UNPACK(affine_8, 0, 8)
UNPACK(nf4_4, 1, 4)
