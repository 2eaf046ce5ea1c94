/* A GRU layer on a CPU in float32: products and gates of a step together, tile by tile, so that what
   a product gives never leaves the registers and the first cache.

   Rows are packed as in a PackedSequence: rows sorted by length, longest first, and the rows of one
   step side by side (`offsets`). Threads divide the rows among them, and each runs all steps of its
   own rows without waiting for another one. Where there are fewer rows than threads, the threads of a
   group share the units of its rows and wait for each other once a step.

   A row's numbers do not depend on the rows beside it, nor on the number of threads: every element is
   summed over k in one order, whatever the tile. Vectors are those of GCC and Clang, without
   intrinsics of one machine. Formulas: triton_gru/equations.py. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if !(defined(__AVX2__) && defined(__FMA__)) && !defined(__ARM_NEON)
#error needs AVX2 with FMA, or NEON: with less, torch's own GRU is faster
#endif

/* VL floats a vector, NV vectors a tile's width, MR rows a tile, ACC vectors of sums that the
   registers hold beside the operands (32 registers, 16 with AVX2). */
#if defined(__AVX512F__)
enum { VL = 16, NV = 2, MR = 8, ACC = 24 };
#elif defined(__AVX2__)
enum { VL = 8, NV = 2, MR = 4, ACC = 12 };
#else
enum { VL = 4, NV = 4, MR = 4, ACC = 24 };
#endif
enum { TW = VL * NV };
/* Floats of projected gates that a thread makes ahead of its scan: half of a second-level cache. */
enum { AHEAD = 128 * 1024 };

typedef float vf __attribute__((vector_size(4 * VL), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4)));
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

int64_t tile_width(void) { return TW; }

/* ---- elementwise ------------------------------------------------------------------------------ */

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
  return p * (vf)(((vi)k << 23) + (127 << 23));
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

/* ---- products --------------------------------------------------------------------------------- */

