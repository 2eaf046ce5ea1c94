/* The backward: each thread's rows and units through the steps of a piece, then the piece's share in the
   gradients of the weights. */
#pragma once
#include "layer.h"

INLINE int64_t piece_row(const Part *p, int64_t t, int64_t b) { /* in the buffers of the piece */
  const Layer *l = p->layer;
  return offset(l, t) - offset(l, p->reverse ? l->steps - p->last : p->first) + b;
}

/* The gates' derivatives of one row that need no product; dh becomes dh' z. */
static void derive(const Part *p, int64_t t, int64_t b) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  const int64_t H = l->hidden, at_piece = piece_row(p, t, b);
  const float *h0 = state_before(p, t, b), *gates = gates_at(p, t, b);
  const float *dy = l->dy ? l->dy + (row_of(l, t, b) * l->directions + p->reverse) * H : NULL;
  for (int64_t at = p->u0; at < p->u1; at += VL) {
    int64_t left = H - at;
    const float *g = gates + at;
    vf r = load(g, left), z = load(g + H, left), n = load(g + 2 * H, left), h = load(h0 + at, left);
    float *dh = l->dh + state_at(p, b) + at, *dg = d->d_gates_x + at_piece * 3 * H + at;
    vf dh1 = load(dh, left);
    if (dy) dh1 += load(dy + at, left);
    vf dn = dh1 * (1.0f - z) * (1.0f - n * n), dz = dh1 * (h - n) * z * (1.0f - z);
    store(dg + H, left, dz), store(dg + 2 * H, left, dn);
    store(d->state + at_piece * H + at, left, h);
    store(dh, left, dh1 * z);
    if (!l->reset_after) {
      store(d->u_rows + at_piece * H + at, left, r * h);
      continue;
    }
    vf c = load(g + 3 * H, left), dr = dn * c * r * (1.0f - r);
    float *dgh = d->d_gates_h + at_piece * 3 * H + at;
    store(dg, left, dr);
    store(dgh, left, dr), store(dgh + H, left, dz), store(dgh + 2 * H, left, dn * r);
  }
}

/* reset_after=0: du = W_hn^T da_n, with it da_r = du h r (1 - r), and dh += du r; of g tiles. */
static void derive_reset(int m, int g, const Part *p, int64_t t, int64_t b, int64_t u) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  const int64_t H = l->hidden;
  const float *a[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++) a[i] = d->d_gates_x + piece_row(p, t, row(p, b + i)) * 3 * H + 2 * H;
  for (int q = 0; q < g; q++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++) s[q][i][v] = (vf){0};
  multiply(m, g, a, d->weight_hh + u * 3 * H + 2 * H * TW, 3 * H * TW, H, s);
  for (int q = 0; q < g; q++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++) {
        const int64_t at = u + q * TW + v * VL, left = H - at, at_piece = piece_row(p, t, row(p, b + i));
        if (left <= 0) break;
        vf r = load(gates_at(p, t, row(p, b + i)) + at, left), du = s[q][i][v];
        vf h = load(d->state + at_piece * H + at, left);
        float *dh = l->dh + state_at(p, row(p, b + i)) + at;
        store(d->d_gates_x + at_piece * 3 * H + at, left, du * h * r * (1.0f - r));
        store(dh, left, load(dh, left) + du * r);
      }
}

/* dh += W_hh^T times the gates' derivatives of step t; zero where the state was reset before the step.
   from, to: room for `here` pointers. */
static void derive_state(const Part *p, int64_t t, int64_t here, const float **from, float **to) {
  const Layer *l = p->layer;
  const Direction *d = p->d;
  const int64_t H = l->hidden;
  for (int64_t i = 0; i < here; i++) {
    from[i] = d->d_gates_h + piece_row(p, t, row(p, i)) * 3 * H;
    to[i] = l->dh + state_at(p, row(p, i)) + p->u0;
  }
  product(from, to, here, l->reset_after ? 3 * H : 2 * H, p->u1 - p->u0, d->weight_hh + p->u0 * 3 * H,
          3 * H, NULL, 1);
  for (int64_t i = 0; i < here && l->resets; i++)
    if (is_reset(p, t, row(p, i))) memset(to[i], 0, 4 * (p->u1 - p->u0));
}

INLINE float *dx_at(const Part *p, int64_t t, int64_t b) {
  const Layer *l = p->layer;
  return l->dx + (p->reverse * l->rows + row_of(l, t, b)) * l->inputs + p->i0;
}

