/* The arguments from Python (engine.py packs them, field by field), and one thread's part of them. */
#pragma once
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "products.h"

/* Floats of projected gates that a thread computes before its scan: half of a second-level cache. */
enum { AHEAD = 128 * 1024 };
/* With fewer steps packing a weight costs more than it saves: measured with 1 to 128 rows.
   Independent of the number of rows, on which the bits of a row must not depend. */
#define FEW(steps, hidden) ((steps) == 1 || ((steps) <= 4 && 64 * (steps) <= (hidden)))

typedef struct { /* the parameters of one direction; biases may be NULL */
  const float *weight_ih, *weight_hh; /* [3H, I], [3H, H] */
  const float *bias_ih, *bias_hh;     /* [3H] */
  float *dweight_ih, *dweight_hh, *dbias_ih, *dbias_hh;
} Parameters;

/* Tensors are row-major, float but for resets. N rows in all: row b of step t is the one at `row_of`,
   in x, y, dy, dx, gates and resets alike. */
typedef struct {
  int64_t steps, batch, inputs, hidden, directions, reset_after, threads;
  int64_t piece;           /* backward: rows whose derivatives are computed before the weights' sum them */
  int64_t rows;            /* N */
  int64_t to_step, to_row; /* padded rows, N = steps * batch: from one step, or row, to the next */
  const int64_t *lengths;  /* [batch]: the steps of each padded row, past which y and dx are zero; or NULL */
  const int64_t *sizes;    /* [steps]: of a PackedSequence, which has no padding, its batch_sizes; or NULL */
  const float *x;          /* [N, I] */
  const uint8_t *resets;   /* [N, D], or NULL */
  const float *h0;         /* [D, B, H] */
  float *y;                /* [N, D * H] */
  float *last;             /* [D, B, H]: each row's state after its last step */
  float *gates;            /* [D, N, 3 or 4, H]: r, z, n, c; NULL if they are not saved */
  const float *dy;         /* [N, D * H], or NULL */
  float *dx;               /* [D, N, I], or NULL */
  float *dh;               /* [D, B, H]: in, the last states' derivative; out, that of h0 */
  Parameters parameters[2];
  /* What `find_rows` makes of lengths or sizes, else NULL: */
  const int64_t *offsets;  /* [steps + 1]: how many rows the steps before each have */
  const int64_t *order;    /* [batch]: where the rows, longest first, are in the tensors; NULL if sorted */
} Layer;

typedef struct { /* one direction, packed */
  float *weight_ih, *weight_hh;  /* panels: forward of each gate's W^T, NULL with few steps; backward of W */
  float *bias_x;                 /* [3H]: of both products, but for n with reset_after */
  const float *bias_h;           /* [H]: of c, with reset_after alone, or NULL */
  float *u;                      /* forward, reset_after=0: r h, [B, H] */
  /* Backward, [rows of the piece, 3H or H]. The derivatives of both products are one without reset_after;
     state: h before the step, zero at a reset; u: r h. */
  float *d_gates_x, *d_gates_h, *state, *u_rows;
  const float **x_rows;          /* [rows of the piece] */
} Direction;

typedef struct { /* one thread's part: some rows, and units u0 to u1 (both with whole tiles) */
  const Layer *layer;
  const Direction *d;
  int64_t reverse;                /* which direction: 0 or 1 */
  int64_t lo, stride, count;      /* its rows: lo, lo + stride, ... */
  int64_t u0, u1, i0, i1;         /* i0, i1: of dx, the columns */
  int64_t first, last;            /* backward: the steps of the piece, in the order of the direction */
  int64_t members, round;
  atomic_long *arrived;
  float *ahead;                   /* [most][3][units] */
  const float **from;             /* [most] */
  float **to;                     /* [most] */
  const float *zeros;             /* [H] */
} Part;

INLINE int64_t offset(const Layer *l, int64_t t) { return l->offsets ? l->offsets[t] : t * l->batch; }
INLINE int64_t rows_at(const Layer *l, int64_t t) {
  return l->offsets ? l->offsets[t + 1] - l->offsets[t] : l->batch;
}
/* Everywhere row b is the b-th longest: the rows of step t are 0 to rows_at(l, t). */
INLINE int64_t place(const Layer *l, int64_t b) { return l->order ? l->order[b] : b; }
INLINE int64_t row_of(const Layer *l, int64_t t, int64_t b) {
  return l->sizes ? l->offsets[t] + b : t * l->to_step + place(l, b) * l->to_row;
}
INLINE int64_t row_count(const Layer *l) { return offset(l, l->steps); }
INLINE int64_t kept(const Layer *l) { return l->reset_after ? 4 : 3; }
/* The i-th row of a part, and how many of them step t has. */
INLINE int64_t row(const Part *p, int64_t i) { return p->lo + i * p->stride; }
INLINE int64_t part_rows(const Part *p, int64_t t) {
  const int64_t below = MAX(0, rows_at(p->layer, t) - p->lo);
  return MIN(p->count, (below + p->stride - 1) / p->stride);
}
INLINE int64_t step_of(const Part *p, int64_t s) { return p->reverse ? p->layer->steps - 1 - s : s; }
INLINE int is_reset(const Part *p, int64_t t, int64_t b) {
  const Layer *l = p->layer;
  return l->resets && l->resets[row_of(l, t, b) * l->directions + p->reverse];
}
INLINE float *y_at(const Part *p, int64_t t, int64_t b) {
  const Layer *l = p->layer;
  return l->y + (row_of(l, t, b) * l->directions + p->reverse) * l->hidden;
}
INLINE float *gates_at(const Part *p, int64_t t, int64_t b) {
  const Layer *l = p->layer;
  return l->gates + (p->reverse * l->rows + row_of(l, t, b)) * kept(l) * l->hidden;
}
INLINE int64_t state_at(const Part *p, int64_t b) { /* in h0, last and dh */
  return (p->reverse * p->layer->batch + place(p->layer, b)) * p->layer->hidden;
}

/* The state before step t of row b: that after the step before, the first one, or zero. */
INLINE const float *state_before(const Part *p, int64_t t, int64_t b) {
  const Layer *l = p->layer;
  if (is_reset(p, t, b)) return p->zeros;
  int64_t before = p->reverse ? t + 1 : t - 1;
  if (before < 0 || before >= l->steps || b >= rows_at(l, before)) return l->h0 + state_at(p, b);
  return y_at(p, before, b);
}

/* The steps of row b, looked for from `t` down, which is at least that many. */
INLINE int64_t length_of(const Layer *l, int64_t b, int64_t t) {
  while (t > 0 && rows_at(l, t - 1) <= b) t--;
  return t;
}

static void meet(Part *p) {
  if (p->members < 2) return;
  long goal = ++p->round * p->members;
  atomic_fetch_add_explicit(p->arrived, 1, memory_order_acq_rel);
  for (int i = 0; atomic_load_explicit(p->arrived, memory_order_acquire) < goal; i++)
    if (i > 2000) sched_yield(); /* another process may run on the other thread's core */
}
