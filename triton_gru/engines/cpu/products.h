/* Matrix products, row by row and tile by tile. An element is summed over k in the same order in
   every tile, so that a row's values depend neither on the other rows nor on the number of threads. */
#pragma once
#include "vectors.h"

/* The k range that one pass over the rows takes: a panel's part stays in the first cache. And the rows
   of a pass, which stay in the second: each panel reads them again. */
enum { DEPTH = 256, CHUNK = 128 };

INLINE int64_t whole_tiles(int64_t n) { return (n + TW - 1) / TW * TW; }

/* The columns of w [K, N] from n0 on as a panel [K][TW], padded with zeros. */
static void pack_columns(const float *w, int64_t K, int64_t N, int64_t n0, float *out) {
  for (int64_t k = 0; k < K; k++, w += N)
    for (int v = 0; v < NV; v++)
      *(vf *)(out + k * TW + v * VL) = load(w + n0 + v * VL, N - n0 - v * VL);
}
/* The rows of w [N, K] from n0 on as the columns of such a panel. */
static void pack_rows(const float *w, int64_t K, int64_t N, int64_t n0, float *out) {
  for (int64_t k = 0; k < K; k += VL)
    for (int v = 0; v < NV; v++) {
      vf s[VL];
      for (int j = 0; j < VL; j++) {
        int64_t n = n0 + v * VL + j;
        s[j] = n < N ? load(w + n * K + k, K - k) : (vf){0};
      }
      transpose(s);
      for (int i = 0; i < MIN(VL, K - k); i++) *(vf *)(out + (k + i) * TW + v * VL) = s[i];
    }
}

/* sums[p][i] += row a[i] [K] times the panel at w + p * stride, for g panels and m rows. */
INLINE void multiply_of(int m, int g, const float *const *a, const float *w, int64_t stride, int64_t K,
                        vf sums[][MR][NV]) {
  vf s[3][MR][NV];
  for (int p = 0; p < g; p++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++) s[p][i][v] = sums[p][i][v];
  for (int64_t k = 0; k < K; k++, w += TW)
    for (int p = 0; p < g; p++) {
      vf b[NV];
      for (int v = 0; v < NV; v++) b[v] = *(const vf *)(w + p * stride + v * VL);
      for (int i = 0; i < m; i++)
        for (int v = 0; v < NV; v++) s[p][i][v] += a[i][k] * b[v];
    }
  for (int p = 0; p < g; p++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++) sums[p][i][v] = s[p][i][v];
}

/* One copy for each number of rows and panels whose sums the registers hold: every call reads its panels
   again, from the second cache if they are long, so seven rows in calls of 4, 2 and 1 took up to 1.3 times as
   long as in one. */
typedef void Multiply(const float *const *a, const float *w, int64_t stride, int64_t K, vf sums[][MR][NV]);
#define MULTIPLY(m, g)                                                                              \
  static __attribute__((noinline)) void multiply_##m##_##g(const float *const *a, const float *w,   \
                                                           int64_t stride, int64_t K,               \
                                                           vf sums[][MR][NV]) {                     \
    multiply_of(MIN(m, MR), g, a, w, stride, K, sums);                                              \
  }
MULTIPLY(1, 1) MULTIPLY(2, 1) MULTIPLY(3, 1) MULTIPLY(4, 1)
MULTIPLY(5, 1) MULTIPLY(6, 1) MULTIPLY(7, 1) MULTIPLY(8, 1)
MULTIPLY(1, 2) MULTIPLY(2, 2) MULTIPLY(3, 2) MULTIPLY(4, 2) MULTIPLY(5, 2) MULTIPLY(6, 2)
MULTIPLY(1, 3) MULTIPLY(2, 3) MULTIPLY(3, 3) MULTIPLY(4, 3)
static Multiply *const MULTIPLIES[3][8] = {
    {multiply_1_1, multiply_2_1, multiply_3_1, multiply_4_1, multiply_5_1, multiply_6_1, multiply_7_1, multiply_8_1},
    {multiply_1_2, multiply_2_2, multiply_3_2, multiply_4_2, multiply_5_2, multiply_6_2},
    {multiply_1_3, multiply_2_3, multiply_3_3, multiply_4_3},
};

