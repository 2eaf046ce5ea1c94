/* Vectors of GCC and Clang, without intrinsics of one machine, and the gates' functions on them. */
#pragma once
#include <stdint.h>
#include <string.h>

#if !(defined(__AVX2__) && defined(__FMA__)) && !defined(__ARM_NEON)
#error needs AVX2 with FMA, or NEON: with less it is slower than torch
#endif

/* VL floats per vector, NV vectors per tile width, MR rows per tile, ACC vectors of sums that fit in
   registers next to the operands (32 registers, 16 with AVX2). */
#if defined(__AVX512F__)
enum { VL = 16, NV = 2, MR = 8, ACC = 24 };
#elif defined(__AVX2__)
enum { VL = 8, NV = 2, MR = 4, ACC = 12 };
#else
enum { VL = 4, NV = 4, MR = 4, ACC = 24 };
#endif
enum { TW = VL * NV };

typedef float vf __attribute__((vector_size(4 * VL), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * VL), aligned(4)));
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf vexp(vf x) { /* Cephes' expf, 2 ulp; clamped to what a float holds, NaN stays NaN */
  const vf limit = (vf){0} + 87.0f;
  x = pick(x > limit, limit, x);
  x = pick(x < -limit, -limit, x);
  vf k = x * 1.4426950408889634f + 12582912.0f, n = k - 12582912.0f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r +
           4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (vf)(((vu)k << 23) + (127u << 23)); /* unsigned: of a NaN the sum is beyond 31 bits */
}
INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
INLINE vf tanh_(vf x) { /* Cephes' tanhf: a polynomial where 1 - 2 / (1 + e) would cancel */
  vf s = x * x, large = 1.0f - 2.0f / (1.0f + vexp(2.0f * x));
  vf p = (((-5.70498872745e-3f * s + 2.06390887954e-2f) * s - 5.37397155531e-2f) * s +
          1.33314422036e-1f) * s - 3.33332819422e-1f;
  return pick(s < 0.390625f, x + x * s * p, large);
}
INLINE vf load(const float *p, int64_t n) {
  if (n >= VL) return *(const vf *)p;
  vf v = {0};
  if (n > 0) memcpy(&v, p, 4 * n);
  return v;
}
INLINE void store(float *p, int64_t n, vf v) {
  if (n >= VL) *(vf *)p = v;
  else if (n > 0) memcpy(p, &v, 4 * n);
}

/* Lanes of a and b, side by side, by constants. */
INLINE vf shuffle(vf a, vf b, vi lanes) {
#ifdef __clang__ /* has no __builtin_shuffle */
  float both[2 * VL];
  vf out;
  *(vf *)both = a, *(vf *)(both + VL) = b;
  for (int l = 0; l < VL; l++) out[l] = both[lanes[l]];
  return out;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}
/* a and b hold VL / width items each, of `width` lanes. The result holds the items of both, the upper
   half of each added to its lower one. */
INLINE vf halve(vf a, vf b, int width) {
  vi low, high;
#pragma GCC unroll 16
  for (int l = 0; l < VL; l++) {
    low[l] = l / (width / 2) * width + l % (width / 2);
    high[l] = low[l] + width / 2;
  }
  return shuffle(a, b, low) + shuffle(a, b, high);
}
INLINE void halve_all(vf *v, int width) {
#pragma GCC unroll 16
  for (int i = 0; i < width / 2; i++) v[i] = halve(v[2 * i], v[2 * i + 1], width);
}
/* v[0] = the sum over the lanes of each of v[0] to v[VL - 1], all in the same order. Widths are
   constants, so that the shuffles are known at compile time. */
INLINE void sum_lanes(vf *v) {
  if (VL >= 16) halve_all(v, 16);
  if (VL >= 8) halve_all(v, 8);
  halve_all(v, 4), halve_all(v, 2);
}
/* v[i] lane j becomes v[j] lane i: as many perfect shuffles of all lanes as VL has bits. */
INLINE void transpose(vf *v) {
  vi low, high;
#pragma GCC unroll 16
  for (int l = 0; l < VL; l++) {
    low[l] = l / 2 + l % 2 * VL;
    high[l] = low[l] + VL / 2;
  }
#pragma GCC unroll 4
  for (int n = VL; n > 1; n /= 2) {
    vf from[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) from[i] = v[i];
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; i++) {
      v[2 * i] = shuffle(from[i], from[i + VL / 2], low);
      v[2 * i + 1] = shuffle(from[i], from[i + VL / 2], high);
    }
  }
}