/* w [K, N], element (k, n) at w[k * sk + n * sn], to panels [N / TW][K][TW], padded with zeros. */
void pack(const float *w, int64_t sk, int64_t sn, int64_t K, int64_t N, float *out) {
  for (int64_t n0 = 0; n0 < N; n0 += TW, out += K * TW) {
    int64_t width = MIN(TW, N - n0);
    if (width < TW) memset(out, 0, 4 * K * TW);
    if (sn == 1)
      for (int64_t k = 0; k < K; k++) memcpy(out + k * TW, w + k * sk + n0, 4 * width);
    else /* few rows of the source at a time, so that they stay in the first cache */
      for (int64_t k0 = 0; k0 < K; k0 += 64)
        for (int64_t j = 0; j < width; j++)
          for (int64_t k = k0; k < MIN(K, k0 + 64); k++) out[k * TW + j] = w[k * sk + (n0 + j) * sn];
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

/* Up to three panels: together where the registers hold their sums (few rows would wait for the
   latency of each sum otherwise), else one after another. */
INLINE void multiply_panels(int m, int g, const float *const *a, const float *w, int64_t stride,
                            int64_t K, vf sums[][MR][NV]) {
  if (g * m * NV <= ACC) {
    multiply(m, g, a, w, stride, K, sums);
    return;
  }
  for (int p = 0; p < g; p++) multiply(m, 1, a, w + p * stride, 0, K, sums + p);
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

/* to[i] [N] = bias + from[i] [K] times w (panels), for many rows at once; `add`: to[i] += instead. */
static void product(const float *const *from, float *const *to, int64_t rows, int64_t K, int64_t N,
                    const float *w, const float *bias, int add) {
#define ROWS(m, g)                                                                     \
  {                                                                                    \
    vf s[3][MR][NV];                                                                   \
    for (int p = 0; p < g; p++)                                                        \
      for (int v = 0; v < NV; v++) {                                                   \
        int64_t at = n + p * TW + v * VL;                                              \
        vf start = bias ? load(bias + at, N - at) : (vf){0};                           \
        for (int i = 0; i < m; i++)                                                    \
          s[p][i][v] = add ? load(to[b + i] + at, N - at) : start;                     \
      }                                                                                \
    multiply(m, g, from + b, w + n * K, K * TW, K, s);                                 \
    for (int p = 0; p < g; p++)                                                        \
      for (int i = 0; i < m; i++)                                                      \
        for (int v = 0; v < NV; v++)                                                   \
          store(to[b + i] + n + p * TW + v * VL, N - n - p * TW - v * VL, s[p][i][v]); \
  }
#define ROWS_1(m) ROWS(m, 1)
  BY_TILES(0, rows, 0, N, b, n, ROWS)
}

/* ---- a layer ---------------------------------------------------------------------------------- */

typedef struct { /* one direction of a layer; float tensors, row-major */
  int64_t reverse;
  const float *h0;                /* [B, H] */
  const float *weight_ih;         /* panels: forward of W_ih^T, backward of W_ih */
  const float *weight_hh;         /* likewise; forward gate by gate */
  const float *bias_x, *bias_h;   /* [3H]; bias_h counts for n alone, and with reset_after alone */
  const uint8_t *resets;          /* [N, D] at this direction, or NULL */
  float *gates;                   /* [N, 3 or 4, H]: r, z, n, c; NULL where they are not kept */
  float *dx;                      /* [N, I], or NULL */
  float *d_gates_x, *d_gates_h;   /* [rows of the piece, 3H]: with reset_after, else both one */
  float *state;                   /* [rows of the piece, H]: h before the step, zero at a reset */
  float *u;                       /* reset_after=0: [rows of the piece, H]: r h; forward [B, H] */
  float *dh;                      /* [B, H] in and out */
  float *y;                       /* [N, D * H] at this direction */
  const float *dy;                /* likewise */
} Direction;

typedef struct {
  int64_t steps, batch, inputs, hidden, directions, reset_after;
  int64_t first, last;            /* the steps of this piece, each direction's own order */
  const int64_t *offsets;         /* [steps + 1]: the rows of step t are offsets[t] to offsets[t+1] */
  const float *x;                 /* [N, I] */
  Direction direction[2];
} Layer;

typedef struct { /* what one thread does: rows lo to hi, units u0 to u1 (both with whole tiles) */
  const Layer *layer;
  const Direction *d;
  int64_t lo, hi, u0, u1, i0, i1; /* i0, i1: of dx, the columns */
  int64_t members, round;
  atomic_long *count;
  float *ahead;                   /* [most][3][units] */
  const float **from;             /* [most] */
  float **to;                     /* [most] */
  const float *zeros;             /* [H] */
} Part;

INLINE int64_t whole_tiles(int64_t n) { return (n + TW - 1) / TW * TW; }
INLINE int64_t rows_at(const Layer *l, int64_t t) { return l->offsets[t + 1] - l->offsets[t]; }

/* The state before step t of packed row b: that after the step before, the first one, or zero. */
INLINE const float *state_before(const Part *p, int64_t t, int64_t b) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  if (d->resets && d->resets[(l->offsets[t] + b) * l->directions]) return p->zeros;
  int64_t before = d->reverse ? t + 1 : t - 1;
  if (before < 0 || before >= l->steps || b >= rows_at(l, before)) return d->h0 + b * l->hidden;
  return d->y + (l->offsets[before] + b) * l->directions * l->hidden;
}

/* Rows whose projected gates a thread makes ahead; one step's at least. */
INLINE int64_t rows_ahead(const Part *p) {
  return MAX(p->hi - p->lo, AHEAD / (3 * whole_tiles(p->u1 - p->u0)));
}

static void meet(Part *p) {
  if (p->members < 2) return;
  long goal = ++p->round * p->members;
  atomic_fetch_add_explicit(p->count, 1, memory_order_acq_rel);
  for (int i = 0; atomic_load_explicit(p->count, memory_order_acquire) < goal; i++)
    if (i > 2000) sched_yield(); /* another program may have the other thread's core */
}

/* W_ih x + biases of the part's units at steps t0 to t1 (in this direction's order), gate by gate:
   ahead [rows][3][units], rows in the order of the steps. */
static void project(const Part *p, int64_t t0, int64_t t1) {
  const Layer *l = p->layer;
  int64_t H = l->hidden, I = l->inputs, units = whole_tiles(p->u1 - p->u0), rows = 0;
  for (int64_t s = t0; s < t1; s++) {
    int64_t t = p->d->reverse ? l->steps - 1 - s : s, hi = MIN(p->hi, rows_at(l, t));
    for (int64_t b = p->lo; b < hi; b++) p->from[rows++] = l->x + (l->offsets[t] + b) * I;
  }
  for (int g = 0; g < 3; g++) {
    for (int64_t i = 0; i < rows; i++) p->to[i] = p->ahead + (i * 3 + g) * units;
    product(p->from, p->to, rows, I, p->u1 - p->u0,
            p->d->weight_ih + (g * whole_tiles(H) + p->u0) * I,
            p->d->bias_x ? p->d->bias_x + g * H + p->u0 : NULL, 0);
  }
}

/* One step of m rows from packed row b on and of the units of one tile. gx: their projected gates,
   a row's three gates `units` apart, rows 3 * units apart. */
INLINE void forward_tile(int m, const Part *p, int64_t t, int64_t b, int64_t u, const float *gx,
                         int64_t units) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  int64_t H = l->hidden, HP = whole_tiles(H), DH = l->directions * H;
  const float *h[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++) h[i] = state_before(p, t, b + i);
  for (int v = 0; v < NV; v++) {
    vf bias = d->bias_h ? load(d->bias_h + 2 * H + u + v * VL, H - u - v * VL) : (vf){0};
    for (int i = 0; i < m; i++) {
      s[0][i][v] = *(const vf *)(gx + i * 3 * units + v * VL);
      s[1][i][v] = *(const vf *)(gx + i * 3 * units + units + v * VL);
      s[2][i][v] = bias;
    }
  }
  multiply_panels(m, 3, h, d->weight_hh + u * H, HP * H, H, s);
  for (int i = 0; i < m; i++)
    for (int v = 0; v < NV; v++) {
      int64_t at = u + v * VL, left = H - at, row = l->offsets[t] + b + i;
      if (left <= 0) continue;
      vf r = sigmoid(s[0][i][v]), z = sigmoid(s[1][i][v]), c = s[2][i][v];
      vf n = tanh_(*(const vf *)(gx + i * 3 * units + 2 * units + v * VL) + r * c);
      store(d->y + row * DH + at, left, n * (1.0f - z) + z * load(h[i] + at, left));
      if (!d->gates) continue;
      float *to = d->gates + row * 4 * H + at;
      store(to, left, r), store(to + H, left, z), store(to + 2 * H, left, n),
          store(to + 3 * H, left, c);
    }
}

/* reset_after=0, first half of a step: r and z, and u = r h. z waits in y, where n replaces it. */
INLINE void forward_tile_rz(int m, const Part *p, int64_t t, int64_t b, int64_t u, const float *gx,
                            int64_t units) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  int64_t H = l->hidden, HP = whole_tiles(H), DH = l->directions * H;
  const float *h[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++) h[i] = state_before(p, t, b + i);
  for (int i = 0; i < m; i++)
    for (int v = 0; v < NV; v++) {
      s[0][i][v] = *(const vf *)(gx + i * 3 * units + v * VL);
      s[1][i][v] = *(const vf *)(gx + i * 3 * units + units + v * VL);
    }
  multiply_panels(m, 2, h, d->weight_hh + u * H, HP * H, H, s);
  for (int i = 0; i < m; i++)
    for (int v = 0; v < NV; v++) {
      int64_t at = u + v * VL, left = H - at, row = l->offsets[t] + b + i;
      if (left <= 0) continue;
      vf r = sigmoid(s[0][i][v]), z = sigmoid(s[1][i][v]);
      store(d->u + (b + i) * H + at, left, r * load(h[i] + at, left));
      store(d->y + row * DH + at, left, z);
      if (!d->gates) continue;
      float *to = d->gates + row * 3 * H + at;
      store(to, left, r), store(to + H, left, z);
    }
}

