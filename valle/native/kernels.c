/* Training in bfloat16 and generation, for x86 processors with AVX-512 and its bfloat16 products (AMD Zen 4 and later).
 *
 * Compiled at first use by valle/native/building.py, called through ctypes from valle/native/__init__.py (training) and
 * valle/native/generation.py.
 *
 * A product C = A B keeps a tile of ROWS x COLUMNS sums in registers and walks along K two steps at a time, since
 * the instruction (vdpbf16ps) adds the products of two neighbours. B lies in panels: for each pair of steps the 64
 * columns' pairs, 256 bytes in a row. Loops and blocks are those of Goto and van de Geijn, "Anatomy of
 * high-performance matrix multiplication" (ACM TOMS 34, 2008): a block of A stays in the second cache, a group of
 * B's panels in the third. Every sum is taken in one order, whatever the number of threads.
 */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { ROWS = 6, COLUMNS = 64 };
enum { BLOCK_BYTES = 400 << 10, GROUP_BYTES = 2 << 20 };

typedef uint16_t bf16;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
INLINE __m512i bits(__m512bh x) { return (__m512i)x; }

INLINE __mmask16 up_to(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1 << count) - 1); }

/* ---- memory that stays: one buffer for each thread and use ---- */

enum { FOR_B, FOR_A, FOR_ATTENTION, USES };

static _Thread_local struct { void *at; size_t size; } kept[USES];

static void *room(int use, size_t size) {
    if (kept[use].size < size) {
        free(kept[use].at);
        size = (size + (1 << 16)) & ~(size_t)63;
        kept[use].at = aligned_alloc(64, size);
        kept[use].size = kept[use].at ? size : 0;
    }
    return kept[use].at;
}

/* ---- B into panels ---- */

/* 32 numbers from `at`, those from `count` on as zeros. */
INLINE __m512i load32(const void *at, int is_float, int64_t offset, int64_t count) {
    if (count >= 32) {
        if (!is_float) return _mm512_loadu_si512((const bf16 *)at + offset);
        const float *x = (const float *)at + offset;
        return bits(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x)));
    }
    if (count <= 0) return _mm512_setzero_si512();
    uint32_t mask = (uint32_t)((1ull << count) - 1);
    if (!is_float) return _mm512_maskz_loadu_epi16(mask, (const bf16 *)at + offset);
    const float *x = (const float *)at + offset;
    __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, x);
    __m512 high = mask >> 16 ? _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), x + 16) : _mm512_setzero_ps();
    return bits(_mm512_cvtne2ps_pbh(high, low));
}

/* 16 vectors of 16 32-bit numbers, transposed. */
INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* A panel from rows of B's columns, (N, K): what a layer's weights are to its output. */
INLINE void pack_columns(const void *b, int is_float, int64_t ldb, int64_t columns, int64_t k, uint32_t *panel) {
    for (int part = 0; part < COLUMNS; part += 16)
        for (int64_t at = 0; at < k; at += 32) {
            int64_t pairs = smaller(16, (k - at + 1) / 2);
            __m512i r[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                r[i] = part + i < columns ? load32(b, is_float, (part + i) * ldb + at, k - at) : _mm512_setzero_si512();
            transpose16(r);
            uint32_t *to = panel + at / 2 * COLUMNS + part;
            if (pairs == 16)
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * COLUMNS, r[i]);
            else
                for (int i = 0; i < pairs; i++) _mm512_store_si512(to + i * COLUMNS, r[i]);
        }
}

/* Where two rows' numbers stand as pairs: the first 16, the last 16. */
#define LOW_PAIRS                                                                                                      \
    _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, \
                     34, 2, 33, 1, 32, 0)
#define HIGH_PAIRS _mm512_add_epi16(LOW_PAIRS, _mm512_set1_epi16(16))

/* A panel from rows of B itself, (K, N). */
INLINE void pack_rows(const void *b, int is_float, int64_t ldb, int64_t columns, int64_t k, uint32_t *panel) {
    for (int64_t at = 0; at < k; at += 2, panel += COLUMNS)
        for (int part = 0; part < COLUMNS; part += 32) {
            __m512i one = load32(b, is_float, at * ldb + part, columns - part);
            __m512i two = at + 1 < k ? load32(b, is_float, (at + 1) * ldb + part, columns - part)
                                     : _mm512_setzero_si512();
            _mm512_store_si512(panel + part, _mm512_permutex2var_epi16(one, LOW_PAIRS, two));
            _mm512_store_si512(panel + part + 16, _mm512_permutex2var_epi16(one, HIGH_PAIRS, two));
        }
}

/* ---- A, transposed ---- */

/* Columns of A, (K, M), from `a` on, as rows of `stride` pairs: K padded to a multiple of 32. Into sums, if any, padded to
 * a multiple of 32 too, go theirs. */
static void pack_transposed(const bf16 *a, int64_t lda, int64_t columns, int64_t k, uint32_t *to, int64_t stride,
                            float *sums) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    for (int64_t at = 0; at < k; at += 32)
        for (int64_t column = 0; column < columns; column += 32) {
            __m512i low[16], high[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                int64_t row = at + 2 * i;
                const bf16 *from = a + row * lda + column;
                __m512i one = row < k ? load32(from, 0, 0, columns - column) : _mm512_setzero_si512();
                __m512i two = row + 1 < k ? load32(from + lda, 0, 0, columns - column) : _mm512_setzero_si512();
                low[i] = _mm512_permutex2var_epi16(one, LOW_PAIRS, two);
                high[i] = _mm512_permutex2var_epi16(one, HIGH_PAIRS, two);
            }
            for (int part = 0; sums && part < 32; part += 16) {
                __m512 one = at ? _mm512_loadu_ps(sums + column + part) : _mm512_setzero_ps(), two = _mm512_setzero_ps();
                for (int i = 0; i < 16; i++) {
                    __m512i pair = part ? high[i] : low[i];
                    one = _mm512_add_ps(one, (__m512)_mm512_slli_epi32(pair, 16));
                    two = _mm512_add_ps(two, (__m512)_mm512_and_si512(pair, upper));
                }
                _mm512_storeu_ps(sums + column + part, _mm512_add_ps(one, two));
            }
            transpose16(low);
            transpose16(high);
            uint32_t *rows = to + column * stride + at / 2;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(rows + i * stride, low[i]);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(rows + (16 + i) * stride, high[i]);
        }
}

/* ---- products ---- */

typedef struct {
    void *c;
    int64_t ldc;
    int is_float;
    const float *bias;
    int adds; /* to what is there, in float */
} Result;

INLINE void store(__m512 x, Result to, int64_t row, int64_t column, __mmask16 mask) {
    if (to.bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, to.bias + column));
    int64_t at = row * to.ldc + column;
    if (to.adds) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, (const float *)to.c + at));
    if (to.is_float)
        _mm512_mask_storeu_ps((float *)to.c + at, mask, x);
    else
        _mm256_mask_storeu_epi16((bf16 *)to.c + at, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

/* `rows` <= ROWS rows of C in one panel's columns. A's pairs lie `step` bytes apart along K and `stride` between rows. */
INLINE void tile(int rows, const char *a, int64_t stride, int64_t step, const uint32_t *b, int64_t pairs, Result to,
                 int64_t row, int64_t first, int64_t columns) {
    __m512 sums[ROWS][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[i][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, b += COLUMNS, a += step) {
        __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + 16);
        __m512bh b2 = (__m512bh)_mm512_load_si512(b + 32), b3 = (__m512bh)_mm512_load_si512(b + 48);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            int32_t pair;
            memcpy(&pair, a + i * stride, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, b0);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, b1);
            sums[i][2] = _mm512_dpbf16_ps(sums[i][2], x, b2);
            sums[i][3] = _mm512_dpbf16_ps(sums[i][3], x, b3);
        }
    }
    int64_t left = columns - first;
    if (left >= COLUMNS) {
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) store(sums[i][j], to, row + i, first + 16 * j, 0xffff);
        return;
    }
    uint64_t mask = (1ull << left) - 1;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) store(sums[i][j], to, row + i, first + 16 * j, (__mmask16)(mask >> 16 * j));
}

