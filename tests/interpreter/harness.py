"""A Triton interpreter in which programs wait for each other, on a memory that may be late.

The stock interpreter runs one program after another, so a kernel that waits for its neighbours
never ends. Here each program is a thread. One runs at a time; at every atomic and every volatile
load it hands over to a program that a seeded generator picks. So a seed is an interleaving.

Memory is weaker than any GPU's, on purpose. A store goes to the program's own buffer. Its elements
become visible one by one, in random order, at later hand-overs, its own or after its end; all of
them at an atomic with release. A program does not see its own buffered stores either, as Triton
does not order a program's store against its later load. What a missing release, a wait that looks
at one element of a tile, or a value read back instead of kept, would do on rare occasions on a
GPU, it does here on most seeds.

A missing wait shows as a wrong value (poisoned memory holds NaN), a missing signal as `Deadlock`,
which names for each program the line it waits on and the elements it waits for. An access outside
the memory of every argument is `OutOfBounds`.

Works on Triton 3.6, 3.7 and 3.9 (their interpreter's memory hooks differ in trailing arguments
only). It also mends three things of the stock interpreter that would blur a comparison: float32 to
bfloat16 loses the carry out of the mantissa (1.998 becomes 1.0), `tl.dot` multiplies the bit
patterns of bfloat16 operands as integers, and tf32 is not rounded to its 10 bits.
"""

import contextlib
import inspect
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

# A program that has looked so often at the same place since memory last changed is stuck. When all
# are, and no store is under way, it is a deadlock.
LOOKS_WITHOUT_CHANGE = 3
# Chances, one of which a launch draws, that the next program is one whose last look is older than
# the last change of memory: from half of all waits timing out, to hardly any.
FRESH_CHANCES = (0.0, 0.5, 0.9)
# Chance that a hand-over makes some of a program's buffered stores visible.
FLUSH_CHANCE = 0.5

_stock_load = interpreter.InterpreterBuilder.create_masked_load
_stock_store = interpreter.InterpreterBuilder.create_masked_store
_stock_cas = interpreter.InterpreterBuilder.create_atomic_cas
_stock_rmw = interpreter.InterpreterBuilder.create_atomic_rmw
_stock_convert = interpreter._convert_float
_stock_numpy_dtype = interpreter._get_np_dtype
_numpy_dtypes: dict[str, np.dtype] = {}


class Deadlock(AssertionError):
    """No program can go on. The message names each one, the line it is at and what it lacks."""


class OutOfBounds(AssertionError):
    """A program touched memory that belongs to no argument."""


class _Stop(BaseException):
    """Unwinds a program's thread; no `except Exception` of the interpreter may catch it."""


@dataclass
class Run:
    """What one launch did: for tests that want to know that programs did wait."""

    seed: int
    programs: int
    handovers: int = 0
    waits: int = 0  # looks that had to be repeated
    kernels: list[str] = field(default_factory=list)


class _Program:
    def __init__(self, number: int, index: tuple[int, int, int]):
        self.number = number
        self.index = index
        self.baton = threading.Semaphore(0)
        self.stores: list[list[np.ndarray]] = []  # [addresses, values, still buffered]
        # Since memory last changed: hand-overs, looks at each place, and what the looks found.
        self.passed = 0
        self.looks: dict[tuple, int] = {}
        self.found: dict[tuple, Callable[[], str | None]] = {}
        self.last: tuple = ("its start",)
        self.seen: dict[tuple, np.ndarray] = {}
        self.done = False

    @property
    def stuck(self) -> bool:
        return self.done or max(self.looks.values(), default=0) >= LOOKS_WITHOUT_CHANGE

    def describe(self) -> str:
        if self.done:
            return "is done"
        lacks = [text for text in (found() for found in self.found.values()) if text]
        return "; ".join(lacks[:2]) or f"is at {self.last[0]}"