/* reset_after=0, second half: n from u, and the state, of g tiles. */
INLINE void forward_tile_n(int m, int g, const Part *p, int64_t t, int64_t b, int64_t u,
                           const float *gx, int64_t units) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  int64_t H = l->hidden, DH = l->directions * H;
  const float *a[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++) a[i] = d->u + (b + i) * H;
  for (int q = 0; q < g; q++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++)
        s[q][i][v] = *(const vf *)(gx + i * 3 * units + 2 * units + q * TW + v * VL);
  multiply(m, g, a, d->weight_hh + (2 * whole_tiles(H) + u) * H, H * TW, H, s);
  for (int i = 0; i < m; i++) {
    const float *h = state_before(p, t, b + i);
    for (int q = 0; q < g; q++)
      for (int v = 0; v < NV; v++) {
        int64_t at = u + q * TW + v * VL, left = H - at, row = l->offsets[t] + b + i;
        if (left <= 0) continue;
        float *y = d->y + row * DH + at;
        vf z = load(y, left), n = tanh_(s[q][i][v]);
        store(y, left, n * (1.0f - z) + z * load(h + at, left));
        if (d->gates) store(d->gates + row * 3 * H + 2 * H + at, left, n);
      }
  }
}

static void forward_part(Part *p) {
  const Layer *l = p->layer;
  int64_t units = whole_tiles(p->u1 - p->u0);
  for (int64_t s = 0; s < l->steps;) {
    int64_t end = s, rows = 0;
    do { /* at least one step */
      int64_t t = p->d->reverse ? l->steps - 1 - end : end;
      rows += MAX(0, MIN(p->hi, rows_at(l, t)) - p->lo);
      end++;
    } while (end < l->steps && rows + (p->hi - p->lo) <= rows_ahead(p));
    project(p, s, end);
    const float *gx = p->ahead;
    for (; s < end; s++) {
      int64_t t = p->d->reverse ? l->steps - 1 - s : s, hi = MAX(p->lo, MIN(p->hi, rows_at(l, t)));
#define AT (gx + (b - p->lo) * 3 * units + (u - p->u0)), units
#define AFTER(m) forward_tile(m, p, t, b, u, AT)
#define RESET_UPDATE(m) forward_tile_rz(m, p, t, b, u, AT)
#define NEW(m, g) forward_tile_n(m, g, p, t, b, u, AT)
#define NEW_1(m) NEW(m, 1)
      if (l->reset_after)
        for (int64_t u = p->u0; u < p->u1; u += TW) { BY_ROWS(p->lo, hi, b, AFTER) }
      else {
        for (int64_t u = p->u0; u < p->u1; u += TW) { BY_ROWS(p->lo, hi, b, RESET_UPDATE) }
        meet(p);
        BY_TILES(p->lo, hi, p->u0, p->u1, b, u, NEW)
      }
      meet(p);
      gx += (hi - p->lo) * 3 * units;
    }
  }
}

