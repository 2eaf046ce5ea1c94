/* A GRU layer on a CPU in float32: products and gates of a step together, tile by tile, so that the
   results of a product stay in registers and the first-level cache.

   The rows are divided among the threads, and each thread runs all steps of its rows without waiting.
   With fewer rows than threads, the threads of a group divide the units of its rows and wait for each
   other once per step. Formulas: triton_gru/equations.py. */
#include <pthread.h>
#include <sys/mman.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "backward.h"
#include "forward.h"

/* Operations for which one more thread pays: about 50 us of work. */
enum { WORK = 4 * 1000 * 1000 };

/* ---- memory ----------------------------------------------------------------------------------- */

typedef struct Block { struct Block *next; char pad[64 - sizeof(void *)]; } Block;
typedef struct { Block *blocks; int failed; } Memory;

static void *take(Memory *m, int64_t bytes) { /* aligned to a cache line */
  Block *block = NULL;
  const int64_t huge = 2 << 20, all = sizeof(Block) + MAX(bytes, 0);
  if (posix_memalign((void **)&block, all < huge ? 64 : huge, all)) m->failed = 1;
  if (m->failed) return NULL;
#ifdef MADV_HUGEPAGE /* else the system clears it in pages of 4 KiB, with a page fault each */
  if (all >= huge) madvise(block, all / huge * huge, MADV_HUGEPAGE);
#endif
  block->next = m->blocks, m->blocks = block;
  return block + 1;
}
static float *floats(Memory *m, int64_t n) { return take(m, 4 * n); }
static void release(Memory *m) {
  for (Block *b = m->blocks, *next; b; b = next) next = b->next, free(b);
}

/* ---- preparation ------------------------------------------------------------------------------ */