INLINE void multiply(int m, int g, const float *const *a, const float *w, int64_t stride, int64_t K,
                     vf sums[][MR][NV]) {
  if (g * m * NV <= ACC) MULTIPLIES[g - 1][m - 1](a, w, stride, K, sums);
  else
    for (int p = 0; p < g; p++) MULTIPLIES[0][m - 1](a, w + p * stride, 0, K, sums + p);
}

/* out[i][j] = row a[i] [K] times row j of w [units, K], for m rows and TW units (those past the last
   one repeat it): no packing, faster if a weight multiplies few rows. m is 1, 2 or 4. */
INLINE void dots_of(int m, const float *const *a, const float *w, int64_t units, int64_t K,
                    float out[][TW]) {
  const int n = VL / m;
  for (int j0 = 0; j0 < TW; j0 += n) {
    if (j0 >= units) break;
    const float *row[VL];
    vf s[VL];
    for (int j = 0; j < n; j++) row[j] = w + MIN(j0 + j, units - 1) * K;
    for (int i = 0; i < VL; i++) s[i] = (vf){0};
    int64_t k = 0;
    for (; k + VL <= K; k += VL)
      for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) s[i * n + j] += *(const vf *)(a[i] + k) * *(const vf *)(row[j] + k);
    if (k < K)
      for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) s[i * n + j] += load(a[i] + k, K - k) * load(row[j] + k, K - k);
    sum_lanes(s);
    for (int i = 0; i < m; i++) memcpy(out[i] + j0, (const float *)s + i * n, 4 * n);
  }
}
/* One copy each: inlined into every tile they made the build take twice as long. */
#define DOTS_OF(m)                                                                            \
  static __attribute__((noinline)) void dots_##m(const float *const *a, const float *w,       \
                                                 int64_t units, int64_t K, float out[][TW]) { \
    dots_of(m, a, w, units, K, out);                                                          \
  }
DOTS_OF(1)
DOTS_OF(2)
DOTS_OF(4)
INLINE void dots(int m, const float *const *a, const float *w, int64_t units, int64_t K,
                 float out[][TW]) {
  if (m == 1) dots_1(a, w, units, K, out);
  else if (m == 2) dots_2(a, w, units, K, out);
  else {
    const float *four[MR];
    for (int i = 0; i < MR; i++) four[i] = a[i < m ? i : 0];
    for (int i = 0; i < m; i += 4) dots_4(four + i, w, units, K, out + i);
  }
}

/* Loops over lo to hi in steps of m rows, and over the units u0 to u1 in steps of g tiles: three where one
   or two rows would wait for the latency of each sum. */
#define EACH_ROWS(lo, hi, b, m) for (int64_t b = lo, m; m = MIN(MR, (hi) - b), b < (hi); b += m)
#define EACH_TILES(rows, u0, u1, u, g) \
  for (int64_t u = u0, g; g = (rows) <= 2 && (u1) - u > 2 * TW ? 3 : 1, u < (u1); u += g * TW)

/* to[i] [N] = bias + from[i] [K] times w, for many rows at once; `add`: to[i] += instead. w: the first K
   rows of panels that have `all`. */
static void product(const float *const *from, float *const *to, int64_t rows, int64_t K, int64_t N,
                    const float *w, int64_t all, const float *bias, int add) {
  const int64_t most = rows > 2 * MR ? DEPTH : MAX(1, K); /* few rows reuse a panel's part too seldom */
  const float *a[MR];
  vf s[3][MR][NV];
  for (int64_t lo = 0; lo < rows; lo += CHUNK)
    for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += most) {
      const int64_t hi = MIN(rows, lo + CHUNK), depth = MIN(most, K - k0);
      EACH_TILES(hi - lo, 0, N, n, g) EACH_ROWS(lo, hi, b, m) {
        for (int i = 0; i < m; i++) a[i] = from[b + i] + k0;
        for (int p = 0; p < g; p++)
          for (int v = 0; v < NV; v++) {
            const int64_t at = n + p * TW + v * VL;
            const vf start = bias ? load(bias + at, N - at) : (vf){0};
            for (int i = 0; i < m; i++) s[p][i][v] = add || k0 ? load(to[b + i] + at, N - at) : start;
          }
        multiply(m, g, a, w + n * all + k0 * TW, all * TW, depth, s);
        for (int p = 0; p < g; p++)
          for (int v = 0; v < NV; v++) {
            const int64_t at = n + p * TW + v * VL;
            for (int i = 0; i < m; i++) store(to[b + i] + at, N - at, s[p][i][v]);
          }
      }
    }
}