#define EACH_SIZE(rows, ...)                   \
    switch (rows) {                            \
        case 6: tile(6, __VA_ARGS__); break;   \
        case 5: tile(5, __VA_ARGS__); break;   \
        case 4: tile(4, __VA_ARGS__); break;   \
        case 3: tile(3, __VA_ARGS__); break;   \
        case 2: tile(2, __VA_ARGS__); break;   \
        default: tile(1, __VA_ARGS__);         \
    }

/* C (M, N) = A (M, K) B + bias. A is bfloat16, K even; B is (N, K), or with `by_rows` (K, N), bfloat16 or float. */
int valle_product(const bf16 *a, int64_t lda, const void *b, int64_t ldb, int b_is_float, int by_rows,
                  const float *bias, void *c, int64_t ldc, int c_is_float, int64_t m, int64_t n, int64_t k,
                  int threads) {
    int64_t pairs = parts(k, 2), panels = parts(n, COLUMNS), size = pairs * COLUMNS;
    int64_t group = larger(1, smaller(GROUP_BYTES / (size * 4), parts(panels, threads)));
    int64_t block = larger(1, BLOCK_BYTES / (k * 2) / ROWS) * ROWS;
    Result to = {c, ldc, c_is_float, bias, 0};
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : failed)
    for (int64_t first = 0; first < panels; first += group) {
        int64_t last = smaller(first + group, panels);
        uint32_t *packed = room(FOR_B, size * 4 * group);
        if (!packed) {
            failed = 1;
            continue;
        }
        for (int64_t p = first; p < last; p++) {
            int64_t column = p * COLUMNS, columns = smaller(COLUMNS, n - column);
            const char *from = (const char *)b + (b_is_float ? 4 : 2) * (by_rows ? column : column * ldb);
            uint32_t *panel = packed + (p - first) * size;
            if (by_rows)
                b_is_float ? pack_rows(from, 1, ldb, columns, k, panel) : pack_rows(from, 0, ldb, columns, k, panel);
            else
                b_is_float ? pack_columns(from, 1, ldb, columns, k, panel)
                           : pack_columns(from, 0, ldb, columns, k, panel);
        }
        for (int64_t above = 0; above < m; above += block)
            for (int64_t p = first; p < last; p++)
                for (int64_t row = above; row < smaller(above + block, m); row += ROWS)
                    EACH_SIZE(m - row < ROWS ? m - row : ROWS, (const char *)(a + row * lda), lda * 2, 4,
                              packed + (p - first) * size, pairs, to, row, p * COLUMNS, n)
    }
    return failed;
}

/* C (M, N) = Aᵀ B for A (K, M) and B (K, N), bfloat16; into sums (M), if any, those of A's columns. */
int valle_product_of_columns(const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, void *c, int64_t ldc,
                             int c_is_float, float *sums, int64_t m, int64_t n, int64_t k, int threads) {
    int64_t pairs = parts(k, 2), panels = parts(n, COLUMNS), size = pairs * COLUMNS;
    int64_t stride = (parts(k, 32) | 1) * 16; /* an odd number of cache lines: rows do not fall on each other */
    int64_t block = larger(1, BLOCK_BYTES / (k * 2) / 96) * 96;
    block = smaller(block, parts(parts(m, threads), 96) * 96);
    uint32_t *packed = room(FOR_B, size * 4 * panels);
    if (!packed) return 1;
    Result to = {c, ldc, c_is_float, NULL, 0};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++)
            pack_rows(b + p * COLUMNS, 0, ldb, smaller(COLUMNS, n - p * COLUMNS), k, packed + p * size);
        uint32_t *turned = room(FOR_A, block * (stride + 1) * 4);
        failed |= !turned;
#pragma omp for schedule(static)
        for (int64_t above = 0; above < m; above += block) {
            if (!turned) continue;
            int64_t rows = smaller(block, m - above);
            float *mine = sums ? (float *)(turned + block * stride) : NULL;
            pack_transposed(a + above, lda, rows, k, turned, stride, mine);
            if (sums) memcpy(sums + above, mine, rows * sizeof(float));
            for (int64_t p = 0; p < panels; p++)
                for (int64_t row = 0; row < rows; row += ROWS)
                    EACH_SIZE(rows - row < ROWS ? rows - row : ROWS, (const char *)(turned + row * stride),
                              stride * 4, 4, packed + p * size, pairs, to, above + row, p * COLUMNS, n)
        }
    }
    return failed;
}

/* ---- element by element ---- */

/* e^x within 2e-7 of it: 2 to the whole part by the exponent, to the rest by its Taylor polynomial. */
INLINE __m512 exponential(__m512 x) {
    /* The second of max and min is what comes out where one is not a number. */
    __m512 y = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-120), x), _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(y, whole);
    __m512 sum = _mm512_set1_ps(1.54035304e-4f);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.33335581e-3f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(9.61812911e-3f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(5.55041087e-2f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(2.40226507e-1f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(6.93147181e-1f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(sum, whole);
}

/* Of the normal distribution, up to x: by erf, Abramowitz and Stegun, formula 7.1.26; e = exp(-x^2 / 2). */
INLINE __m512 normal_below(__m512 x, __m512 e) {
    __m512 size = _mm512_min_ps(_mm512_set1_ps(1000), _mm512_abs_ps(x));
    __m512 below = _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f * 0.70710678f), _mm512_set1_ps(1));
    __m512 t = _mm512_rcp14_ps(below); /* 1 / below, with one step of Newton's */
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(below, t, _mm512_set1_ps(2)));
    __m512 sum = _mm512_set1_ps(0.5f * 1.061405429f);
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.5f * -1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.5f * 1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.5f * -0.284496736f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.5f * 0.254829592f));
    __m512 above = _mm512_mul_ps(_mm512_mul_ps(sum, t), e); /* beyond |x| */
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(1), above), negative, above);
}

INLINE __m512i mixed(__m512i x) { /* Wellons' lowbias32 */
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32((int)0x846ca68b));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

/* Which of 64 neighbours dropout keeps: those whose byte, drawn from seed and place, is not below `level`. */
INLINE uint64_t kept_of_64(uint64_t seed, uint32_t place, int level) {
    if (!level) return ~0ull;
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i x = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(place * 16 + (uint32_t)seed)));
    x = mixed(_mm512_xor_si512(mixed(x), _mm512_set1_epi32((int)(seed >> 32))));
    return _mm512_cmpge_epu8_mask(x, _mm512_set1_epi8((char)level));
}

