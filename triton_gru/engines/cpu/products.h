/* Matrix products, row by row and tile by tile. An element is summed over k in the same order in
   every tile, so that a row's values depend neither on the other rows nor on the number of threads. */
#pragma once
#include "vectors.h"

/* The k range that one pass over the rows takes: a panel's part stays in the first cache. And the rows
   of a pass, which stay in the second: each panel reads them again. */
enum { DEPTH = 128, CHUNK = 128 };

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

/* sums[g][i] += row a[i] [K] times the panel at w + g * stride, for g panels and m rows. */
INLINE void multiply(int m, int g, const float *const *a, const float *w, int64_t stride, int64_t K,
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

/* Up to three panels: together if the registers hold their sums (otherwise few rows would wait for
   the latency of each sum), else one after another. */
INLINE void multiply_panels(int m, int g, const float *const *a, const float *w, int64_t stride,
                            int64_t K, vf sums[][MR][NV]) {
  if (g * m * NV <= ACC) {
    multiply(m, g, a, w, stride, K, sums);
    return;
  }
  for (int p = 0; p < g; p++) multiply(m, 1, a, w + p * stride, 0, K, sums + p);
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
  else
    for (int i = 0; i < m; i += 4) dots_4(a + i, w, units, K, out + i);
}

/* Calls with a constant number of rows, which the compiler unrolls. */
#define BY_ROWS(lo, hi, b, call)               \
  for (int64_t b = lo, m_; b < (hi); b += m_) { \
    int64_t left_ = (hi) - b;                   \
    if (MR > 4 && left_ >= MR) { m_ = MR; call(MR); } \
    else if (left_ >= 4) { m_ = 4; call(4); }   \
    else if (left_ >= 2) { m_ = 2; call(2); }   \
    else { m_ = 1; call(1); }                   \
  }

/* Calls for every tile of units u0 to u1 and every few rows. One or two rows take three tiles at once. */
#define BY_TILES(lo, hi, u0, u1, b, u, call)                       \
  for (int64_t u = u0, g_; u < (u1); u += g_ * TW) {               \
    g_ = (hi) - (lo) <= 2 && (u1) - u > 2 * TW ? 3 : 1;            \
    if (g_ == 1) {                                                 \
      BY_ROWS(lo, hi, b, call##_1)                                 \
    } else if ((hi) - (lo) == 2) {                                 \
      int64_t b = lo;                                              \
      call(2, 3);                                                  \
    } else if ((hi) - (lo) == 1) {                                 \
      int64_t b = lo;                                              \
      call(1, 3);                                                  \
    }                                                              \
  }

/* to[i] [N] = bias + from[i] [K] times w, for many rows at once; `add`: to[i] += instead. w: the first K
   rows of panels that have `all`. */
static void product(const float *const *from, float *const *to, int64_t rows, int64_t K, int64_t N,
                    const float *w, int64_t all, const float *bias, int add) {
#define ROWS(m, g)                                                                     \
  {                                                                                    \
    const float *a_[MR];                                                               \
    vf s[3][MR][NV];                                                                   \
    for (int i = 0; i < m; i++) a_[i] = from[b + i] + k0;                              \
    for (int p = 0; p < g; p++)                                                        \
      for (int v = 0; v < NV; v++) {                                                   \
        int64_t at = n + p * TW + v * VL;                                              \
        vf start = bias ? load(bias + at, N - at) : (vf){0};                           \
        for (int i = 0; i < m; i++)                                                    \
          s[p][i][v] = add || k0 ? load(to[b + i] + at, N - at) : start;               \
      }                                                                                \
    multiply(m, g, a_, w + n * all + k0 * TW, all * TW, depth, s);                       \
    for (int p = 0; p < g; p++)                                                        \
      for (int i = 0; i < m; i++)                                                      \
        for (int v = 0; v < NV; v++)                                                   \
          store(to[b + i] + n + p * TW + v * VL, N - n - p * TW - v * VL, s[p][i][v]); \
  }
#define ROWS_1(m) ROWS(m, 1)
  const int64_t most = rows > 2 * MR ? DEPTH : MAX(1, K); /* few rows reuse a panel's part too seldom */
  for (int64_t lo = 0; lo < rows; lo += CHUNK)
    for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += most) {
      const int64_t hi = MIN(rows, lo + CHUNK), depth = MIN(most, K - k0);
      BY_TILES(lo, hi, 0, N, b, n, ROWS)
    }
}
