"""The arguments of real launches through the real compiler, for a GPU that is not there.

The interpreter takes an argument of any kind; the compiler makes a constant of an integer that
equals 1, and types and alignment follow from the values. So the sizes of 1 are compiled here.
"""

import os

import pytest
import torch

from triton_gru.plan.devices import DEVICES

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_cooperative_grid")


class Compiler:
    """Takes the place of a kernel: compiles what it would be launched with, for sm_90."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.shared = []

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, **arguments):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
            else:
                signature[parameter.name] = "i32"
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.shared.append(compiled.metadata.shared)


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    from triton_gru.kernels import backward, forward, step

    for module, name in (
        (forward, "scan_forward_kernel"),
        (backward, "scan_backward_kernel"),
        (step, "step_kernel"),
    ):
        monkeypatch.setattr(module, name, Compiler(getattr(module, name)))


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(("T", "B", "D", "H"), [(1, 1, 1, 1), (2, 1, 1, 300), (1, 3, 2, 17)])
def test_scans_compile(T, B, D, H, reset_after):
    """POINTERS has no integer narrower than 32 bits: none may reach a kernel (tile.load_flags)."""
    from triton_gru.kernels import backward, forward

    dtype = torch.bfloat16
    scan = [torch.zeros(s, dtype=dtype) for s in ((T, B, D, 3 * H), (D, B, H), (D, 3 * H, H))]
    scan.append(torch.zeros(D, 3 * H, dtype=dtype))
    options = {"reset_after": reset_after}
    if B > 1:
        lengths, resets = torch.tensor([1, 0, 1]), torch.ones(T, B, D, dtype=torch.bool)
        options |= {"lengths": lengths, "resets": resets}
    forward.scan_forward(*scan, **options)
    y = torch.zeros(T, B, D, H, dtype=dtype)
    backward.scan_backward(y, y, *scan, **options)
    limit = DEVICES[90].shared_bytes
    assert 0 < forward.scan_forward_kernel.shared[0] <= limit
    assert 0 < backward.scan_backward_kernel.shared[0] <= limit


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(("B", "H"), [(1, 1), (1, 300)])
def test_steps_compile(B, H, reset_after):
    from triton_gru.kernels import step

    state = torch.zeros(B, H, dtype=torch.bfloat16)
    gates_x, weight = state.new_zeros(B, 3 * H), state.new_zeros(3 * H, H)
    step.step(gates_x, state, weight, None, reset_after=reset_after)
    assert len(step.step_kernel.shared) == (1 if reset_after else 2)