INLINE __m512 widened(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

INLINE __m512 load16(const void *at, int is_float, int64_t offset, __mmask16 mask) {
    if (mask == 0xffff)
        return is_float ? _mm512_loadu_ps((const float *)at + offset)
                        : widened(_mm256_loadu_si256((const __m256i *)((const bf16 *)at + offset)));
    if (is_float) return _mm512_maskz_loadu_ps(mask, (const float *)at + offset);
    return widened(_mm256_maskz_loadu_epi16(mask, (const bf16 *)at + offset));
}

INLINE void store16(__m512 x, void *at, int is_float, int64_t offset, __mmask16 mask) {
    if (is_float)
        _mm512_mask_storeu_ps((float *)at + offset, mask, x);
    else
        _mm256_mask_storeu_epi16((bf16 *)at + offset, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

enum { PLAIN, RELU, GELU };

INLINE void drop16(int kind, int backward, const void *x, int x_is_float, const void *other, int other_is_float,
                   void *out, int out_is_float, int64_t at, __mmask16 inside, __mmask16 keep, int level) {
    __m512 value = load16(x, x_is_float, at, inside);
    __m512 result = _mm512_maskz_mul_ps(keep, value, _mm512_set1_ps(256.0f / (256 - level)));
    if (kind == PLAIN && other)
        result = _mm512_add_ps(result, load16(other, other_is_float, at, inside));
    else if (kind != PLAIN) { /* forward: x is what comes in; backward: the gradient, other is what came in */
        __m512 in = backward ? load16(other, other_is_float, at, inside) : value;
        __m512 slope;
        if (kind == RELU)
            slope =
                _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(in, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(1));
        else {
            __m512 e = exponential(_mm512_mul_ps(_mm512_mul_ps(in, in), _mm512_set1_ps(-0.5f)));
            slope = normal_below(in, e);
            if (backward) slope = _mm512_fmadd_ps(_mm512_mul_ps(in, e), _mm512_set1_ps(0.39894228f), slope);
        }
        result = _mm512_mul_ps(result, slope);
    }
    store16(result, out, out_is_float, at, inside);
}

INLINE void dropped(int kind, int backward, const void *x, int x_is_float, const void *other, int other_is_float,
                    void *out, int out_is_float, int64_t n, int level, uint64_t seed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n; first += 64) {
        uint64_t keep = kept_of_64(seed, (uint32_t)(first / 64), level);
        if (n - first >= 64) {
#pragma GCC unroll 4
            for (int part = 0; part < 64; part += 16)
                drop16(kind, backward, x, x_is_float, other, other_is_float, out, out_is_float, first + part, 0xffff,
                       (__mmask16)(keep >> part), level);
        } else {
            uint64_t inside = (1ull << (n - first)) - 1;
            for (int part = 0; part < 64; part += 16)
                drop16(kind, backward, x, x_is_float, other, other_is_float, out, out_is_float, first + part,
                       (__mmask16)(inside >> part), (__mmask16)(keep >> part), level);
        }
    }
}

/* out = dropout(x) + other. */
void valle_drop(const void *x, int x_is_float, const void *other, int other_is_float, void *out, int out_is_float,
                int64_t n, int level, uint64_t seed, int threads) {
    dropped(PLAIN, 0, x, x_is_float, other, other_is_float, out, out_is_float, n, level, seed, threads);
}

/* out = dropout(f(x)) in bfloat16, f ReLU or GELU; with `into`, what came in: the gradient there from x, that behind. */
void valle_activate(int kind, const bf16 *x, const bf16 *into, bf16 *out, int64_t n, int level, uint64_t seed,
                    int threads) {
    if (kind == GELU && into)
        dropped(GELU, 1, x, 0, into, 0, out, 0, n, level, seed, threads);
    else if (kind == GELU)
        dropped(GELU, 0, x, 0, NULL, 0, out, 0, n, level, seed, threads);
    else if (into)
        dropped(RELU, 1, x, 0, into, 0, out, 0, n, level, seed, threads);
    else
        dropped(RELU, 0, x, 0, NULL, 0, out, 0, n, level, seed, threads);
}

/* ---- attention ---- */

/* Rows and heads of a packed batch: qkv is (N, 3, heads, size), row r the frames starts[r] … + lens[r] - 1. Its first
 * prompts[r] frames see one another, each frame behind them all up to itself. Queries go by blocks of QUERIES; a block's
 * scores, (QUERIES, keys), lie in the second cache and are not kept: backward computes them again (Dao et al.,
 * "FlashAttention", arXiv 2205.14135, section 3.1). */
typedef struct {
    const bf16 *qkv;
    const float *cosine, *sine; /* (N, size), or none */
    const int64_t *starts, *prompts, *lens;
    int64_t rows, heads, size;
    float scale;
    int level;
    uint64_t seed;
} Attention;

enum { QUERIES = 48 };

/* A frame's query or key, `size` numbers, turned by its angles (the other way: direction -1), times scale. */
INLINE void turn(const void *from, int is_float, const Attention *a, int64_t frame, float direction, float scale,
                 bf16 *to) {
    int64_t half = a->size / 2;
    for (int64_t i = 0; i < half; i += 16) {
        __mmask16 mask = up_to(half - i);
        __m512 one = _mm512_mul_ps(load16(from, is_float, i, mask), _mm512_set1_ps(scale));
        __m512 two = _mm512_mul_ps(load16(from, is_float, half + i, mask), _mm512_set1_ps(scale));
        if (a->cosine) {
            __m512 c = load16(a->cosine + frame * a->size, 1, i, mask);
            __m512 s = _mm512_mul_ps(load16(a->sine + frame * a->size, 1, i, mask), _mm512_set1_ps(direction));
            __m512 turned = _mm512_fmsub_ps(one, c, _mm512_mul_ps(two, s));
            two = _mm512_fmadd_ps(two, c, _mm512_mul_ps(one, s));
            one = turned;
        }
        store16(one, to, 0, i, mask);
        store16(two, to, 0, half + i, mask);
    }
}

/* Everything that a task holds, cut from one piece of memory. */
typedef struct {
    int64_t start, prompt, length, wide, pairs; /* wide: length padded to a panel; pairs: of a head's numbers */
    uint64_t seed;
    bf16 *query, *key, *used, *slope;                              /* (length, size) twice, (QUERIES, across) twice */
    uint32_t *key_columns, *value_columns, *key_rows, *value_rows; /* panels */
    uint32_t *query_rows, *gradient_rows, *turned;                 /* of a block; its weights or slopes, transposed */
    float *scores, *above, *to_key, *to_value, *to_query;
} Task;

static char *cut(char *at, void *to, int64_t bytes) {
    memcpy(to, &at, sizeof at);
    return at + (bytes + 63) / 64 * 64;
}

static char *lay_out(Task *t, int64_t size, int backward, char *at) {
    int64_t panels = parts(size, COLUMNS), wide = t->wide;
    at = cut(at, &t->query, t->length * size * 2);
    at = cut(at, &t->key, t->length * size * 2);
    int64_t across = backward ? COLUMNS : wide;
    at = cut(at, &t->used, QUERIES * across * 2);
    at = cut(at, &t->scores, QUERIES * across * 4);
    at = cut(at, &t->key_columns, wide * t->pairs * 4);
    if (!backward) return cut(at, &t->value_rows, wide / 2 * COLUMNS * 4 * panels);
    at = cut(at, &t->slope, QUERIES * COLUMNS * 2);
    at = cut(at, &t->above, QUERIES * COLUMNS * 4);
    at = cut(at, &t->value_columns, wide * t->pairs * 4);
    at = cut(at, &t->key_rows, wide / 2 * COLUMNS * 4 * panels);
    at = cut(at, &t->turned, COLUMNS * (parts(QUERIES, 32) * 16 + 16) * 4);
    at = cut(at, &t->query_rows, QUERIES / 2 * COLUMNS * 4 * panels);
    at = cut(at, &t->gradient_rows, QUERIES / 2 * COLUMNS * 4 * panels);
    at = cut(at, &t->to_query, QUERIES * size * 4);
    at = cut(at, &t->to_key, wide * size * 4);
    return cut(at, &t->to_value, wide * size * 4);
}

/* C (m, n) = A B for a row-major A and panels of B, each `size` numbers of 32 bits; into bfloat16, into floats, or added
 * to floats. */
#define MULTIPLY(name, type, is_float, adds)                                                                           \
    static void name(const bf16 *a, int64_t lda, const uint32_t *b, int64_t size, int64_t pairs, type *c, int64_t ldc, \
                     int64_t m, int64_t n) {                                                                           \
        Result to = {c, ldc, is_float, NULL, adds};                                                                    \
        for (int64_t column = 0; column < n; column += COLUMNS, b += size)                                             \
            for (int64_t row = 0; row < m; row += ROWS)                                                                \
                EACH_SIZE(m - row < ROWS ? m - row : ROWS, (const char *)(a + row * lda), lda * 2, 4, b, pairs, to,    \
                          row, column, n)                                                                              \
    }
MULTIPLY(multiply, bf16, 0, 0)
MULTIPLY(multiply_to_floats, float, 1, 0)
MULTIPLY(multiply_and_add, float, 1, 1)

static void pack_all_rows(const bf16 *b, int64_t ldb, int64_t n, int64_t k, uint32_t *to, int64_t size) {
    for (int64_t column = 0; column < n; column += COLUMNS, to += size)
        pack_rows(b + column, 0, ldb, smaller(COLUMNS, n - column), k, to);
}

static void pack_all_columns(const bf16 *b, int64_t ldb, int64_t n, int64_t k, uint32_t *to, int64_t size) {
    for (int64_t column = 0; column < n; column += COLUMNS, to += size)
        pack_columns(b + column * ldb, 0, ldb, smaller(COLUMNS, n - column), k, to);
}

static int begin(Task *t, const Attention *a, int64_t number, int backward) {
    int64_t row = number / a->heads, head = number % a->heads, size = a->size;
    t->start = a->starts[row], t->prompt = a->prompts[row], t->length = a->lens[row];
    t->wide = parts(t->length, COLUMNS) * COLUMNS, t->pairs = size / 2;
    t->seed = a->seed + (uint64_t)(number + 1) * 0x9e3779b97f4a7c15ull;
    char *memory = room(FOR_ATTENTION, (size_t)lay_out(t, size, backward, NULL));
    if (!memory) return 0;
    lay_out(t, size, backward, memory);
    int64_t stride = 3 * a->heads * size;
    const bf16 *first = a->qkv + t->start * stride + head * size;
    for (int64_t i = 0; i < t->length; i++) {
        const bf16 *frame = first + i * stride;
        turn(frame, 0, a, t->start + i, 1, a->scale, t->query + i * size);
        turn(frame + a->heads * size, 0, a, t->start + i, 1, 1, t->key + i * size);
    }
    pack_all_columns(t->key, size, t->length, size, t->key_columns, t->pairs * COLUMNS);
    const bf16 *value = first + 2 * a->heads * size;
    if (backward) {
        pack_all_rows(t->key, size, size, t->length, t->key_rows, t->wide / 2 * COLUMNS);
        pack_all_columns(value, stride, t->length, size, t->value_columns, t->pairs * COLUMNS);
    } else
        pack_all_rows(value, stride, size, t->length, t->value_rows, t->wide / 2 * COLUMNS);
    return 1;
}

/* Queries `first` … `last` - 1 are a block, the last of which sees `seen` keys. */
INLINE void next_block(const Task *t, int64_t first, int64_t *last, int64_t *seen) {
    *last = smaller(first + QUERIES, first < t->prompt ? t->prompt : t->length);
    *seen = first < t->prompt ? t->prompt : *last;
}

INLINE int64_t sees(const Task *t, int64_t query) { return query < t->prompt ? t->prompt : query + 1; }

/* A row of scores -> weights as they multiply the values, zeros from the last key on; the logarithm of their sum. */
static float weigh(float *scores, bf16 *used, int64_t count, int64_t wide, int level, uint64_t seed, int64_t place) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < count; j += 16)
        most = _mm512_mask_max_ps(most, up_to(count - j), most, _mm512_loadu_ps(scores + j));
    float top = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16) {
        __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(top)));
        e = _mm512_maskz_mov_ps(up_to(count - j), e);
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(scores + j, e);
    }
    float total = _mm512_reduce_add_ps(sum);
    __m512 scale = _mm512_set1_ps(1 / total * (256.0f / (256 - level)));
    for (int64_t j = 0; j < wide; j += 64) {
        uint64_t keep = kept_of_64(seed, (uint32_t)(place + j / 64), level);
        for (int part = 0; part < 64; part += 16) {
            __mmask16 mask = (__mmask16)(keep >> part) & up_to(count - j - part);
            store16(_mm512_maskz_mul_ps(mask, _mm512_loadu_ps(scores + j + part), scale), used, 0, j + part, 0xffff);
        }
    }
    return top + logf(total);
}