/* ---- backward --------------------------------------------------------------------------------- */

INLINE int64_t piece_row(const Part *p, int64_t t, int64_t b) { /* in the buffers of the piece */
  const Layer *l = p->layer;
  int64_t start = p->d->reverse ? l->steps - l->last : l->first;
  return l->offsets[t] - l->offsets[start] + b;
}

/* The gates' derivatives of one row as far as no product is needed; dh becomes dh' z. */
INLINE void derive(const Part *p, int64_t t, int64_t b) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  int64_t H = l->hidden, row = l->offsets[t] + b, kept = l->reset_after ? 4 : 3;
  int64_t at_piece = piece_row(p, t, b);
  const float *h0 = state_before(p, t, b);
  for (int64_t at = p->u0; at < p->u1; at += VL) {
    int64_t left = H - at;
    const float *g = d->gates + row * kept * H + at;
    vf r = load(g, left), z = load(g + H, left), n = load(g + 2 * H, left), h = load(h0 + at, left);
    float *dh = d->dh + b * H + at, *dg = d->d_gates_x + at_piece * 3 * H + at;
    vf dh1 = load(dh, left) + load(d->dy + row * l->directions * H + at, left);
    vf dn = dh1 * (1.0f - z) * (1.0f - n * n), dz = dh1 * (h - n) * z * (1.0f - z);
    store(dg + H, left, dz), store(dg + 2 * H, left, dn);
    store(d->state + at_piece * H + at, left, h);
    store(dh, left, dh1 * z);
    if (!l->reset_after) {
      store(d->u + at_piece * H + at, left, r * h);
      continue;
    }
    vf c = load(g + 3 * H, left), dr = dn * c * r * (1.0f - r);
    float *dgh = d->d_gates_h + at_piece * 3 * H + at;
    store(dg, left, dr);
    store(dgh, left, dr), store(dgh + H, left, dz), store(dgh + 2 * H, left, dn * r);
  }
}

