/* The forward of one thread's rows and units. */
#pragma once
#include "layer.h"

/* Rows whose projected gates a thread computes at a time; at least one step's. */
INLINE int64_t rows_ahead(const Part *p) {
  return MAX(p->count, AHEAD / (3 * MAX(TW, whole_tiles(p->u1 - p->u0))));
}

/* s[q][i] += row a[i] [H] times tile u + q * stride of W_hh, for `tiles` of them: of the gates from
   `gate` on, or (stride TW) of one gate. */
static void hidden(int m, int tiles, int gate, int gates_apart, const Part *p, const float *const *a,
                   int64_t u, vf s[][MR][NV]) {
  const int64_t H = p->layer->hidden, HP = whole_tiles(H);
  if (p->d->weight_hh) {
    const float *w = p->d->weight_hh + (gate * HP + u) * H;
    multiply(m, tiles, a, w, gates_apart ? HP * H : H * TW, H, s);
    return;
  }
  float out[MR][TW];
  for (int q = 0; q < tiles; q++) {
    int64_t at = gates_apart ? u : u + q * TW;
    const float *w = p->layer->parameters[p->reverse].weight_hh;
    dots(m, a, w + ((gate + (gates_apart ? q : 0)) * H + at) * H, H - at, H, out);
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++) s[q][i][v] += *(const vf *)(out[i] + v * VL);
  }
}

/* W_ih x + biases of the part's units at steps s0 to s1 (in this direction's order), gate by gate:
   ahead [rows][3][units], rows in the order of the steps. */
static void project(const Part *p, int64_t s0, int64_t s1) {
  const Layer *l = p->layer;
  const int64_t H = l->hidden, I = l->inputs, units = whole_tiles(p->u1 - p->u0);
  int64_t rows = 0;
  for (int64_t s = s0; s < s1; s++) {
    int64_t t = step_of(p, s), here = part_rows(p, t);
    for (int64_t i = 0; i < here; i++) p->from[rows++] = l->x + row_of(l, t, row(p, i)) * I;
  }
  for (int g = 0; g < 3; g++) {
    const float *bias = p->d->bias_x ? p->d->bias_x + g * H : NULL;
    for (int64_t i = 0; i < rows; i++) p->to[i] = p->ahead + (i * 3 + g) * units;
    if (p->d->weight_ih) {
      product(p->from, p->to, rows, I, p->u1 - p->u0, p->d->weight_ih + (g * whole_tiles(H) + p->u0) * I,
              I, bias ? bias + p->u0 : NULL, 0);
      continue;
    }
    const float *w = l->parameters[p->reverse].weight_ih + g * H * I;
    for (int64_t u = p->u0; u < p->u1; u += TW) EACH_ROWS(0, rows, b, m) {
      float out[MR][TW];
      dots(m, p->from + b, w + u * I, H - u, I, out);
      for (int i = 0; i < m; i++)
        for (int v = 0; v < NV; v++)
          *(vf *)(p->to[b + i] + u - p->u0 + v * VL) =
              *(const vf *)(out[i] + v * VL) + (bias ? load(bias + u + v * VL, H - u - v * VL) : (vf){0});
    }
  }
}

/* One step of m rows of the part from its b-th on and of the units of one tile. gx: the projected gates of the part's rows,
   a row's three gates `units` apart, rows 3 * units apart. */
static void forward_tile(int m, const Part *p, int64_t t, int64_t b, int64_t u, const float *gx,
                         int64_t units) {
  gx += b * 3 * units + (u - p->u0);
  const int64_t H = p->layer->hidden;
  const float *h[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++) h[i] = state_before(p, t, row(p, b + i));
  for (int v = 0; v < NV; v++) {
    vf bias = p->d->bias_h ? load(p->d->bias_h + u + v * VL, H - u - v * VL) : (vf){0};
    for (int i = 0; i < m; i++) {
      s[0][i][v] = *(const vf *)(gx + i * 3 * units + v * VL);
      s[1][i][v] = *(const vf *)(gx + i * 3 * units + units + v * VL);
      s[2][i][v] = bias;
    }
  }
  hidden(m, 3, 0, 1, p, h, u, s);
  for (int i = 0; i < m; i++) {
    float *y = y_at(p, t, row(p, b + i)) + u, *to = p->layer->gates ? gates_at(p, t, row(p, b + i)) + u : NULL;
    for (int v = 0; v < NV; v++) {
      int64_t at = v * VL, left = H - u - at;
      if (left <= 0) break;
      vf r = sigmoid(s[0][i][v]), z = sigmoid(s[1][i][v]), c = s[2][i][v];
      vf n = tanh_(*(const vf *)(gx + i * 3 * units + 2 * units + at) + r * c);
      store(y + at, left, n * (1.0f - z) + z * load(h[i] + u + at, left));
      if (!to) continue;
      store(to + at, left, r), store(to + H + at, left, z), store(to + 2 * H + at, left, n),
          store(to + 3 * H + at, left, c);
    }
  }
}