/* A child of fork() lacks the threads that its copy of OpenMP still lists. */
static int forked;
static void in_child(void) { forked = 1; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

/* The number of rows of each step, and the rows' order. Returns whether lengths or sizes do not fit. */
static int find_rows(Memory *m, Layer *l) {
  const int64_t T = l->steps, B = l->batch, *sizes = l->sizes;
  if (!l->lengths && !sizes) return 0;
  int64_t *offsets = take(m, (T + 1) * sizeof *offsets);
  if (l->lengths) {
    int64_t *order = take(m, B * sizeof *order), *longer = take(m, (T + 1) * sizeof *longer);
    int64_t *next = take(m, (T + 1) * sizeof *next);
    if (m->failed) return 0;
    memset(longer, 0, (T + 1) * sizeof *longer);
    for (int64_t b = 0; b < B; b++) {
      if (l->lengths[b] < 0 || l->lengths[b] > T) return 1;
      if (l->lengths[b]) longer[l->lengths[b] - 1]++;
    }
    for (int64_t t = T - 1; t >= 0; t--) longer[t] += longer[t + 1]; /* rows of more than t steps */
    memcpy(next, longer, (T + 1) * sizeof *next);
    for (int64_t b = 0; b < B; b++) order[next[l->lengths[b]]++] = b;
    sizes = longer, l->order = order;
  }
  if (m->failed) return 0;
  offsets[0] = 0;
  for (int64_t t = 0; t < T; t++) {
    if (sizes[t] < 0 || sizes[t] > (t ? sizes[t - 1] : B)) return 1;
    offsets[t + 1] = offsets[t] + sizes[t];
  }
  l->offsets = offsets;
  return l->sizes && offsets[T] != l->rows;
}

static int64_t panels_of(const Layer *l, int backward, int hidden) {
  return backward && !hidden ? whole_tiles(l->inputs) / TW
                             : whole_tiles(l->hidden) / TW * (backward ? 1 : 3);
}

static void prepare(Memory *m, const Layer *l, Direction *d, const Parameters *p, int backward, int64_t most) {
  const int64_t H = l->hidden, I = l->inputs, HP = whole_tiles(H);
  if (backward) {
    d->weight_hh = floats(m, HP * 3 * H);
    if (l->dx) d->weight_ih = floats(m, whole_tiles(I) * 3 * H);
    d->d_gates_x = floats(m, most * 3 * H), d->state = floats(m, most * H);
    d->d_gates_h = l->reset_after ? floats(m, most * 3 * H) : d->d_gates_x;
    if (!l->reset_after) d->u_rows = floats(m, most * H);
    d->x_rows = take(m, most * sizeof *d->x_rows);
    return;
  }
  if (!FEW(l->steps, H))
    d->weight_hh = floats(m, 3 * HP * H), d->weight_ih = floats(m, 3 * HP * I);
  if (!l->reset_after) d->u = floats(m, l->batch * H);
  if (!p->bias_ih) return;
  d->bias_x = floats(m, 3 * H);
  if (m->failed) return;
  int64_t both = l->reset_after ? 2 * H : 3 * H;
  for (int64_t i = 0; i < 3 * H; i++) d->bias_x[i] = p->bias_ih[i] + (i < both ? p->bias_hh[i] : 0);
  if (l->reset_after) d->bias_h = p->bias_hh + 2 * H;
}

/* Packs one panel of direction r's weights. */
static void pack_one(const Layer *l, Direction *d, int64_t r, int64_t i, int backward) {
  const int64_t H = l->hidden, ih = panels_of(l, backward, 0), tiles = whole_tiles(H) / TW;
  const int hidden = i >= ih;
  const int64_t K = hidden ? H : l->inputs, n = hidden ? i - ih : i;
  const float *w = hidden ? l->parameters[r].weight_hh : l->parameters[r].weight_ih;
  float *out = hidden ? d->weight_hh : d->weight_ih;
  if (!out) return;
  if (backward) pack_columns(w, 3 * H, K, n * TW, out + n * TW * 3 * H);
  else pack_rows(w + n / tiles * H * K, K, H, n % tiles * TW, out + n * TW * K);
}

/* The first step of each piece of about l->piece rows in either direction, and the end. */
static int64_t cut_steps(const Layer *l, int64_t *starts, int64_t *most) {
  int64_t n = 0, start = 0, T = l->steps;
  *most = 0;
  for (int64_t t = 1, size = 0; t <= T; t++) {
    int64_t rows = offset(l, t) - offset(l, start);
    if (l->directions == 2) rows = MAX(rows, offset(l, T - start) - offset(l, T - t));
    if (t - 1 > start && rows > l->piece) starts[n++] = start, start = t - 1, size = 0, t--;
    else size = rows, *most = MAX(*most, size);
  }
  starts[n++] = start, starts[n] = T;
  return n;
}

/* One of `all` threads' share of the rows of the weights' gradients, of both directions. */
static int outers(const Layer *l, const Direction *directions, int64_t first, int64_t last, int add,
                  int64_t here, int64_t all) {
  const int64_t H = l->hidden, both = l->reset_after ? 3 * H : 2 * H;
  int failed = 0;
  for (int64_t r = 0; r < l->directions; r++) {
    const Direction *d = &directions[r];
    const Parameters *p = &l->parameters[r];
    const int64_t R = r ? offset(l, l->steps - first) - offset(l, l->steps - last)
                        : offset(l, last) - offset(l, first);
    Outer of[3] = {
        {d->d_gates_x, 3 * H, NULL, d->x_rows, l->inputs, R, p->dweight_ih, p->dbias_ih, add},
        {d->d_gates_h, 3 * H, d->state, NULL, H, R, p->dweight_hh, p->dbias_hh, add},
        {d->d_gates_h, 3 * H, d->u_rows, NULL, H, R, p->dweight_hh, p->dbias_hh, add},
    };
    const int64_t from[3] = {0, 0, both}, to[3] = {3 * H, both, 3 * H};
    for (int i = 0; i < 3; i++) {
      int64_t blocks = (to[i] - from[i] + MR - 1) / MR;
      failed |= outer(&of[i], from[i] + blocks * here / all * MR,
                      MIN(to[i], from[i] + blocks * (here + 1) / all * MR));
    }
  }
  return failed;
}

/* ---- threads ---------------------------------------------------------------------------------- */

enum { DONE, NO_MEMORY, WRONG_ROWS };

/* Runs every part of the layer. */
static int run(const Layer *given, int backward, int64_t threads) {
  Memory memory = {0}, *m = &memory;
  Layer layer = *given;
  const Layer *l = &layer;
  const int wrong = find_rows(m, &layer);
  if (wrong || m->failed) {
    release(m);
    return wrong ? WRONG_ROWS : NO_MEMORY;
  }
  const int64_t D = l->directions, H = l->hidden, I = l->inputs, tiles = whole_tiles(H) / TW;
  const double work = (backward ? 4.0 : 2.0) * row_count(l) * D * 3 * H * (H + I);
  if (forked || threads < 1) threads = 1;
  threads = MIN(threads, 1 + (int64_t)(work / WORK));
  /* Groups of rows of each direction; members of a group, who share its units. */
  int64_t groups = MAX(1, MIN((threads + D - 1) / D, (l->batch + MR - 1) / MR));
  int64_t members = MIN(MAX(1, threads / (D * groups)), tiles), items = D * groups * members;
  if (threads == 1) groups = members = 1, items = D;
  const int team = (int)threads;

  int64_t most = 0, *starts = take(m, (l->steps + 1) * sizeof *starts);
  const int64_t pieces = m->failed ? 0 : cut_steps(l, starts, &most);
  Direction directions[2] = {0};
  for (int64_t r = 0; r < D; r++) prepare(m, l, &directions[r], &l->parameters[r], backward, most);
  atomic_long *counts = take(m, D * groups * sizeof *counts);
  float *zeros = floats(m, H);
  Part *parts = take(m, items * sizeof *parts);
  if (!m->failed) memset(counts, 0, D * groups * sizeof *counts), memset(zeros, 0, 4 * H);
  for (int64_t i = 0; i < items && !m->failed; i++) {
    Part *p = &parts[i];
    int64_t r = i % D, g = i / D / members, j = i / D % members, panels = whole_tiles(I) / TW;
    *p = (Part){.layer = l, .d = &directions[r], .reverse = r, .members = members, .zeros = zeros};
    p->arrived = &counts[r * groups + g];
    p->lo = l->batch * g / groups, p->stride = 1, p->count = l->batch * (g + 1) / groups - p->lo;
    if (l->offsets) /* every group has long and short rows: about as many at each step */
      p->lo = g, p->stride = groups, p->count = (l->batch - g + groups - 1) / groups;
    p->u0 = tiles * j / members * TW, p->u1 = MIN(H, tiles * (j + 1) / members * TW);
    p->i0 = panels * j / members * TW, p->i1 = MIN(I, panels * (j + 1) / members * TW);
    int64_t rows = backward ? most : MIN(rows_ahead(p), row_count(l));
    p->from = take(m, rows * sizeof *p->from), p->to = take(m, rows * sizeof *p->to);
    if (!backward) p->ahead = floats(m, rows * 3 * whole_tiles(p->u1 - p->u0));
  }

  int failed = m->failed, too_few = 0;
  if (!failed) {
    const int64_t panels = panels_of(l, backward, 0) + panels_of(l, backward, 1);
#ifdef _OPENMP
#pragma omp parallel num_threads(team) if (team > 1)
#endif
    {
      int64_t here = 0, all = 1;
#ifdef _OPENMP
      here = omp_get_thread_num(), all = omp_get_num_threads();
#endif
      if (members > 1 && all < items) { /* members wait for each other: all must run */
        if (here == 0) too_few = 1;
      } else {
        for (int64_t i = here; i < D * panels; i += all)
          pack_one(l, &directions[i % D], i % D, i / D, backward);
#pragma omp barrier
        if (!backward)
          for (int64_t i = here; i < items; i += all) forward_part(&parts[i]);
        else
          for (int64_t n = pieces - 1; n >= 0; n--) {
            for (int64_t i = here; i < items; i += all) {
              parts[i].first = starts[n], parts[i].last = starts[n + 1];
              backward_part(&parts[i]);
            }
#pragma omp barrier
            if (l->parameters[0].dweight_hh &&
                outers(l, directions, starts[n], starts[n + 1], n < pieces - 1, here, all)) {
#pragma omp atomic write
              failed = 1;
            }
#pragma omp barrier
          }
      }
    }
  }
  release(m);
  return too_few ? run(given, backward, 1) : failed ? NO_MEMORY : DONE;
}

int scan_forward(const Layer *l) { return run(l, 0, l->threads); }
int scan_backward(const Layer *l) { return run(l, 1, l->threads); }