/* out (N, heads, size) in bfloat16, sums (heads, N): the logarithm of each query's sum of exponentials. */
int valle_attend(const bf16 *qkv, const float *cosine, const float *sine, const int64_t *starts,
                 const int64_t *prompts, const int64_t *lens, int64_t rows, int64_t heads, int64_t size, float scale,
                 int level, uint64_t seed, bf16 *out, float *sums, int64_t frames, int threads) {
    Attention a = {qkv, cosine, sine, starts, prompts, lens, rows, heads, size, scale, level, seed};
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (int64_t number = 0; number < rows * heads; number++) {
        Task t;
        int64_t head = number % heads;
        if (!begin(&t, &a, number, 0)) {
            failed = 1;
            continue;
        }
        for (int64_t first = 0, last, seen; first < t.length; first = last) {
            next_block(&t, first, &last, &seen);
            int64_t wide = parts(seen, COLUMNS) * COLUMNS;
            multiply_to_floats(t.query + first * size, size, t.key_columns, t.pairs * COLUMNS, t.pairs, t.scores,
                               t.wide, last - first, wide);
            for (int64_t i = first; i < last; i++)
                sums[head * frames + t.start + i] = weigh(t.scores + (i - first) * t.wide, t.used + (i - first) * t.wide,
                                                          sees(&t, i), wide, level, t.seed, i * (t.wide / 64));
            multiply(t.used, t.wide, t.value_rows, t.wide / 2 * COLUMNS, parts(seen, 2),
                     out + ((t.start + first) * heads + head) * size, heads * size, last - first, size);
        }
    }
    return failed;
}

/* Of one query and a panel's keys: weights as they multiplied the values, and the gradients at the scores. */
INLINE void slopes(const float *scores, const float *above, bf16 *used, bf16 *slope, int64_t visible, float sum,
                   float mean, uint64_t keep, int level) {
    __m512 raised = _mm512_set1_ps(256.0f / (256 - level));
#pragma GCC unroll 4
    for (int part = 0; part < COLUMNS; part += 16) {
        __mmask16 inside = up_to(visible - part), kept = (__mmask16)(keep >> part) & inside;
        __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + part), _mm512_set1_ps(sum)));
        weight = _mm512_maskz_mov_ps(inside, weight);
        __m512 to = _mm512_maskz_mul_ps(kept, _mm512_loadu_ps(above + part), raised);
        to = _mm512_mul_ps(weight, _mm512_sub_ps(to, _mm512_set1_ps(mean)));
        store16(_mm512_maskz_mul_ps(kept, weight, raised), used, 0, part, 0xffff);
        store16(to, slope, 0, part, 0xffff);
    }
}

