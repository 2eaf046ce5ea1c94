"""Time of rows of unequal length on a CPU: `python -m benchmarks.lengths_cpu`.

Lengths are uniform between 0.3 and 1 of T. Each implementation is compared with torch.nn.GRU over
the same rows padded, in the same repeat, forward and backward together and forward alone. Packed
ones start and end with padded rows, as the others. Prints the median of the ratios and the
quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from triton_gru import GRU

# (T, B, I, H, layers, bidirectional)
SHAPES = [
    (64, 32, 256, 256, 1, False),
    (64, 32, 128, 128, 2, True),
    (200, 16, 64, 64, 1, False),
]
LIMIT = 1.2  # of the padded time, for lengths= in training


def implementations(
    x: Tensor, lengths: Tensor, theirs: nn.GRU
) -> dict[str, tuple[nn.Module, Callable]]:
    ours = GRU.from_torch(theirs)

    def packed(module: nn.Module) -> tuple[Tensor, Tensor]:
        y, h_n = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y, total_length=len(x))[0], h_n

    return {
        "nn.GRU padded": (theirs, lambda: theirs(x)),
        "nn.GRU packed": (theirs, lambda: packed(theirs)),
        "GRU padded": (ours, lambda: ours(x)),
        "GRU packed": (ours, lambda: packed(ours)),
        "GRU lengths": (ours, lambda: ours(x, lengths=lengths)),
    }


def seconds(module: nn.Module, run: Callable, x: Tensor, train: bool, clock: Callable) -> float:
    start = clock()
    if train:
        y, h_n = run()
        torch.autograd.grad(y.sum() + h_n.sum(), [x, *module.parameters()])
    else:
        with torch.no_grad():
            run()
    return clock() - start


def measure(shape: tuple, repeats: int, train: bool, clock: Callable) -> dict[str, list[float]]:
    T, B, I, H, layers, bidirectional = shape  # noqa: E741
    x = torch.randn(T, B, I, requires_grad=train)
    lengths = (T * (0.3 + 0.7 * torch.rand(B))).ceil().long()
    runs = implementations(x, lengths, nn.GRU(I, H, layers, bidirectional=bidirectional))
    times = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        # The order rotates, as an implementation's caches depend on the one that ran before.
        names = list(runs)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(seconds(*runs[name], x, train, clock))
    return {name: values[2:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="of each shape (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure CPU time, for a machine with other load",
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats, float32"
    )
    print("ratios to nn.GRU over the same rows padded: median (quartiles)")
    for shape in SHAPES:
        T, B, I, H, layers, bidirectional = shape  # noqa: E741
        for train in (True, False):
            times = measure(shape, options.repeats, train, clock)
            base = times.pop("nn.GRU padded")
            kind = "forward and backward" if train else "forward"
            directions = "both directions" if bidirectional else "one direction"
            print(
                f"T {T} B {B} I {I} H {H}, {layers} layers, {directions}, {kind}: "
                f"{statistics.median(base) * 1e3:.2f} ms padded"
            )
            for name, values in times.items():
                ratios = [one / padded for one, padded in zip(values, base, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                over = train and name == "GRU lengths" and middle > LIMIT
                mark = f" above {LIMIT}!" if over else ""
                print(f"  {name:13} {middle:.2f} ({low:.2f}-{high:.2f}){mark}")


if __name__ == "__main__":
    main()
