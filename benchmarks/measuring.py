"""Measures the implementations of a cell on the same inputs and weights, with one exact result.

The result of an implementation is its times, its error against float64 and its memory, or the
reason why there are none.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

from benchmarks.suites import Cell

# All inputs together have at least this many times the size of the L2; at most so many sets or
# bytes. (If 64 sets fit into the L2, they are small beside the weights, which all calls share.)
L2_TIMES, MOST_SETS, MOST_SET_BYTES = 2, 64, 8 << 30
ROUNDS = 2
SECONDS = 0.25
# Elements of y above which the error is computed over fewer steps.
MOST_EXACT = 1 << 26


@contextlib.contextmanager
def tf32_of(cell: Cell) -> Iterator[None]:
    """float32 products as the cell requires, for torch's products, cuDNN and the kernels alike."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = cell.dtype != "float32"
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def failure(error: Exception) -> dict:
    from benchmarks.implementations import Missing, Unsupported

    status = {Missing: "missing", Unsupported: "unsupported"}.get(type(error), "failed")
    reason = str(error) if status != "failed" else f"{type(error).__name__}: {error}"
    return {"status": status, "reason": reason[:600]}


class Measuring:
    """The common parts of the implementations of one cell: weights, inputs, the exact result."""

    def __init__(self, cell: Cell, device, clock):
        from benchmarks import implementations
        from benchmarks.timing import LEAST_REPEATS

        self.cell, self.device, self.clock = cell, device, clock
        self.least = LEAST_REPEATS if device.type == "cuda" else 1
        self.weights = implementations.make_weights(cell, device)
        first = implementations.make_inputs(cell, 0, device)
        count = set_count(first, device)
        more = [implementations.make_inputs(cell, seed, device) for seed in range(1, count)]
        self.inputs = [first, *more]
        self._exact = None

    def result(self, name: str) -> dict:
        """Times, error and memory of an implementation; its exceptions are recorded, not raised."""
        from benchmarks.timing import measure, summary

        try:
            runner = self.runner(name)
            calls = [lambda i=i: self.call(runner, i) for i in self.inputs]
            times = functools.partial(measure, calls, self.clock, SECONDS / ROUNDS, self.least)
            rounds = [times() for _ in range(ROUNDS)]
            result = {"status": "ok", **summary(rounds), "input_sets": len(self.inputs)}
            result["step_us"] = 1e3 * result["median_ms"] / self.cell.T
            result["peak_bytes"] = self.clock.peak_bytes(calls[0])
            result["error"] = self.error(runner) if runner.exact else None
            if name == "triton_gru":
                result["plans"] = self.plans()
        except Exception as error:
            return failure(error)
        return result

    def runner(self, name: str):
        from benchmarks.implementations import IMPLEMENTATIONS

        return IMPLEMENTATIONS[name](self.cell, self.weights)

    def call(self, runner, inputs) -> list:
        """The timed call: y, or y and the gradients by input and parameters."""
        import torch

        if self.cell.mode == "forward":
            with torch.no_grad():
                return [runner.forward(inputs)]
        y = runner.forward(inputs)
        return [y, *torch.autograd.grad(y, [inputs.leaf, *runner.parameters], inputs.dy)]

    def error(self, runner) -> dict:
        """Of y and each gradient: ||result - exact|| / ||exact||, over `shortened` inputs."""
        names = ["y", "x", *(name for name, _ in self.weights.named_parameters())]
        inputs = self.shortened()
        exact, results = self.exact(inputs), self.call(runner, inputs)
        found = {}
        for name, result, truth in zip(names, results, exact, strict=False):
            difference = (result.detach().double() - truth).norm() / truth.norm()
            found[name] = difference.item()
        if any(value != value for value in found.values()):
            raise ArithmeticError(f"the result holds NaN: {found}")
        return found

    def shortened(self):
        """The first inputs, over no more steps than fit in float64."""
        from benchmarks import implementations

        cell, first = self.cell, self.inputs[0]
        steps = max(1, min(cell.T, MOST_EXACT // (cell.B * cell.H * cell.directions)))
        if steps == cell.T or cell.lengths != "full":
            return first
        leaf = first.leaf.detach()[:steps].requires_grad_()
        return implementations.Inputs(leaf, leaf, None, first.dy[:steps])

    def exact(self, inputs) -> list:
        """float64, computed once for all implementations of the cell."""
        from torch.nn.utils.rnn import PackedSequence

        from benchmarks import implementations

        if self._exact is None:
            leaf = inputs.leaf.detach().double().requires_grad_()
            packed = isinstance(inputs.x, PackedSequence)
            x = inputs.x._replace(data=leaf) if packed else leaf
            double = implementations.Inputs(x, leaf, inputs.lengths, inputs.dy.double())
            runner = implementations.reference(self.cell, self.weights)
            self._exact = [t.detach() for t in self.call(runner, double)]
        return self._exact

    def plans(self) -> dict:
        """The plan for this cell and its predicted times."""
        from triton_gru.plan import selection, tuned
        from triton_gru.plan.plan import Problem

        cell, found = self.cell, {}
        for direction in ("forward", "backward")[: 1 + (cell.mode == "train")]:
            problem = Problem(
                batch=cell.B,
                hidden=cell.H,
                dtype="float32" if cell.dtype == "tf32" else cell.dtype,
                reset_after=cell.reset_after,
                direction=direction,
                directions=cell.directions,
                tensor_cores=cell.dtype != "float32",
            )
            plan = tuned.planned(problem, selection.device_limits(self.device))
            found[direction] = dataclasses.asdict(plan)
        return found


def set_count(inputs, device) -> int:
    """Number of input sets to rotate, so that none is in the L2 when it is used again."""
    if device.type != "cuda":
        return 2
    import torch

    size = inputs.leaf.nbytes + inputs.dy.nbytes
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = 1 + -(-L2_TIMES * l2 // size)
    return max(2, min(wanted, MOST_SETS, MOST_SET_BYTES // size))