/* The gradient at qkv, (N, 3, heads, size), from that at out, (N, heads, size). */
int valle_attend_backward(const bf16 *qkv, const float *cosine, const float *sine, const int64_t *starts,
                          const int64_t *prompts, const int64_t *lens, int64_t rows, int64_t heads, int64_t size,
                          float scale, int level, uint64_t seed, const bf16 *out, const float *sums,
                          const bf16 *above, bf16 *grad, int64_t frames, int threads) {
    Attention a = {qkv, cosine, sine, starts, prompts, lens, rows, heads, size, scale, level, seed};
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (int64_t number = 0; number < rows * heads; number++) {
        Task t;
        int64_t head = number % heads, apart = heads * size;
        if (!begin(&t, &a, number, 1)) {
            failed = 1;
            continue;
        }
        memset(t.to_key, 0, t.length * size * 4);
        memset(t.to_value, 0, t.length * size * 4);
        for (int64_t first = 0, last, seen; first < t.length; first = last) {
            next_block(&t, first, &last, &seen);
            int64_t count = last - first, stride = parts(QUERIES, 32) * 16 + 16;
            int64_t half = QUERIES / 2 * COLUMNS, panel = t.pairs * COLUMNS;
            const bf16 *gradient = above + ((t.start + first) * heads + head) * size;
            const bf16 *result = out + ((t.start + first) * heads + head) * size;
            float means[QUERIES];
            for (int64_t i = 0; i < count; i++) {
                __m512 share = _mm512_setzero_ps(); /* of all keys: the weights' gradients times the weights */
                for (int64_t j = 0; j < size; j += 16)
                    share = _mm512_fmadd_ps(load16(gradient + i * apart, 0, j, up_to(size - j)),
                                            load16(result + i * apart, 0, j, up_to(size - j)), share);
                means[i] = _mm512_reduce_add_ps(share);
            }
            pack_all_rows(t.query + first * size, size, size, count, t.query_rows, half);
            pack_all_rows(gradient, apart, size, count, t.gradient_rows, half);
            memset(t.to_query, 0, count * size * 4);
            for (int64_t key = 0; key < seen; key += COLUMNS) { /* a panel of keys: all of it in the first cache */
                int64_t keys = smaller(COLUMNS, seen - key);
                multiply_to_floats(t.query + first * size, size, t.key_columns + key * t.pairs, panel, t.pairs, t.scores,
                                   COLUMNS, count, COLUMNS);
                multiply_to_floats(gradient, apart, t.value_columns + key * t.pairs, panel, t.pairs, t.above, COLUMNS,
                                   count, COLUMNS);
                for (int64_t i = 0; i < count; i++)
                    slopes(t.scores + i * COLUMNS, t.above + i * COLUMNS, t.used + i * COLUMNS, t.slope + i * COLUMNS,
                           sees(&t, first + i) - key, sums[head * frames + t.start + first + i], means[i],
                           kept_of_64(t.seed, (uint32_t)(((first + i) * t.wide + key) / 64), level), level);
                multiply_and_add(t.slope, COLUMNS, t.key_rows + key / 2 * COLUMNS, t.wide / 2 * COLUMNS,
                                 parts(keys, 2), t.to_query, size, count, size);
                pack_transposed(t.slope, COLUMNS, COLUMNS, count, t.turned, stride, NULL);
                multiply_and_add((const bf16 *)t.turned, 2 * stride, t.query_rows, half, parts(count, 2),
                                 t.to_key + key * size, size, keys, size);
                pack_transposed(t.used, COLUMNS, COLUMNS, count, t.turned, stride, NULL);
                multiply_and_add((const bf16 *)t.turned, 2 * stride, t.gradient_rows, half, parts(count, 2),
                                 t.to_value + key * size, size, keys, size);
            }
            for (int64_t i = 0; i < count; i++)
                turn(t.to_query + i * size, 1, &a, t.start + first + i, -1, scale,
                     grad + (3 * (t.start + first + i) * heads + head) * size);
        }
        for (int64_t i = 0; i < t.length; i++) {
            bf16 *to = grad + (3 * (t.start + i) * heads + head) * size;
            turn(t.to_key + i * size, 1, &a, t.start + i, -1, 1, to + apart);
            for (int64_t j = 0; j < size; j += 16)
                store16(load16(t.to_value + i * size, 1, j, up_to(size - j)), to + 2 * apart, 0, j, up_to(size - j));
        }
    }
    return failed;
}

/* ---- layer normalization ---- */

/* Frames go by pieces of PIECE; the sums over a row's frames are those of its pieces, in their order. */
enum { PIECE = 32 };

typedef struct {
    int64_t row, first, last;
} Piece;

static Piece *pieces(const int64_t *starts, const int64_t *lens, int64_t rows, int64_t *count) {
    *count = 0;
    for (int64_t row = 0; row < rows; row++) *count += parts(lens[row], PIECE);
    Piece *all = malloc(larger(1, *count) * sizeof(Piece)), *next = all;
    if (!all) return NULL;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < lens[row]; i += PIECE)
            *next++ = (Piece){row, starts[row] + i, starts[row] + smaller(i + PIECE, lens[row])};
    return all;
}

/* out = (x - mean) / deviation * weight + bias for x (N, size), weight and bias (rows, size); stats (N, 2) keeps the
 * mean and one over the deviation. */
int valle_normalize(const float *x, const float *weight, const float *bias, const int64_t *starts, const int64_t *lens,
                    int64_t rows, int64_t size, float eps, void *out, int out_is_float, float *stats, int threads) {
    int64_t count;
    Piece *all = pieces(starts, lens, rows, &count);
    if (!all) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < count; p++)
        for (int64_t i = all[p].first; i < all[p].last; i++) {
            const float *from = x + i * size, *w = weight + all[p].row * size, *b = bias + all[p].row * size;
            __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
            for (int64_t j = 0; j < size; j += 16) sum = _mm512_add_ps(sum, load16(from, 1, j, up_to(size - j)));
            float mean = _mm512_reduce_add_ps(sum) / size;
            for (int64_t j = 0; j < size; j += 16) {
                __m512 apart = _mm512_maskz_sub_ps(up_to(size - j), load16(from, 1, j, up_to(size - j)),
                                                   _mm512_set1_ps(mean));
                squares = _mm512_fmadd_ps(apart, apart, squares);
            }
            float rate = 1 / sqrtf(_mm512_reduce_add_ps(squares) / size + eps);
            stats[2 * i] = mean, stats[2 * i + 1] = rate;
            for (int64_t j = 0; j < size; j += 16) {
                __mmask16 mask = up_to(size - j);
                __m512 y = _mm512_mul_ps(_mm512_sub_ps(load16(from, 1, j, mask), _mm512_set1_ps(mean)),
                                         _mm512_set1_ps(rate));
                store16(_mm512_fmadd_ps(y, load16(w, 1, j, mask), load16(b, 1, j, mask)), out, out_is_float,
                        i * size + j, mask);
            }
        }
    free(all);
    return 0;
}

/* The gradients at x, weight and bias from that at out; `beside`, if any, is added to the one at x. */
int valle_normalize_backward(const float *x, const float *weight, const int64_t *starts, const int64_t *lens,
                             int64_t rows, int64_t size, const float *stats, const void *grad, int grad_is_float,
                             const float *beside, float *to_x, float *to_weight, float *to_bias, int threads) {
    int64_t count;
    Piece *all = pieces(starts, lens, rows, &count);
    float *sums = all ? calloc(larger(1, count * 2 * size), sizeof(float)) : NULL;
    if (!sums) {
        free(all);
        return 1;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < count; p++) {
        float *ours = sums + p * 2 * size;
        const float *w = weight + all[p].row * size;
        for (int64_t i = all[p].first; i < all[p].last; i++) {
            __m512 mean = _mm512_set1_ps(stats[2 * i]), rate = _mm512_set1_ps(stats[2 * i + 1]);
            __m512 plain = _mm512_setzero_ps(), turned = _mm512_setzero_ps();
            for (int64_t j = 0; j < size; j += 16) {
                __mmask16 mask = up_to(size - j);
                __m512 g = load16(grad, grad_is_float, i * size + j, mask);
                __m512 y = _mm512_maskz_mul_ps(mask, _mm512_sub_ps(load16(x, 1, i * size + j, mask), mean), rate);
                _mm512_mask_storeu_ps(ours + j, mask, _mm512_fmadd_ps(g, y, load16(ours, 1, j, mask)));
                _mm512_mask_storeu_ps(ours + size + j, mask, _mm512_add_ps(g, load16(ours, 1, size + j, mask)));
                g = _mm512_mul_ps(g, load16(w, 1, j, mask));
                plain = _mm512_add_ps(plain, g);
                turned = _mm512_fmadd_ps(g, y, turned);
            }
            __m512 shift = _mm512_set1_ps(_mm512_reduce_add_ps(plain) / size);
            __m512 slope = _mm512_set1_ps(_mm512_reduce_add_ps(turned) / size);
            for (int64_t j = 0; j < size; j += 16) {
                __mmask16 mask = up_to(size - j);
                __m512 g = _mm512_mul_ps(load16(grad, grad_is_float, i * size + j, mask), load16(w, 1, j, mask));
                __m512 y = _mm512_mul_ps(_mm512_sub_ps(load16(x, 1, i * size + j, mask), mean), rate);
                g = _mm512_mul_ps(_mm512_sub_ps(_mm512_sub_ps(g, shift), _mm512_mul_ps(y, slope)), rate);
                if (beside) g = _mm512_add_ps(g, load16(beside, 1, i * size + j, mask));
                _mm512_mask_storeu_ps(to_x + i * size + j, mask, g);
            }
        }
    }
    memset(to_weight, 0, rows * size * sizeof(float));
    memset(to_bias, 0, rows * size * sizeof(float));
    for (int64_t p = 0; p < count; p++)
        for (int64_t j = 0; j < size; j++) {
            to_weight[all[p].row * size + j] += sums[p * 2 * size + j];
            to_bias[all[p].row * size + j] += sums[(p * 2 + 1) * size + j];
        }
    free(sums);
    free(all);
    return 0;
}