class _Scheduler:
    """The programs of one launch, one of which holds the baton."""

    def __init__(self, indices, body: Callable[[], None], tensors, seed: int, detect: bool):
        self.random = random.Random(seed)
        self.numpy = np.random.default_rng(seed)
        self.fresh_chance = self.random.choice(FRESH_CHANCES)
        self.programs = [_Program(i, index) for i, index in enumerate(indices)]
        self.body = body
        self.tensors = tensors
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()}
        self.spans = np.array(
            sorted((at, at + s.nbytes()) for at, s in storages.items()), np.uint64
        )
        self.detect = detect
        self.stopping = False
        self.finished = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.run = Run(seed, len(self.programs))

    # -- the life of a launch ---------------------------------------------------------------

    def execute(self) -> Run:
        threads = [threading.Thread(target=self._live, args=(p,)) for p in self.programs]
        for thread in threads:
            thread.start()
        self.random.choice(self.programs).baton.release()
        self.finished.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return self.run

    def _live(self, program: _Program) -> None:
        program.baton.acquire()
        try:
            if not self.stopping:
                _current.program = program
                _current.scheduler = self
                _current.grid_idx = program.index
                self.body()  # stores that are still buffered become visible later, or at the end
        except _Stop:
            pass
        except BaseException as error:
            self.failure = self.failure or error
            self.stopping = True
        program.done = True
        self._progress()
        following = self._next()
        if following is None:
            for ended in self.programs:
                self._flush(ended, everything=True)
            self.finished.release()
        else:
            following.baton.release()

    def _next(self) -> _Program | None:
        """Mostly one that has not looked at memory since it last changed: it may get on."""
        live = [p for p in self.programs if not p.done]
        if live and self.random.random() < self.fresh_chance:
            least = min(p.passed for p in live)
            live = [p for p in live if p.passed == least]
        return self.random.choice(live) if live else None

    def _progress(self) -> None:
        for program in self.programs:
            program.passed = 0
            program.looks.clear()
            program.found.clear()

    def hand_over(self, place: tuple) -> None:
        """Called by a program before an atomic or a volatile load; `place` is what it looks at."""
        program = _current.program
        self.run.handovers += 1
        program.last = place
        program.passed += 1
        program.looks[place] = program.looks.get(place, 0) + 1
        for other in self.programs:
            may = other.stores and (other is program or other.done)
            if may and self.random.random() < FLUSH_CHANCE:
                self._flush(other, everything=False)
        if self.detect and all(p.stuck for p in self.programs):
            buffered = [p for p in self.programs if p.stores]
            if buffered:
                for p in buffered:
                    self._flush(p, everything=True)
            else:
                self.stopping = True
                self.failure = Deadlock(self._describe())
                raise _Stop
        following = self._next()
        if following is not program:
            following.baton.release()
            program.baton.acquire()
        if self.stopping:
            raise _Stop

    def _describe(self) -> str:
        lines = [f"seed {self.run.seed}: no program can go on"]
        for p in self.programs:
            lines.append(f"  program {p.index} {p.describe()}")
        return "\n".join(lines)

    # -- memory -----------------------------------------------------------------------------

    def check_inside(self, addresses: np.ndarray, mask: np.ndarray, what: str) -> None:
        """Refuses an access outside the memory of every argument."""
        wanted = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.uint64)
        span = np.searchsorted(self.spans[:, 0], wanted, side="right").astype(np.int64) - 1
        outside = (span < 0) | (wanted >= self.spans[np.maximum(span, 0), 1])
        if outside.any():
            program = _current.program
            raise OutOfBounds(
                f"program {program.index} {what} {outside.sum()} of {wanted.size} elements outside "
                f"every argument: {_where()}"
            )

    def buffer(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        program = _current.program
        shape = np.broadcast_shapes(addresses.shape, values.shape, mask.shape)
        arrays = (addresses, values, mask)
        flat = [np.broadcast_to(a, shape).ravel().copy() for a in arrays]
        if any(np.isin(flat[0][flat[2]], old[0][old[2]]).any() for old in program.stores):
            self._flush(program, everything=True)  # a location keeps its order
        program.stores.append(flat)

    def _flush(self, program: _Program, everything: bool) -> None:
        left = []
        for addresses, values, mask in program.stores:
            share = 1.0 if everything else self.random.choice((0.25, 0.75, 1.0, 1.0))
            now = mask & (self.numpy.random(mask.shape) < share)
            if now.any():
                interpreter._interpreter.store(addresses, values, now)
                self._progress()
            mask = mask & ~now
            if mask.any():
                left.append([addresses, values, mask])
        program.stores = left

    def release(self) -> None:
        self._flush(_current.program, everything=True)

    def name(self, address: int) -> str:
        """The element at an address, as an argument of the kernel."""
        for argument, tensor in self.tensors.items():
            first = tensor.data_ptr()
            span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            if tensor.numel() and first <= address < first + span * tensor.element_size():
                at, index = (address - first) // tensor.element_size(), []
                for stride in tensor.stride():
                    index.append(at // stride)
                    at %= stride
                return f"{argument}{index}"
        return hex(address)


class _Current(threading.local):
    program: _Program | None = None
    scheduler: _Scheduler | None = None
    grid_idx = None


_current = _Current()
_settings = {"seed": 0, "detect": True}
runs: list[Run] = []


@contextlib.contextmanager
def interleaving(seed: int, detect: bool = True) -> Iterator[list[Run]]:
    """Launches inside use the seed; yields the list in which each leaves its `Run`.

    Args:
        seed: Picks the interleaving and when stores become visible.
        detect: Whether to raise `Deadlock`. Off to let the kernel's own bounded polls run out.
    """
    before, first = dict(_settings), len(runs)
    _settings.update(seed=seed, detect=detect)
    seen: list[Run] = []
    try:
        yield seen
    finally:
        _settings.update(before)
        seen.extend(runs[first:])
        del runs[first:]


# -- the interpreter's hooks ----------------------------------------------------------------


def _where() -> str:
    """The line of the kernel that called, and through which of its helpers."""
    frames = []
    frame = inspect.currentframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "triton_gru" in path or "test_" in path.rsplit("/", 1)[-1]:
            frames.append(f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(frames[:3])


def _as_mask(handle):
    """Booleans: the stock interpreter's own comparisons sometimes leave integers, 3.9 refuses."""
    return interpreter.TensorHandle(handle.data.astype(bool), tl.int1)


def _masked_load(self, ptrs, mask, other, *rest):
    mask = _as_mask(mask)
    scheduler, volatile = _current.scheduler, bool(rest[-1])
    if scheduler is not None:
        scheduler.check_inside(ptrs.data, mask.data, "reads")
    if scheduler is None or not volatile:
        return _stock_load(self, ptrs, mask, other, *rest)
    place = (_where(), int(ptrs.data.flat[0]), ptrs.data.size)
    scheduler.hand_over(place)
    result = _stock_load(self, ptrs, mask, other, *rest)
    wanted = ptrs.data[mask.data]
    values = result.data[mask.data]
    # A second look at the same elements, or at a scalar that is as it was, is a wait.
    earlier = _current.program.seen.get(place)
    scheduler.run.waits += earlier is not None and bool(
        values.size > 1 or (values == earlier).all()
    )
    _current.program.seen[place] = values

    def found() -> str | None:
        if values.size == 1:
            return f"waits on {scheduler.name(int(wanted[0]))} = {values[0]} at {place[0]}"
        unsigned = np.dtype(f"u{values.itemsize}")
        missing = wanted[values.view(unsigned) == np.iinfo(unsigned).max]
        some = ", ".join(scheduler.name(int(a)) for a in missing[:3])
        lack = f"lacks {missing.size} of {wanted.size} elements, first {some}, at {place[0]}"
        return lack if missing.size else None

    _current.program.found[place] = found
    return result


def _masked_store(self, ptrs, value, mask, *rest):
    mask = _as_mask(mask)
    if _current.scheduler is None:
        return _stock_store(self, ptrs, value, mask, *rest)
    _current.scheduler.check_inside(ptrs.data, mask.data, "writes")
    return _current.scheduler.buffer(ptrs.data, np.asarray(value.data), mask.data)


def _releases(sem) -> bool:
    return sem in (
        interpreter._ir.MEM_SEMANTIC.RELEASE,
        interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE,
    )


def _atomic(stock, sem_at: int):
    def atomic(self, *args):
        scheduler = _current.scheduler
        if scheduler is None:
            return stock(self, *args)
        ptr = args[0] if stock is _stock_cas else args[1]
        scheduler.hand_over((_where(), int(ptr.data.flat[0]), ptr.data.size))
        if _releases(args[sem_at]):
            scheduler.release()
        result = stock(self, *args)
        every = np.ones_like(ptr.data, dtype=bool)
        kind = result.data.dtype
        seen = interpreter._interpreter.load(ptr.data, every, np.zeros_like(result.data), kind)
        if not np.array_equal(seen, result.data):
            scheduler._progress()
        return result

    return atomic


def _convert(value, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(value).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)
    if source == tl.bfloat16 and target == tl.float32:
        return np.ascontiguousarray(value).astype(np.uint32) << 16
    return _stock_convert(value, source, target, rounding)


def _as_float32(handle, input_precision) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (np.ascontiguousarray(handle.data).astype(np.uint32) << 16).view(np.float32)
    values = np.ascontiguousarray(handle.data).astype(np.float32)
    if handle.dtype.scalar == tl.float32 and "TF32" in str(input_precision).upper().split("."):
        bits = values.view(np.uint32) + np.uint32(0x0FFF) + ((values.view(np.uint32) >> 13) & 1)
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return values


def _dot(self, a, b, d, input_precision, *rest):
    with np.errstate(invalid="ignore", over="ignore"):
        left, right = _as_float32(a, input_precision), _as_float32(b, input_precision)
        return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


def _numpy_dtype(dtype) -> np.dtype:
    """As stock, which builds a table at each call: a tenth of a test's time."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    if scalar.name not in _numpy_dtypes:
        _numpy_dtypes[scalar.name] = _stock_numpy_dtype(scalar)
    return _numpy_dtypes[scalar.name]


def _device_call(self, *args, **kwargs):
    """A helper's call. The launch has patched triton.language already; stock does it each time."""
    return self.rewrite()(*args, **kwargs)


# What `_patch_lang` looks at of a function; both names, as triton's own helpers say `core`.
_LANGUAGE = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


class _ThreadedGrid(interpreter.GridExecutor):
    def __call__(self, *args_dev, **kwargs):
        names = inspect.getfullargspec(self.fn).args
        kwargs = {k: v for k, v in kwargs.items() if k in names}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        given = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
        tensors = {k: v for k, v in given.items() if hasattr(v, "data_ptr")}
        args = {
            k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()
        }
        grid = self.grid(args) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        patches = interpreter._patch_lang(_LANGUAGE)
        try:
            scheduler = _Scheduler(
                list(np.ndindex(*grid)),
                lambda: self.fn(**args),
                tensors,
                _settings["seed"],
                _settings["detect"],
            )
            run = scheduler.execute()
        finally:
            patches.restore()
        run.kernels.append(self.fn.__name__)
        runs.append(run)
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)


def install() -> None:
    """Puts the harness in the stock interpreter's place, for the life of the process."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    builder = interpreter.InterpreterBuilder
    builder.grid_idx = property(
        lambda self: _current.grid_idx, lambda self, value: setattr(_current, "grid_idx", value)
    )
    builder.create_masked_load = _masked_load
    builder.create_masked_store = _masked_store
    builder.create_atomic_cas = _atomic(_stock_cas, 3)
    builder.create_atomic_rmw = _atomic(_stock_rmw, 4)
    builder.create_dot = _dot
    interpreter._convert_float = _convert
    interpreter._get_np_dtype = _numpy_dtype
    # Else every 32-bit sum is computed again in 64 bits, to see whether it overflows, which no
    # index of a test's size does: half of a test's time.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    interpreter.InterpretedFunction.__call__ = _device_call
    interpreter.GridExecutor = _ThreadedGrid
    # Thousands of short hand-overs: the default 5 ms slice would be waited out now and then.
    sys.setswitchinterval(1e-4)