/* reset_after=0: du = W_hn^T da_n, with it da_r = du h r (1 - r), and dh += du r; of g tiles. */
INLINE void derive_reset(int m, int g, const Part *p, int64_t t, int64_t b, int64_t u) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  int64_t H = l->hidden, first = piece_row(p, t, b);
  const float *a[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++) a[i] = d->d_gates_x + (first + i) * 3 * H + 2 * H;
  for (int q = 0; q < g; q++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++) s[q][i][v] = (vf){0};
  multiply(m, g, a, d->weight_hh + u * 3 * H + 2 * H * TW, 3 * H * TW, H, s);
  for (int q = 0; q < g; q++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++) {
        int64_t at = u + q * TW + v * VL, left = H - at;
        if (left <= 0) continue;
        vf r = load(d->gates + (l->offsets[t] + b + i) * 3 * H + at, left), du = s[q][i][v];
        vf h = load(d->state + (first + i) * H + at, left);
        float *dh = d->dh + (b + i) * H + at;
        store(d->d_gates_x + (first + i) * 3 * H + at, left, du * h * r * (1.0f - r));
        store(dh, left, load(dh, left) + du * r);
      }
}

/* dh += W_hh^T times the gates' derivatives; zero where the state was reset before the step. */
INLINE void backward_tile(int m, int g, const Part *p, int64_t t, int64_t b, int64_t u) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  int64_t H = l->hidden, first = piece_row(p, t, b);
  const float *a[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++)
    a[i] = (l->reset_after ? d->d_gates_h : d->d_gates_x) + (first + i) * 3 * H;
  for (int q = 0; q < g; q++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++) {
        int64_t at = u + q * TW + v * VL;
        s[q][i][v] = load(d->dh + (b + i) * H + at, H - at);
      }
  multiply(m, g, a, d->weight_hh + u * 3 * H, 3 * H * TW, l->reset_after ? 3 * H : 2 * H, s);
  for (int i = 0; i < m; i++) {
    int reset = d->resets && d->resets[(l->offsets[t] + b + i) * l->directions];
    for (int q = 0; q < g; q++)
      for (int v = 0; v < NV; v++) {
        int64_t at = u + q * TW + v * VL;
        store(d->dh + (b + i) * H + at, H - at, reset ? (vf){0} : s[q][i][v]);
      }
  }
}

