"""One shape class: the kernels checked against the equations, then timed against cuDNN.

Runs in its own process, `python -m triton_gru.class_check REQUEST`, by
`triton_gru.verdicts.measuring`, which reads the last line that it prints.
"""

import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triton_gru import equations
from triton_gru.engines import varlen
from triton_gru.kernel_errors import check
from triton_gru.layer import GRU
from triton_gru.tuning import median_of_events
from triton_gru.verdicts.measuring import BEGUN, MODES
from triton_gru.verdicts.shapes import LONG, SHORT, ShapeClass, Verdict
from triton_gru.verdicts.tolerances import SINGLE, TOLERANCE


class NoComparison(RuntimeError):
    """The competitor of the kernels cannot compute the class here."""


# Measures the seconds of a call.
Timer = Callable[[Callable[[], object]], float]

# Steps of the compared sequence; fewer if the states have this many elements.
STEPS, FEWEST_STEPS, ELEMENTS = 32, 4, 2**24
# Polls before a wait of a kernel times out here: tens of milliseconds.
POLLS = 1 << 15
# Number of rounds in which the implementations are timed in turn.
ROUNDS = 3


def checked(
    shape: ShapeClass, device: torch.device, timer: Timer | None = None
) -> dict[str, Verdict]:
    """The verdicts of a class.

    Args:
        shape: The class, with a batch size.
        device: The device to compute on.
        timer: Measures the seconds of a call; None: the median of CUDA events.

    Raises:
        torch.OutOfMemoryError: The device has not enough memory left for it.
        NoComparison: cuDNN refuses the class.
    """
    torch.backends.cudnn.allow_tf32 = shape.dtype != "float32"
    try:
        failure = wrong(shape, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if failure is not None:
        return dict.fromkeys(MODES, Verdict.today(failure[:500]))
    return timed(shape, device, timer or median_of_events)


# -- values -----------------------------------------------------------------------------------


def wrong(shape: ShapeClass, device: torch.device) -> str | None:
    """The first wrong result of the kernels on random inputs, or None.

    Once without options, once with all of them: lengths, resets, saved gates. Each runs twice:
    errors of an exchange that occur now and then show as bits that differ.
    """
    limit = TOLERANCE[shape.dtype]
    for everything in (False, True):
        seed = torch.seed()
        inputs = _inputs(shape, device, everything)
        exact = _exact(*inputs)
        first, second = (_computed(*inputs, save_gates=everything) for _ in range(2))
        for name, truth in exact.items():
            result = first[name].double()
            whole = ((result - truth).norm() / truth.norm().clamp_min(1e-30)).item()
            scale = truth.abs().max().clamp_min(1e-30)
            largest = ((result - truth).abs().max() / scale).item()
            what = f"{name}{' with lengths and resets' if everything else ''} (seed {seed})"
            if not (whole <= limit and largest <= SINGLE * limit):
                return (
                    f"wrong {what}: relative error {whole:.1e}, at one element {largest:.1e}; "
                    f"{limit:.1e} and {SINGLE * limit:.1e} are allowed"
                )
            if not torch.equal(first[name], second[name]):
                return f"{what} differs between two runs on the same input"
    return None


def _inputs(
    shape: ShapeClass, device: torch.device, everything: bool
) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """The arguments of a scan, its options, and the gradient of the loss by its result."""
    H, B, D = shape.hidden, shape.batch or 1, shape.directions
    T = max(FEWEST_STEPS, min(STEPS, ELEMENTS // (B * H)))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=shape.torch_dtype)

    scan = [
        normal(T, B, D, 3 * H),
        normal(D, B, H),
        normal(D, 3 * H, H) * H**-0.5,
        normal(D, 3 * H),
    ]
    options: dict[str, Any] = {"reset_after": shape.reset_after}
    if everything:
        options["lengths"] = torch.randint(0, T + 1, (B,), device=device)
        options["lengths"][0] = T
        resets = torch.rand(T, B, device=device) < 0.2
        options["resets"] = varlen.resets_of_directions(resets, options["lengths"], D)
    return scan, options, normal(T, B, D, H)


def _exact(scan: list[Tensor], options: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """The states and the gradients by the equations, in float64."""
    arguments = [tensor.double() for tensor in scan]
    y = equations.scan_forward(*arguments, **options)
    return _named(y, equations.scan_backward(dy.double(), y, *arguments, **options))


def _computed(
    scan: list[Tensor], options: dict[str, Any], dy: Tensor, *, save_gates: bool
) -> dict[str, Tensor]:
    """The same by the kernels.

    Raises:
        KernelError: The kernels reported an error.
    """
    from triton_gru.kernels import backward, forward

    gates_h = None
    y: Any = forward.scan_forward(*scan, **options, save_gates=save_gates, polls=POLLS)
    if save_gates:
        y, gates_h = y
    arguments: Any = (dy, y, *scan)
    grads = backward.scan_backward(*arguments, **options, gates_h=gates_h, polls=POLLS)
    check()
    return _named(y, grads)


def _named(y: Tensor, grads: Any) -> dict[str, Tensor]:
    names = ("d_gates_x", "dh0", "dweight_hh", "dbias_hh")
    return {"y": y, **dict(zip(names, grads, strict=True))}


# -- times ------------------------------------------------------------------------------------


def timed(shape: ShapeClass, device: torch.device, timer: Timer) -> dict[str, Verdict]:
    """Microseconds of whole calls, forward alone and with all gradients.

    Raises:
        NoComparison: cuDNN refuses the class.
    """
    ours = GRU(
        shape.hidden,
        shape.hidden,
        bidirectional=shape.directions == 2,
        reset_after=shape.reset_after,
        backend="triton",
        device=device,
        dtype=shape.torch_dtype,
    )
    other = ours.to_torch() if shape.reset_after else GRU.from_torch(ours, backend="reference")
    try:
        _call(other, SHORT, shape, True)()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NoComparison(f"{shape.competitor} does not compute it: {error}") from error
    found = {}
    for mode in MODES:
        times: dict[tuple[int, bool], list[float]] = {}
        for _ in range(ROUNDS):
            for steps in (SHORT, LONG):
                for module in (ours, other):
                    seconds = timer(_call(module, steps, shape, mode == "training"))
                    times.setdefault((steps, module is ours), []).append(1e6 * seconds)
        pairs = [
            (statistics.median(times[SHORT, mine]), statistics.median(times[LONG, mine]))
            for mine in (True, False)
        ]
        found[mode] = Verdict.today(None, kernel_us=pairs[0], other_us=pairs[1])
        check()
    return found


def _call(
    module: nn.RNNBase, steps: int, shape: ShapeClass, training: bool
) -> Callable[[], object]:
    weight: Any = module.weight_ih_l0
    size = (steps, shape.batch or 1, shape.hidden)
    x = torch.randn(size, device=weight.device, dtype=weight.dtype, requires_grad=training)
    if not training:
        return functools.partial(_infer, module, x)
    size = (steps, size[1], shape.directions * shape.hidden)
    dy = torch.randn(size, device=weight.device, dtype=weight.dtype)
    return functools.partial(_train, module, x, dy)


@torch.no_grad()
def _infer(module: nn.RNNBase, x: Tensor) -> object:
    return module(x)


def _train(module: nn.RNNBase, x: Tensor, dy: Tensor) -> object:
    return torch.autograd.grad(module(x)[0], [x, *module.parameters()], dy)


# -- the process ------------------------------------------------------------------------------


def main(
    request: str,
    checks: Callable[[ShapeClass, torch.device], dict[str, Verdict]] = checked,
) -> None:
    """Prints a line when the kernels begin, and the result as JSON.

    Raises:
        SystemExit: Triton can run no kernel here, which says nothing about these.
    """
    from triton_gru.kernels import trial

    fields = json.loads(request)
    device = torch.device(fields.pop("device"))
    shape = ShapeClass(**fields)
    torch.zeros(1, device=device).item()  # raises if the device does not work
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        trial.run(device)
    except Exception as error:  # without a C compiler, or with a full disk, of many kinds
        text = " ".join(str(error).split())
        raise SystemExit(f"Triton can run no kernel here: {type(error).__name__}: {text}") from None
    print(BEGUN, flush=True)
    try:
        found: dict[str, Any] = {
            mode: verdict.record() for mode, verdict in checks(shape, device).items()
        }
    except torch.OutOfMemoryError:
        memory = "its tensors do not fit into the memory that the device has left"
        found = {"obstacle": memory}
    except NoComparison as error:
        found = {"obstacle": " ".join(str(error).split())}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