/* reset_after=0, first half of a step: r and z, and u = r h. z is kept in y until n replaces it. */
static void forward_tile_rz(int m, const Part *p, int64_t t, int64_t b, int64_t u, const float *gx,
                            int64_t units) {
  gx += b * 3 * units + (u - p->u0);
  const int64_t H = p->layer->hidden;
  const float *h[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++) h[i] = state_before(p, t, row(p, b + i));
  for (int i = 0; i < m; i++)
    for (int v = 0; v < NV; v++) {
      s[0][i][v] = *(const vf *)(gx + i * 3 * units + v * VL);
      s[1][i][v] = *(const vf *)(gx + i * 3 * units + units + v * VL);
    }
  hidden(m, 2, 0, 1, p, h, u, s);
  for (int i = 0; i < m; i++) {
    float *y = y_at(p, t, row(p, b + i)) + u, *to = p->layer->gates ? gates_at(p, t, row(p, b + i)) + u : NULL;
    for (int v = 0; v < NV; v++) {
      int64_t at = v * VL, left = H - u - at;
      if (left <= 0) break;
      vf r = sigmoid(s[0][i][v]), z = sigmoid(s[1][i][v]);
      store(p->d->u + row(p, b + i) * H + u + at, left, r * load(h[i] + u + at, left));
      store(y + at, left, z);
      if (to) store(to + at, left, r), store(to + H + at, left, z);
    }
  }
}

/* reset_after=0, second half: n from u, and the state, of g tiles. */
static void forward_tile_n(int m, int g, const Part *p, int64_t t, int64_t b, int64_t u,
                           const float *gx, int64_t units) {
  gx += b * 3 * units + (u - p->u0);
  const int64_t H = p->layer->hidden;
  const float *a[MR];
  vf s[3][MR][NV];
  for (int i = 0; i < m; i++) a[i] = p->d->u + row(p, b + i) * H;
  for (int q = 0; q < g; q++)
    for (int i = 0; i < m; i++)
      for (int v = 0; v < NV; v++)
        s[q][i][v] = *(const vf *)(gx + i * 3 * units + 2 * units + q * TW + v * VL);
  hidden(m, g, 2, 0, p, a, u, s);
  for (int i = 0; i < m; i++) {
    const float *h = state_before(p, t, row(p, b + i)) + u;
    float *y = y_at(p, t, row(p, b + i)) + u, *to = p->layer->gates ? gates_at(p, t, row(p, b + i)) + u : NULL;
    for (int q = 0; q < g; q++)
      for (int v = 0; v < NV; v++) {
        int64_t at = q * TW + v * VL, left = H - u - at;
        if (left <= 0) break;
        vf z = load(y + at, left), n = tanh_(s[q][i][v]);
        store(y + at, left, n * (1.0f - z) + z * load(h + at, left));
        if (to) store(to + 2 * H + at, left, n);
      }
  }
}

/* The last states, and zeros past the ends of padded rows. */
static void finish(const Part *p) {
  const Layer *l = p->layer;
  for (int64_t i = 0, t = l->steps; i < p->count; i++) {
    const int64_t b = row(p, i);
    t = length_of(l, b, t);
    for (int64_t s = t; s < l->steps && l->lengths; s++)
      memset(y_at(p, s, b) + p->u0, 0, 4 * (p->u1 - p->u0));
    const float *from = t == 0 ? l->h0 + state_at(p, b) : y_at(p, p->reverse ? 0 : t - 1, b);
    memcpy(l->last + state_at(p, b) + p->u0, from + p->u0, 4 * (p->u1 - p->u0));
  }
}

static void forward_part(Part *p) {
  const Layer *l = p->layer;
  const int64_t units = whole_tiles(p->u1 - p->u0);
  for (int64_t s = 0; s < l->steps;) {
    int64_t end = s, rows = 0;
    do { /* at least one step */
      rows += part_rows(p, step_of(p, end));
      end++;
    } while (end < l->steps && rows + p->count <= rows_ahead(p));
    project(p, s, end);
    const float *gx = p->ahead;
    for (; s < end; s++) {
      int64_t t = step_of(p, s), here = part_rows(p, t);
      if (l->reset_after)
        for (int64_t u = p->u0; u < p->u1; u += TW)
          EACH_ROWS(0, here, b, m) forward_tile(m, p, t, b, u, gx, units);
      else {
        for (int64_t u = p->u0; u < p->u1; u += TW)
          EACH_ROWS(0, here, b, m) forward_tile_rz(m, p, t, b, u, gx, units);
        meet(p);
        EACH_TILES(here, p->u0, p->u1, u, g)
          EACH_ROWS(0, here, b, m) forward_tile_n(m, g, p, t, b, u, gx, units);
      }
      meet(p);
      gx += here * 3 * units;
    }
  }
  finish(p);
}