/* ---- packed weights: generation ---- */

/* Weights laid out once as B's panels are, in one of three formats. A step along K is 4 bytes of an input row: one number
 * in float, two in bfloat16, four in 8 bits; a panel holds 256 bytes for it. 8-bit inputs are unsigned, with a scale and
 * a zero of each row's own; weights have a scale of each column. */
enum { FLOATS, BFLOATS, BYTES };

typedef struct {
    int64_t kind, inner, outer;
    const void *panels;
    const float *scale;  /* (outer), 8 bits only */
    const int32_t *sums; /* (outer) of a column's weights, 8 bits only */
    const float *bias;   /* (outer), or none */
} Packed;

/* A block of input rows in the weights' format. */
typedef struct {
    char *at;
    int64_t stride; /* bytes */
    float *scale;   /* of each row */
    int32_t *zero;
} Inputs;

INLINE int64_t steps_of(const Packed *w) { return w->kind == FLOATS ? w->inner : parts(w->inner, w->kind == BYTES ? 4 : 2); }

INLINE int64_t input_bytes(const Packed *w) { return (steps_of(w) * 4 + 127) / 64 * 64; }

/* Columns of (outer, inner) weights, float or 8 bits, into panels. */
void valle_pack(int64_t kind, const void *weight, int64_t outer, int64_t inner, void *panels, int threads) {
    Packed w = {kind, inner, outer, NULL, NULL, NULL, NULL};
    int64_t steps = steps_of(&w), each = kind == BYTES ? 4 : kind == BFLOATS ? 2 : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < parts(outer, COLUMNS); p++) {
        char *panel = (char *)panels + p * steps * COLUMNS * 4;
        int64_t first = p * COLUMNS;
        if (kind == BFLOATS) {
            pack_columns((const float *)weight + first * inner, 1, inner, smaller(COLUMNS, outer - first), inner,
                         (uint32_t *)panel);
            continue;
        }
        int64_t size = kind == BYTES ? 1 : 4;
        memset(panel, 0, steps * COLUMNS * 4);
        for (int64_t column = 0; column < smaller(COLUMNS, outer - first); column++)
            for (int64_t k = 0; k < inner; k++)
                memcpy(panel + ((k / each) * COLUMNS + column) * 4 + k % each * size,
                       (const char *)weight + ((first + column) * inner + k) * size, size);
    }
}

/* A row of numbers from x on, float or bfloat16, as the weights want it, zeros behind its end. */
INLINE void put(const Packed *w, const void *x, int is_float, Inputs to, int64_t row) {
    char *at = to.at + row * to.stride;
    int64_t n = w->inner;
    if (w->kind == FLOATS) {
        for (int64_t i = 0; i < n; i += 16) store16(load16(x, is_float, i, up_to(n - i)), at, 1, i, up_to(n - i));
    } else if (w->kind == BFLOATS) {
        for (int64_t i = 0; i < n; i += 16) store16(load16(x, is_float, i, up_to(n - i)), at, 0, i, 0xffff);
    } else {
        __m512 low = _mm512_setzero_ps(), high = low, none = low;
        for (int64_t i = 0; i < n; i += 16) {
            __m512 v = load16(x, is_float, i, up_to(n - i));
            low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v);
            none = _mm512_fmadd_ps(v, _mm512_setzero_ps(), none); /* 0, or not a number where one of x is none */
        }
        float least = _mm512_reduce_min_ps(low), scale = (_mm512_reduce_max_ps(high) - least) / 255;
        scale = scale > 1e-30f ? scale : 1e-30f;
        float zero = rintf(-least / scale);
        to.scale[row] = scale + _mm512_reduce_add_ps(none);
        to.zero[row] = zero >= 0 && zero <= 255 ? (int32_t)zero : 0;
        __m512 rate = _mm512_set1_ps(1 / scale), shift = _mm512_set1_ps(zero);
        for (int64_t i = 0; i < n; i += 16) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_fmadd_ps(load16(x, is_float, i, up_to(n - i)), rate, shift));
            whole = _mm512_maskz_max_epi32(up_to(n - i), whole, _mm512_setzero_si512());
            _mm_storeu_si128((__m128i *)(at + i), _mm512_cvtusepi32_epi8(whole));
        }
    }
}

/* What becomes of a product: stored, added to `base`, or through an activation. */
typedef struct {
    void *c;
    int64_t ldc;
    int is_float;
    const float *base;
    int activation;
} Output;

INLINE void finish(const Packed *w, __m512i sums, Inputs from, int64_t row, Output to, int64_t out_row, int64_t column) {
    __mmask16 mask = up_to(w->outer - column);
    __m512 y;
    if (w->kind == BYTES) {
        __m512i own = _mm512_maskz_loadu_epi32(mask, w->sums + column);
        sums = _mm512_sub_epi32(sums, _mm512_mullo_epi32(own, _mm512_set1_epi32(from.zero[row])));
        __m512 scale = _mm512_mul_ps(_mm512_set1_ps(from.scale[row]), _mm512_maskz_loadu_ps(mask, w->scale + column));
        y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale);
    } else
        y = (__m512)sums;
    if (w->bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, w->bias + column));
    if (to.activation == RELU) y = _mm512_max_ps(_mm512_setzero_ps(), y);
    if (to.activation == GELU)
        y = _mm512_mul_ps(
            y, normal_below(y, exponential(_mm512_mul_ps(_mm512_mul_ps(y, y), _mm512_set1_ps(-0.5f)))));
    int64_t at = out_row * to.ldc + column;
    if (to.base) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, to.base + at));
    store16(y, to.c, to.is_float, at, mask);
}

INLINE void packed_tile(int kind, int rows, const Packed *w, const char *panel, Inputs from, int64_t row, Output to,
                        int64_t out_row, int64_t column) {
    __m512i sums[ROWS][4];
    int64_t steps = steps_of(w);
    const char *a = from.at + row * from.stride;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[i][j] = _mm512_setzero_si512();
    for (int64_t k = 0; k < steps; k++, panel += 256, a += 4) {
        __m512i b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            b[j] = _mm512_load_si512(panel + 64 * j);
            if (rows == 1) _mm_prefetch(panel + 2048 + 64 * j, _MM_HINT_T0);
        }
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            int32_t four;
            memcpy(&four, a + i * from.stride, 4);
            __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                if (kind == FLOATS)
                    sums[i][j] = (__m512i)_mm512_fmadd_ps((__m512)x, (__m512)b[j], (__m512)sums[i][j]);
                else if (kind == BFLOATS)
                    sums[i][j] = (__m512i)_mm512_dpbf16_ps((__m512)sums[i][j], (__m512bh)x, (__m512bh)b[j]);
                else
                    sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], x, b[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            if (column + 16 * j < w->outer) finish(w, sums[i][j], from, row + i, to, out_row + i, column + 16 * j);
}