static void backward_part(Part *p) {
  const Layer *l = p->layer;
  const int64_t H = l->hidden, I = l->inputs;
  if (l->dx && l->lengths && p->last == l->steps) /* once: zeros past the ends of padded rows */
    for (int64_t i = 0, t = l->steps; i < p->count; i++)
      for (int64_t s = t = length_of(l, row(p, i), t); s < l->steps; s++)
        memset(dx_at(p, s, row(p, i)), 0, 4 * (p->i1 - p->i0));
  int64_t rows = 0;
  for (int64_t s = p->last - 1; s >= p->first; s--) {
    const int64_t t = step_of(p, s), here = part_rows(p, t);
    for (int64_t i = 0; i < here; i++) {
      const int64_t b = row(p, i);
      derive(p, t, b);
      if (p->u0 == 0) p->d->x_rows[piece_row(p, t, b)] = l->x + row_of(l, t, b) * I;
    }
    meet(p);
    if (!l->reset_after) {
      EACH_TILES(here, p->u0, p->u1, u, g) EACH_ROWS(0, here, b, m) derive_reset(m, g, p, t, b, u);
      meet(p);
    }
    derive_state(p, t, here, p->from + rows, p->to + rows);
    for (int64_t i = 0; i < here && l->dx; i++) {
      p->from[rows] = p->d->d_gates_x + piece_row(p, t, row(p, i)) * 3 * H;
      p->to[rows++] = dx_at(p, t, row(p, i));
    }
  }
  if (l->dx)
    product(p->from, p->to, rows, 3 * H, p->i1 - p->i0, p->d->weight_ih + p->i0 * 3 * H, 3 * H, NULL, 0);
}

/* ---- gradients of the weights ------------------------------------------------------------------ */

enum { DEEP = 256 }; /* rows that are summed over at a time: both operands' panels in the caches */

typedef struct { /* out [M, N] (+)= a^T b over R rows, a [R, M], b [R, N]; sums [M] (+)= a's columns, or NULL */
  const float *a;
  int64_t M;
  const float *b;        /* or NULL, and its rows one by one: */
  const float **b_rows;
  int64_t N, R;
  float *out, *sums;
  int add;
} Outer;

/* Rows m0 to m1 of `out`. Returns whether an allocation failed. */
static int outer(const Outer *o, int64_t m0, int64_t m1) {
  const int64_t M = o->M, N = o->N, rows = m1 - m0, deep = MIN(DEEP, MAX(1, o->R));
  if (rows <= 0) return 0;
  float *left = malloc(rows * deep * sizeof *left);
  float *right = malloc(deep * whole_tiles(N) * sizeof *right);
  const float **from = malloc(rows * sizeof *from);
  float **to = malloc(rows * sizeof *to);
  int failed = !left || !right || !from || !to;
  for (int64_t i = 0; i < rows && !failed; i++) from[i] = left + i * deep, to[i] = o->out + (m0 + i) * N;
  for (int64_t r0 = 0; (r0 == 0 || r0 < o->R) && !failed; r0 += deep) {
    const int64_t K = MIN(deep, o->R - r0);
    const int add = o->add || r0;
    for (int64_t i0 = 0; i0 < rows; i0 += VL)
      for (int64_t k0 = 0; k0 < K; k0 += VL) {
        vf s[VL];
        for (int k = 0; k < VL; k++)
          s[k] = k < K - k0 ? load(o->a + (r0 + k0 + k) * M + m0 + i0, rows - i0) : (vf){0};
        transpose(s);
        for (int i = 0; i < MIN(VL, rows - i0); i++) store(left + (i0 + i) * deep + k0, K - k0, s[i]);
      }
    for (int64_t i = 0; i < rows && o->sums; i++) {
      vf sum = {0};
      for (int64_t k = 0; k < K; k += VL) sum += load(from[i] + k, K - k);
      float total = add ? o->sums[m0 + i] : 0;
      for (int v = 0; v < VL; v++) total += sum[v];
      o->sums[m0 + i] = total;
    }
    for (int64_t k = 0; k < K; k++) {
      const float *row = o->b ? o->b + (r0 + k) * N : o->b_rows[r0 + k];
      for (int64_t n = 0; n < N; n += TW) {
        float *panel = right + n * K + k * TW;
        for (int v = 0; v < NV; v++)
          *(vf *)(panel + v * VL) = load(row + n + v * VL, N - n - v * VL);
      }
    }
    product(from, to, rows, K, N, right, K, NULL, add);
  }
  free(left), free(right), free(from), free(to);
  return failed;
}
