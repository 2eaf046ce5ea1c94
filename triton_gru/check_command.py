"""The command `python -m triton_gru check`: measures the kernels on this machine's GPU."""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Sequence

import torch

from triton_gru.verdicts import checks
from triton_gru.verdicts.environment import environment
from triton_gru.verdicts.measuring import MODES, Outcome
from triton_gru.verdicts.shapes import ShapeClass
from triton_gru.version import __version__

HIDDEN_SIZES, BATCH_SIZES, DTYPES = (256, 512, 1024), (16, 64, 256), ("bfloat16", "tf32")
QUICK = (512, 32, "bfloat16")
EVERY_DTYPE = ("float32", "tf32", "float16", "bfloat16")

DESCRIPTION = """\
Checks the Triton kernels on this GPU against the equations and times them against cuDNN,
each class of shapes in a process of its own. backend="auto" then takes them where they are
at least 10 % faster. Without --quick and sizes: a grid of usual ones.
"""
EXIT_STATUS = """\
exit status:
  0  every class passed, whichever of the two is faster
  1  the kernels failed the check of a class; what to report is printed
  2  nothing was measured: there is no GPU, or the arguments are wrong
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    root = argparse.ArgumentParser(prog="python -m triton_gru")
    commands = root.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check",
        help="measure the Triton kernels against cuDNN on this GPU",
        description=DESCRIPTION,
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("--quick", action="store_true", help="one model's class, not a grid")
    check.add_argument("--hidden-size", type=_size, nargs="+", metavar="H")
    check.add_argument(
        "--batch-size", type=_size, nargs="+", metavar="B", help="up to the next power of two each"
    )
    check.add_argument(
        "--dtype",
        choices=EVERY_DTYPE,
        nargs="+",
        help="tf32: float32 tensors as torch multiplies them unless told otherwise; "
        "float32: with torch.backends.cudnn.allow_tf32=False",
    )
    check.add_argument("--bidirectional", action="store_true")
    check.add_argument("--reset-before", action="store_true", help="reset_after=False")
    check.add_argument("--device", default="cuda", help="cuda, or for instance cuda:1")
    return root


def _size(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def classes(arguments: argparse.Namespace) -> list[ShapeClass]:
    """The classes that the arguments name."""
    quick = arguments.quick
    hidden_sizes = arguments.hidden_size or (QUICK[:1] if quick else HIDDEN_SIZES)
    batch_sizes = arguments.batch_size or (QUICK[1:2] if quick else BATCH_SIZES)
    names = arguments.dtype or (QUICK[2:] if quick else DTYPES)
    found: dict[ShapeClass, None] = {}
    for dtype, hidden, batch in itertools.product(names, hidden_sizes, batch_sizes):
        shape = ShapeClass(
            reset_after=not arguments.reset_before,
            dtype=dtype,
            hidden=hidden,
            directions=2 if arguments.bidirectional else 1,
            batch=1 << (batch - 1).bit_length(),
        )
        found[shape] = None
    return list(found)


def main(arguments: Sequence[str] | None = None, measure: checks.Measure | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Of the command line; None: those of this process.
        measure: What measures a class.

    Returns:
        The exit status, see EXIT_STATUS.
    """
    given = parser().parse_args(arguments)
    obstacle = _obstacle(given.device)
    if obstacle is not None:
        print(f"nothing to measure: {obstacle}", file=sys.stderr)
        return 2
    device = torch.device(given.device)
    where = environment(device)
    print(where)
    found = checks.measured(classes(given), device, measure)
    print("\n".join(table(found)))
    failures = [(shape, o.failure) for shape, o in found if o.failure is not None]
    if failures:
        print("\nThe kernels failed, and are not used for these. To report it, paste:")
    for shape, failure in failures:
        print(f"triton_gru {__version__} | {where} | {shape.describe()}: {failure}")
    if failures:
        return 1
    return 0 if any(outcome.verdicts for _, outcome in found) else 2


def _obstacle(name: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton-gru[triton]')"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        return str(error)
    if torch.version.hip is not None:
        return "the kernels are not enabled on AMD GPUs"
    if device.type == "cuda" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        return None if (device.index or 0) < count else f"there are {count} GPUs here, no {name}"
    return 'there is no CUDA GPU here; on a CPU backend="auto" needs no measurement'


def table(found: Sequence[tuple[ShapeClass, Outcome]]) -> list[str]:
    """A line for each class and mode."""
    other = found[0][0].competitor if found else "cuDNN"
    rows = [("class", "mode", "kernels us/step", f"{other} us/step", '"auto" takes')]
    for shape, outcome in found:
        if not outcome.verdicts:
            rows.append((shape.describe(), "", "", "", f"not measured: {outcome.obstacle}"))
        for mode in MODES if outcome.verdicts else ():
            verdict = outcome.verdicts[mode]
            times, taken = ("", ""), other
            if verdict.failure is not None:
                taken = f"{other}; FAILED: {verdict.failure}"
            else:
                times = f"{verdict.kernel_step_us:.2f}", f"{verdict.other_step_us:.2f}"
                if verdict.from_steps is not None:
                    taken = f"the kernels, from {verdict.from_steps} steps on"
            rows.append((shape.describe(), mode, *times, taken))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (2, 3)
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