#define PACKED_ROWS(kind, name)                                                                                        \
    static void name(const Packed *w, const char *panel, Inputs from, int64_t rows, Output to, int64_t out_row,        \
                     int64_t column) {                                                                                 \
        for (int64_t row = 0; row < rows; row += ROWS) switch (smaller(rows - row, ROWS)) {                            \
                case 6: packed_tile(kind, 6, w, panel, from, row, to, out_row + row, column); break;                   \
                case 5: packed_tile(kind, 5, w, panel, from, row, to, out_row + row, column); break;                   \
                case 4: packed_tile(kind, 4, w, panel, from, row, to, out_row + row, column); break;                   \
                case 3: packed_tile(kind, 3, w, panel, from, row, to, out_row + row, column); break;                   \
                case 2: packed_tile(kind, 2, w, panel, from, row, to, out_row + row, column); break;                   \
                default: packed_tile(kind, 1, w, panel, from, row, to, out_row + row, column);                         \
            }                                                                                                          \
    }
PACKED_ROWS(FLOATS, rows_of_floats)
PACKED_ROWS(BFLOATS, rows_of_bfloats)
PACKED_ROWS(BYTES, rows_of_bytes)

/* Rows times one panel. */
static void times_panel(const Packed *w, int64_t p, Inputs from, int64_t rows, Output to, int64_t out_row) {
    const char *panel = (const char *)w->panels + p * steps_of(w) * 256;
    if (w->kind == FLOATS)
        rows_of_floats(w, panel, from, rows, to, out_row, p * COLUMNS);
    else if (w->kind == BFLOATS)
        rows_of_bfloats(w, panel, from, rows, to, out_row, p * COLUMNS);
    else
        rows_of_bytes(w, panel, from, rows, to, out_row, p * COLUMNS);
}

static char *lay_inputs(Inputs *to, const Packed *w, int64_t rows, char *at) {
    to->stride = input_bytes(w);
    at = cut(at, &to->at, rows * to->stride);
    at = cut(at, &to->scale, rows * 4);
    return cut(at, &to->zero, rows * 4);
}

/* out (N, outer) = x (N, inner) through a layer. */
int valle_packed_product(const Packed *w, const void *x, int x_is_float, int64_t rows, void *out, int out_is_float, int activation,
                         int threads) {
    int64_t panels = parts(w->outer, COLUMNS);
    int64_t block = larger(1, BLOCK_BYTES / input_bytes(w) / ROWS) * ROWS;
    Inputs all;
    char *memory = room(FOR_A, (size_t)lay_inputs(&all, w, rows, NULL));
    if (!memory) return 1;
    lay_inputs(&all, w, rows, memory);
    Output to = {out, w->outer, out_is_float, NULL, activation};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) x_is_float ? put(w, (const float *)x + row * w->inner, 1, all, row)
                       : put(w, (const bf16 *)x + row * w->inner, 0, all, row);
        for (int64_t above = 0; above < rows; above += block) {
            Inputs from = {all.at + above * all.stride, all.stride, all.scale + above, all.zero + above};
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < panels; p++) times_panel(w, p, from, smaller(block, rows - above), to, above);
        }
    }
    return 0;
}

/* ---- a step of generation ---- */

typedef struct {
    Packed in, out, widen, narrow;
    const float *norm1, *bias1, *norm2, *bias2; /* normalizations */
    const float *query_norm, *key_norm;         /* (size), or none: root-mean-square, of queries and keys */
    void *keys, *values; /* (rows, heads, chunks, size, COLUMNS) and (rows, heads, chunks * COLUMNS, size) */
} StepLayer;

typedef struct {
    int64_t layers, rows, dim, heads, size;
    int64_t norm_first, activation, half; /* half: keys and values are 16-bit floats */
    int64_t chunks, column;               /* of the cache, and where the new frame goes */
    const int64_t *starts;                /* (rows): columns before these are hidden */
    const float *turns;                   /* (rows, 2, size): cosines, and sines in the second half; or none */
    const float *norm, *bias;             /* the last normalization, or none */
    float eps, head_eps;
} Step;

/* Threads wait for each other here: they turn for a while, then leave the core to others. */
typedef struct {
    _Alignas(64) _Atomic int waiting;
    _Alignas(64) _Atomic int passed;
} Gate;

static void wait_for_all(Gate *gate, int threads) {
    if (threads == 1) return;
    int passed = __atomic_load_n(&gate->passed, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&gate->waiting, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&gate->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&gate->passed, passed + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int turn = 0; __atomic_load_n(&gate->passed, __ATOMIC_ACQUIRE) == passed; turn++)
        if (turn < 2000)
            _mm_pause();
        else
            sched_yield();
}

static void normalize_row(const float *x, const float *weight, const float *bias, int64_t size, float eps, float *to) {
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (int64_t j = 0; j < size; j += 16) sum = _mm512_add_ps(sum, load16(x, 1, j, up_to(size - j)));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / size);
    for (int64_t j = 0; j < size; j += 16) {
        __m512 apart = _mm512_maskz_sub_ps(up_to(size - j), load16(x, 1, j, up_to(size - j)), mean);
        squares = _mm512_fmadd_ps(apart, apart, squares);
    }
    __m512 rate = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / size + eps));
    for (int64_t j = 0; j < size; j += 16) {
        __mmask16 mask = up_to(size - j);
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(load16(x, 1, j, mask), mean), rate);
        _mm512_mask_storeu_ps(to + j, mask, _mm512_fmadd_ps(y, load16(weight, 1, j, mask), load16(bias, 1, j, mask)));
    }
}

INLINE __m512 cached16(const void *at, int64_t half, int64_t offset, __mmask16 mask) {
    if (half) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)at + offset));
    return _mm512_maskz_loadu_ps(mask, (const float *)at + offset);
}

INLINE void cache1(void *at, int64_t half, int64_t offset, float x) {
    if (half)
        ((uint16_t *)at)[offset] = _cvtss_sh(x, 0);
    else
        ((float *)at)[offset] = x;
}

/* One query or key, normalized and turned. */
static void prepare(float *x, const float *norm, const Step *s, int64_t row) {
    int64_t size = s->size, middle = size / 2;
    if (norm) {
        float sum = 0;
        for (int64_t i = 0; i < size; i++) sum += x[i] * x[i];
        float rate = 1 / sqrtf(sum / size + s->head_eps);
        for (int64_t i = 0; i < size; i++) x[i] *= rate * norm[i];
    }
    if (!s->turns) return;
    const float *cosine = s->turns + row * 2 * size, *sine = cosine + size + middle;
    for (int64_t i = 0; i < middle; i++) {
        float one = x[i], two = x[middle + i];
        x[i] = one * cosine[i] - two * sine[i];
        x[middle + i] = two * cosine[i] + one * sine[i];
    }
}