static void backward_part(Part *p) {
  const Layer *l = p->layer;
  int64_t H = l->hidden, I = l->inputs, rows = 0;
  for (int64_t s = l->last - 1; s >= l->first; s--) {
    int64_t t = p->d->reverse ? l->steps - 1 - s : s, hi = MAX(p->lo, MIN(p->hi, rows_at(l, t)));
    for (int64_t b = p->lo; b < hi; b++) {
      derive(p, t, b);
      if (!p->d->dx) continue;
      p->from[rows] = p->d->d_gates_x + piece_row(p, t, b) * 3 * H;
      p->to[rows++] = p->d->dx + (l->offsets[t] + b) * I + p->i0;
    }
    meet(p);
#define RESET(m, g) derive_reset(m, g, p, t, b, u)
#define RESET_1(m) RESET(m, 1)
#define BACK(m, g) backward_tile(m, g, p, t, b, u)
#define BACK_1(m) BACK(m, 1)
    if (!l->reset_after) {
      BY_TILES(p->lo, hi, p->u0, p->u1, b, u, RESET)
      meet(p);
    }
    BY_TILES(p->lo, hi, p->u0, p->u1, b, u, BACK)
  }
  if (p->d->dx) product(p->from, p->to, rows, 3 * H, p->i1 - p->i0, p->d->weight_ih + p->i0 * 3 * H, NULL, 0);
}

/* ---- threads ---------------------------------------------------------------------------------- */

