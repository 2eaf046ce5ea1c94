"""Time of GRU on a CPU as ratios to torch.nn.GRU: `python -m benchmarks.layer_cpu`.

With --grid, backend="cpu" against nn.GRU over a grid of shapes: the minimum over short interleaved
rounds, which other load on the machine affects least; on one thread, of CPU time. Fails if "auto"
runs the engine for a shape for which it is not faster.

With --overhead, calls so short that Python matters: T 1 to 4, B 1, H 16, on one thread.

Every repeat runs all implementations one after another, and each is compared with nn.GRU of the
same repeat, so that other load affects all of them. Prints the median of these ratios and the
quartiles.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from triton_gru import GRU, GRUCell
from triton_gru.engines.cpu import library

# (T, B, I, H); the limits below are for the first shape.
SHAPES = [
    (64, 32, 256, 256),
    (64, 32, 128, 128),
    (128, 8, 512, 512),
    (1, 1, 64, 64),
    (200, 1, 64, 64),
]
AUTO_LIMIT = 0.95  # of nn.GRU's time, in the shapes for which "auto" runs the CPU engine
LIMITS = {"auto": AUTO_LIMIT, "reference": 1.3}
LARGE_BATCH = 32  # rows from which a layer should reach the rate of a large product
OVERHEAD_LIMIT = 1.15


def implementations(input_size: int, hidden_size: int) -> dict[str, nn.Module]:
    theirs = nn.GRU(input_size, hidden_size)
    engine = {} if library.obstacle() else {"cpu": GRU.from_torch(theirs, backend="cpu")}
    return {
        "nn.GRU": theirs,
        "auto": GRU.from_torch(theirs),
        **engine,
        "reference": GRU.from_torch(theirs, backend="reference"),
        "reset_before": GRU(input_size, hidden_size, reset_after=False),
    }


def seconds(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, calls: int) -> float:
    """Seconds of a forward and backward, including gradients of input and parameters."""
    start = time.perf_counter()
    for _ in range(calls):
        y, _ = module(x)
        torch.autograd.grad(y, [x, *module.parameters()], dy)
    return (time.perf_counter() - start) / calls


def measure(shape: tuple[int, int, int, int], repeats: int) -> dict[str, list[float]]:
    T, B, I, H = shape  # noqa: E741
    x, dy = torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)
    modules = implementations(I, H)
    calls = 1
    while seconds(modules["nn.GRU"], x, dy, calls) * calls < 0.02:
        calls *= 2
    times = {name: [] for name in modules}
    for repeat in range(repeats + 2):
        # The order rotates, as an implementation's caches depend on the one that ran before.
        names = list(modules)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(seconds(modules[name], x, dy, calls))
    return {name: values[2:] for name, values in times.items()}


def overhead(repeats: int, calls: int = 100) -> None:
    """Prints microseconds of CPU time per call, ours against torch's, in turn."""
    torch.set_num_threads(1)
    layer, cell = nn.GRU(16, 16), nn.GRUCell(16, 16)
    pairs = {"GRU": (layer, GRU.from_torch(layer)), "GRUCell": (cell, GRUCell.from_torch(cell))}

    def call(module: nn.Module, x: torch.Tensor, mode: str) -> None:
        with torch.set_grad_enabled(mode != "no_grad"):
            y = module(x)
        if mode == "backward":
            y[0].sum().backward()

    for name, steps, mode in [
        *(("GRU", steps, mode) for steps in (1, 2, 4) for mode in ("no_grad", "forward")),
        ("GRU", 4, "backward"),
        *(("GRUCell", 1, mode) for mode in ("no_grad", "forward")),
    ]:
        x = torch.randn(steps, 1, 16) if name == "GRU" else torch.randn(1, 16)
        times: dict[nn.Module, list[float]] = {module: [] for module in pairs[name]}
        for _ in range(repeats + 2):
            for module, found in times.items():
                start = time.process_time()
                for _ in range(calls):
                    call(module, x, mode)
                found.append((time.process_time() - start) / calls * 1e6)
        theirs, ours = (values[2:] for values in times.values())
        ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
        mark = f" above {OVERHEAD_LIMIT}!" if ratio > OVERHEAD_LIMIT else ""
        print(
            f"{name:7} T {steps} {mode:8} torch {statistics.median(theirs):6.1f} us  "
            f"ours {statistics.median(ours):6.1f} us  ratio {ratio:.3f}{mark}"
        )