/* A row's head: the new key and value go into the cache, and the query over all of it into out. */
INLINE void attend_one(const Step *s, const StepLayer *layer, float *qkv, int64_t row, int64_t head, float *scores,
                       float *out, int half) {
    int64_t size = s->size, dim = s->dim, columns = s->chunks * COLUMNS, count = s->column + 1;
    float *query = qkv + row * 3 * dim + head * size, *key = query + dim, *value = key + dim;
    prepare(query, layer->query_norm, s, row);
    prepare(key, layer->key_norm, s, row);
    int64_t place = (row * s->heads + head) * columns * size, width = half ? 2 : 4;
    char *keys = (char *)layer->keys + place * width, *values = (char *)layer->values + place * width;
    for (int64_t i = 0; i < size; i++) {
        cache1(keys, half, (s->column / COLUMNS * size + i) * COLUMNS + s->column % COLUMNS, key[i]);
        cache1(values, half, s->column * size + i, value[i]);
    }
    int64_t start = s->starts[row], first = start / COLUMNS * COLUMNS;
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t c = first; c < count; c += COLUMNS) {
        __m512 sums[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[j] = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i++) {
            __m512 q = _mm512_set1_ps(query[i]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sums[j] = _mm512_fmadd_ps(q, cached16(keys, half, c * size + i * COLUMNS + 16 * j, 0xffff), sums[j]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            int64_t at = c + 16 * j;
            __mmask16 seen = up_to(count - at) & (__mmask16)~up_to(start - at);
            sums[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, sums[j]);
            most = _mm512_max_ps(most, sums[j]);
            _mm512_storeu_ps(scores + at, sums[j]);
        }
    }
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most)), total = _mm512_setzero_ps();
    for (int64_t c = first; c < parts(count, COLUMNS) * COLUMNS; c += 16) {
        __m512 x = _mm512_loadu_ps(scores + c);
        __mmask16 hidden = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
        x = _mm512_mask_mov_ps(exponential(_mm512_sub_ps(x, top)), hidden, _mm512_setzero_ps());
        total = _mm512_add_ps(total, x);
        _mm512_storeu_ps(scores + c, x);
    }
    float scale = 1 / _mm512_reduce_add_ps(total);
    for (int64_t i = 0; i < size; i += 64) {
        __m512 sums[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[j] = _mm512_setzero_ps();
        if (size - i >= 64)
            for (int64_t c = start; c < count; c++) {
                __m512 p = _mm512_set1_ps(scores[c]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    sums[j] = _mm512_fmadd_ps(p, cached16(values, half, c * size + i + 16 * j, 0xffff), sums[j]);
            }
        else
            for (int64_t c = start; c < count; c++)
                for (int j = 0; 16 * j < size - i; j++)
                    sums[j] = _mm512_fmadd_ps(_mm512_set1_ps(scores[c]),
                                              cached16(values, half, c * size + i + 16 * j, up_to(size - i - 16 * j)),
                                              sums[j]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            _mm512_mask_storeu_ps(out + row * dim + head * size + i + 16 * j, up_to(size - i - 16 * j),
                                  _mm512_mul_ps(sums[j], _mm512_set1_ps(scale)));
    }
}

typedef struct {
    Gate *gate;
    float *x, *other, *qkv, *attended, *hidden; /* of all threads */
} Shared;

typedef struct {
    float *base, *normal, *scores; /* a thread's own */
    Inputs from;
} Own;

static char *lay_shared(Shared *t, const Step *s, const StepLayer *layer, char *at) {
    at = cut(at, &t->gate, sizeof(Gate));
    at = cut(at, &t->other, s->rows * s->dim * 4);
    at = cut(at, &t->qkv, s->rows * 3 * s->dim * 4);
    at = cut(at, &t->attended, s->rows * s->dim * 4);
    return cut(at, &t->hidden, s->rows * layer->widen.outer * 4);
}

static char *lay_own(Own *t, const Step *s, const StepLayer *layer, char *at) {
    at = cut(at, &t->base, s->rows * s->dim * 4);
    at = cut(at, &t->normal, s->dim * 4);
    at = cut(at, &t->scores, (s->chunks + 1) * COLUMNS * 4);
    return lay_inputs(&t->from, layer->narrow.inner > s->dim ? &layer->narrow : &layer->in, s->rows, at);
}

/* Rows of x as the weights want them, normalized first if there is a norm; what a residual is added to is x, or with
 * `base` its normalization. */
static const float *take(const Packed *w, const float *x, const float *norm, const float *bias, const Step *s, Own *own,
                         int base) {
    own->from.stride = input_bytes(w);
    for (int64_t row = 0; row < s->rows; row++) {
        const float *from = x + row * w->inner;
        if (norm) {
            float *to = base ? own->base + row * s->dim : own->normal;
            normalize_row(from, norm, bias, s->dim, s->eps, to);
            from = to;
        }
        put(w, from, 1, own->from, row);
    }
    return norm && base ? own->base : x;
}

static void all_panels(const Packed *w, const Step *s, Own *own, Output to, int thread, int threads) {
    int64_t panels = parts(w->outer, COLUMNS);
    for (int64_t p = panels * thread / threads; p < panels * (thread + 1) / threads; p++)
        times_panel(w, p, own->from, s->rows, to, 0);
}

static void run_layers(const Step *s, const StepLayer *layers, const Shared *t, Own *own, int thread, int threads) {
    int64_t dim = s->dim, tasks = s->rows * s->heads;
    for (int64_t number = 0; number < s->layers; number++) {
        const StepLayer *layer = layers + number, *before = layer - 1;
        const float *base;
        if (s->norm_first)
            base = take(&layer->in, t->x, layer->norm1, layer->bias1, s, own, 0);
        else
            base = number ? take(&layer->in, t->x, before->norm2, before->bias2, s, own, 1)
                          : take(&layer->in, t->x, NULL, NULL, s, own, 1);
        all_panels(&layer->in, s, own, (Output){t->qkv, 3 * dim, 1, NULL, PLAIN}, thread, threads);
        wait_for_all(t->gate, threads);
        for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++)
            if (s->half)
                attend_one(s, layer, t->qkv, task / s->heads, task % s->heads, own->scores, t->attended, 1);
            else
                attend_one(s, layer, t->qkv, task / s->heads, task % s->heads, own->scores, t->attended, 0);
        wait_for_all(t->gate, threads);
        take(&layer->out, t->attended, NULL, NULL, s, own, 0);
        all_panels(&layer->out, s, own, (Output){t->other, dim, 1, base, PLAIN}, thread, threads);
        wait_for_all(t->gate, threads);
        base = take(&layer->widen, t->other, s->norm_first ? layer->norm2 : layer->norm1,
                    s->norm_first ? layer->bias2 : layer->bias1, s, own, !s->norm_first);
        all_panels(&layer->widen, s, own, (Output){t->hidden, layer->widen.outer, 1, NULL, (int)s->activation}, thread,
                   threads);
        wait_for_all(t->gate, threads);
        take(&layer->narrow, t->hidden, NULL, NULL, s, own, 0);
        all_panels(&layer->narrow, s, own, (Output){t->x, dim, 1, base, PLAIN}, thread, threads);
        wait_for_all(t->gate, threads);
    }
}

/* One new frame of each row: x (rows, dim) goes through all layers, in place; keys and values gain a column. */
int valle_step(const Step *s, const StepLayer *layers, float *x, int threads) {
    Shared shared;
    char *memory = room(FOR_B, (size_t)lay_shared(&shared, s, layers, NULL));
    if (!memory) return 1;
    lay_shared(&shared, s, layers, memory);
    memset(shared.gate, 0, sizeof(Gate));
    shared.x = x;
    Own own;
    int64_t each = (int64_t)lay_own(&own, s, layers, NULL);
    char *mine = room(FOR_A, (size_t)(each * threads));
    if (!mine) return 1;
#pragma omp parallel num_threads(threads) private(own)
    {
        lay_own(&own, s, layers, mine + each * omp_get_thread_num());
        run_layers(s, layers, &shared, &own, omp_get_thread_num(), omp_get_num_threads());
    }
    const float *norm = s->norm_first ? s->norm : layers[s->layers - 1].norm2;
    const float *bias = s->norm_first ? s->bias : layers[s->layers - 1].bias2;
    if (norm)
        for (int64_t row = 0; row < s->rows; row++)
            normalize_row(x + row * s->dim, norm, bias, s->dim, s->eps, x + row * s->dim);
    return 0;
}