/* A child of fork() has none of the threads that its parent's OpenMP still counts on. */
static int forked;
static void in_child(void) { forked = 1; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

/* Where the rows of group g of `groups` begin: groups of about the same number of steps. */
static int64_t cut(const Layer *l, int64_t g, int64_t groups) {
  int64_t B = l->batch, all = l->offsets[l->steps];
  if (g == groups) return B;
  if (all == l->steps * B || g == 0) return B * g / groups;
  int64_t goal = all * g / groups, so_far = 0, b = 0, t = l->steps;
  while (b < B) { /* row b has as many steps as there are steps with more than b rows */
    while (t > 0 && rows_at(l, t - 1) <= b) t--;
    if (so_far + t / 2 >= goal) break;
    so_far += t, b++;
  }
  return b;
}

/* Runs every part of the layer. Returns 0, or 1 where there is no memory. */
static int run(const Layer *l, int backward, int threads) {
  int failed = 0, too_few = 0;
  int64_t D = l->directions, tiles = whole_tiles(l->hidden) / TW;
  int64_t panels = whole_tiles(l->inputs) / TW;
  if (forked || threads < 1) threads = 1;
  /* Groups of rows of each direction; members of a group, who share its units. */
  int64_t groups = MIN((threads + D - 1) / D, (l->batch + MR - 1) / MR);
  int64_t members = MIN(MAX(1, threads / (D * groups)), tiles), items = D * groups * members;
  if (threads == 1) groups = members = 1, items = D;
  int team = (int)MIN(threads, items);
  atomic_long *counts = calloc(D * groups, sizeof *counts);
  float *zeros = calloc(l->hidden, sizeof *zeros);
  Part *parts = calloc(items, sizeof *parts);
  failed = !counts || !zeros || !parts;
  for (int64_t i = 0; i < items && !failed; i++) {
    Part *p = &parts[i];
    int64_t d = i % D, g = i / D / members, j = i / D % members;
    *p = (Part){.layer = l, .d = &l->direction[d], .members = members, .zeros = zeros};
    p->count = &counts[d * groups + g];
    p->lo = cut(l, g, groups), p->hi = cut(l, g + 1, groups);
    p->u0 = tiles * j / members * TW, p->u1 = MIN(l->hidden, tiles * (j + 1) / members * TW);
    p->i0 = panels * j / members * TW, p->i1 = MIN(l->inputs, panels * (j + 1) / members * TW);
    int64_t rows = backward ? (p->hi - p->lo) * (l->last - l->first) : rows_ahead(p);
    p->from = malloc((rows + 1) * sizeof *p->from), p->to = malloc((rows + 1) * sizeof *p->to);
    if (!backward) p->ahead = malloc((rows + 1) * 3 * whole_tiles(p->u1 - p->u0) * 4);
    failed = !p->from || !p->to || (!backward && !p->ahead);
  }
  if (!failed) {
#ifdef _OPENMP
#pragma omp parallel num_threads(team) if (team > 1)
#endif
    {
      int64_t here = 0, all = 1;
#ifdef _OPENMP
      here = omp_get_thread_num(), all = omp_get_num_threads();
#endif
      if (members > 1 && all < items) too_few = 1; /* members wait for one another: all must run */
      else
        for (int64_t i = here; i < items; i += all)
          if (backward) backward_part(&parts[i]);
          else forward_part(&parts[i]);
    }
  }
  for (int64_t i = 0; parts && i < items; i++) free(parts[i].from), free(parts[i].to), free(parts[i].ahead);
  free(counts), free(zeros), free(parts);
  return too_few ? run(l, backward, 1) : failed;
}

int scan_forward(const Layer *l, int threads) { return run(l, 0, threads); }
int scan_backward(const Layer *l, int threads) { return run(l, 1, threads); }

/* ---- gradients of the weights ------------------------------------------------------------------ */

enum { DEEP = 256 }; /* rows that are summed over at a time: both operands' panels in the caches */

/* Rows m0 to m1 of out [M, N] += a^T b over R rows, a [R, M], b [R, N]; sums [M] += a's columns. */
static int outer_part(const float *a, int64_t M, int64_t m0, int64_t m1, const float *b, int64_t N,
                      int64_t R, float *out, float *sums) {
  int64_t rows = m1 - m0;
  float *left = malloc((rows + 1) * DEEP * sizeof *left);
  float *right = malloc(DEEP * whole_tiles(N) * sizeof *right);
  const float **from = malloc((rows + 1) * sizeof *from);
  float **to = malloc((rows + 1) * sizeof *to);
  int failed = !left || !right || !from || !to;
  for (int64_t i = 0; i < rows && !failed; i++) from[i] = left + i * DEEP, to[i] = out + (m0 + i) * N;
  for (int64_t r0 = 0; r0 < R && !failed; r0 += DEEP) {
    int64_t K = MIN(DEEP, R - r0);
    for (int64_t i0 = 0; i0 < rows; i0 += 16)
      for (int64_t k = 0; k < K; k++)
        for (int64_t i = i0; i < MIN(rows, i0 + 16); i++) left[i * DEEP + k] = a[(r0 + k) * M + m0 + i];
    for (int64_t i = 0; i < rows && sums; i++) {
      vf sum = {0};
      for (int64_t k = 0; k < K; k += VL) sum += load(from[i] + k, K - k);
      for (int v = 0; v < VL; v++) sums[m0 + i] += sum[v];
    }
    pack(b + r0 * N, N, 1, K, N, right);
    product(from, to, rows, K, N, right, NULL, 1);
  }
  free(left), free(right), free(from), free(to);
  return failed;
}

/* Rows first to last of out [M, N] += a^T b over R rows; sums [M] += a's columns, or NULL. */
int outer(const float *a, int64_t M, int64_t first, int64_t last, const float *b, int64_t N,
          int64_t R, float *out, float *sums, int threads) {
  int failed = 0;
  int64_t blocks = (last - first + MR - 1) / MR;
  int team = forked ? 1 : (int)MAX(1, MIN(threads, blocks));
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static, 1) reduction(| : failed)
#endif
  for (int i = 0; i < team; i++)
    failed |= outer_part(a, M, first + blocks * i / team * MR,
                         MIN(last, first + blocks * (i + 1) / team * MR), b, N, R, out, sums);
  return failed;
}