def grid(threads: int, budget: float, variants: bool, steps: list[int]) -> bool:
    """Prints our share of nn.GRU's time for each shape, and the geometric means.

    For "auto" the share is that of the engine, over the shapes for which "auto" runs it; for "auto
    or torch" it is that over all, 1 where "auto" runs nn.GRU's code. "rate" is the engine's, over
    whole layers of at least `LARGE_BATCH` rows, as a share of that of torch's product of two
    matrices of 2048 x 2048.

    Args:
        threads: Of torch.
        budget: Seconds for each figure; at least three rounds.
        steps: The numbers of steps, T.
        variants: Also with reset_after=False, and with lengths of T / 2 to T; the latter's figure
            is the time per step that a row has, divided by a padded row's, by the same engine.

    Returns:
        Whether every shape for which "auto" runs it took at most `AUTO_LIMIT` of nn.GRU's time.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = _product_rate(clock)
    print(f"the best product: {best / 1e9:.0f} GFLOP/s")
    shares: dict[tuple[str, str], list[float]] = {}
    slow = []
    for T, H, B in itertools.product(steps, (32, 64, 128, 256, 512, 1024), (1, 8, 32, 128)):
        theirs, x, dy = nn.GRU(H, H), torch.randn(T, B, H), torch.randn(T, B, H)
        lengths = torch.linspace(max(1, T // 2), T, B).long()
        useful = lengths.sum().item() / (T * B)
        ours = GRU.from_torch(theirs, backend="cpu")
        calls = {"nn.GRU": (theirs, {}), "cpu": (ours, {})}
        if variants:
            calls["before"] = (GRU(H, H, reset_after=False, backend="cpu"), {})
            calls["lengths"] = (ours, {"lengths": lengths})
        print(f"T {T:3} H {H:4} B {B:3}", end="")
        for mode in ("forward", "backward"):
            with torch.set_grad_enabled(mode == "backward"):
                taken = "'cpu'" in GRU.from_torch(theirs).explain(x)
            least = _least_times(calls, x, dy, mode == "backward", budget, clock)
            base = least.pop("nn.GRU")
            print(f"  {mode} {base * 1e6:9.0f} us, auto {'cpu' if taken else 'torch':5}", end="")
            for name, found in least.items():
                share = found / base
                if name == "lengths":
                    share = found / least["cpu"] / useful
                shares.setdefault((mode, name), []).append(share)
                print(f" {name} {share:.3f}", end="")
                if name == "cpu" and B >= LARGE_BATCH and T > 1:
                    operations = 2 * T * B * 6 * H * H * (3 if mode == "backward" else 1)
                    shares.setdefault((mode, "rate"), []).append(operations / found / best)
                if name == "cpu":
                    shares.setdefault((mode, "auto or torch"), []).append(share if taken else 1)
                if name == "cpu" and taken:
                    shares.setdefault((mode, "auto"), []).append(share)
                    if share > AUTO_LIMIT:
                        slow.append(f"T {T} H {H} B {B} {mode} {share:.3f}")
        print(flush=True)
    for (mode, name), values in sorted(shares.items()):
        mean = statistics.geometric_mean(values)
        print(
            f"{mode:8} {name:13} {len(values)} shapes, geometric mean {mean:.3f}, "
            f"largest {max(values):.3f}, least {min(values):.3f}"
        )
    print(f'"auto" takes the engine above {AUTO_LIMIT} in: {"; ".join(slow) or "no shape"}')
    return not slow


def _product_rate(clock: Callable[[], float]) -> float:
    """Operations per second of torch's product of two large matrices, the best of ten."""
    a, b, least = torch.randn(2048, 2048), torch.randn(2048, 2048), float("inf")
    for _ in range(10):
        start = clock()
        a @ b
        least = min(least, clock() - start)
    return 2 * 2048**3 / least


def _least_times(
    calls: dict[str, tuple[nn.Module, dict]],
    x: torch.Tensor,
    dy: torch.Tensor,
    backward: bool,
    budget: float,
    clock: Callable[[], float],
) -> dict[str, float]:
    """The minimum seconds per call of each, in rounds that call all of them in turn."""
    least, number = dict.fromkeys(calls, float("inf")), 1
    x = x.detach().requires_grad_(backward)
    rounds, end = 0, time.perf_counter() + budget
    while rounds < 3 or time.perf_counter() < end:
        for name, (module, options) in calls.items():
            start = clock()
            for _ in range(number):
                with torch.set_grad_enabled(backward):
                    y = module(x, **options)[0]
                if backward:
                    torch.autograd.grad(y, [x, *module.parameters()], dy)
            least[name] = min(least[name], (clock() - start) / number)
        number = max(1, int(0.003 / least["nn.GRU"]))
        rounds += 1
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40, help="of each shape (default: 40)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first ones")
    parser.add_argument("--overhead", action="store_true", help="short calls instead")
    parser.add_argument("--grid", action="store_true", help="the engine over a grid of shapes")
    parser.add_argument(
        "--variants", action="store_true", help="--grid: reset_after=False and lengths too"
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 16, 64, 512], help="--grid: T (default: all)"
    )
    parser.add_argument("--budget", type=float, default=0.5, help="--grid: seconds per figure")
    options = parser.parse_args()
    if options.grid:
        torch.set_num_threads(options.threads)
        found = grid(options.threads, options.budget, options.variants, options.steps)
        raise SystemExit(not found)
    if options.overhead:
        return overhead(options.repeats)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats, float32"
    )
    print(f"{'T':>4} {'B':>3} {'I':>4} {'H':>4}  nn.GRU ms  ratio to it, median (quartiles)")
    for shape in SHAPES[: options.shapes]:
        times = measure(shape, options.repeats)
        base = times.pop("nn.GRU")
        cells = []
        for name, values in times.items():
            ratios = [ours / theirs for ours, theirs in zip(values, base, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            over = shape == SHAPES[0] and middle > LIMITS.get(name, float("inf"))
            mark = f" above {LIMITS[name]}!" if over else ""
            cells.append(f"{name} {middle:.3f} ({low:.3f}-{high:.3f}){mark}")
        T, B, I, H = shape  # noqa: E741
        print(f"{T:4} {B:3} {I:4} {H:4}  {statistics.median(base) * 1e3:9.2f}  {'  '.join(cells)}")


if __name__ == "__main__":
    main()
