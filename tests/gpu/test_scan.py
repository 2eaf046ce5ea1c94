"""The scans against float64: every kernel, dtype and variant, odd sizes, lengths and resets."""

import pytest
import torch

from tests.gpu.device import DEVICE, DTYPES, case_on_device, plan_for, precision, size
from tests.scan_cases import assert_exact_enough, assert_near
from triton_gru import equations
from triton_gru.kernel_errors import check
from triton_gru.kernels import step
from triton_gru.kernels.forward import scan_forward
from triton_gru.plan import selection
from triton_gru.plan.plan import COUNTER, GLUON, SENTINEL

LAUNCHES = ("single", SENTINEL, COUNTER, GLUON)
BOTH = pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
BEST = {"forward": None, "backward": None}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@BOTH
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_kernel(launch, name, reset_after):
    """Both directions, lengths, and resets to a row: everything a scan can be asked."""
    H = size(100 if launch == "single" else 130, 20)
    with precision(name) as dtype:
        case = case_on_device(
            size(50, 2),
            size(17, 3),
            H,
            2,
            reset_after=reset_after,
            dtype=dtype,
            lengths=True,
            resets=True,
        )
        tf32 = name != "float32"
        plans = {d: plan_for(case, d, launch, tf32) for d in ("forward", "backward")}
        assert_exact_enough(case, plans, name)


SIZES = [  # T, B, H, D: what the planner thinks best
    (1, 1, 1, 1),
    (2, 3, 17, 2),
    (50, 17, 128, 1),
    (50, 64, 650, 1),
    (2, 3, 1000, 2),
    (50, 3, 1400, 1),  # float32 with part of the weights in registers, on 227 KiB
    (50, 1, 1500, 1),
    (300, 3, 300, 1),  # a last chunk narrower than the others; the backward in pieces of time
    (2, 64, 2048, 1),
    (50, 200, 1024, 1),  # more groups than are resident together: several launches
]


@BOTH
@pytest.mark.parametrize("name", ["bfloat16", "tf32"])
@pytest.mark.parametrize("shape", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_sizes(shape, name, reset_after):
    T, B, H, D = shape
    if DEVICE.type == "cpu":
        T, B, H = min(T, 2), min(B, 3), min(H, 33)
    with precision(name) as dtype:
        refusal = selection.obstacle(
            device=DEVICE,
            dtype=dtype,
            batch_size=B,
            hidden_size=H,
            reset_after=reset_after,
            directions=D,
        )
        if refusal:
            pytest.skip(refusal)
        assert_exact_enough(
            case_on_device(T, B, H, D, reset_after=reset_after, dtype=dtype), BEST, name
        )


@BOTH
@pytest.mark.parametrize("hidden", [64, 300])
def test_without_biases_and_with_saved_gates(hidden, reset_after):
    shape = (size(20, 2), size(5, 3), size(hidden, 20))
    case = case_on_device(*shape, reset_after=reset_after, dtype=torch.bfloat16, bias=False)
    assert_exact_enough(case, BEST, "bfloat16", save_gates=True)


@pytest.mark.parametrize("hidden", [64, 300])
def test_resets_to_zero(hidden):
    shape = (size(20, 2), size(5, 3), size(hidden, 20))
    case = case_on_device(*shape, reset_after=True, dtype=torch.bfloat16, resets=True)
    assert_exact_enough(case, BEST, "bfloat16")


@pytest.mark.parametrize("hidden", [64, 300])
def test_arguments_that_are_not_contiguous(hidden):
    """Views of larger tensors, transposed, with a stride in every dimension."""
    shape = (size(20, 2), size(5, 3), size(hidden, 20))
    case = case_on_device(*shape, 2, reset_after=True, dtype=torch.bfloat16)

    def scattered(tensor):
        apart = torch.full([2 * n for n in tensor.shape[::-1]], torch.nan, device=DEVICE)
        apart = apart.to(tensor.dtype).permute(*reversed(range(tensor.dim())))
        view = apart[tuple(slice(None, None, 2) for _ in tensor.shape)]
        view.copy_(tensor)
        assert not view.is_contiguous()
        return view

    case.arguments = [scattered(a) for a in case.arguments]
    case.dy = scattered(case.dy)
    assert_exact_enough(case, BEST, "bfloat16")


@BOTH
def test_a_diverged_run_ends_in_nan_and_not_in_a_wait(reset_after):
    """NaN in one row stays in that row, whatever its sign and payload."""
    shape = (size(20, 2), size(5, 3), size(300, 20))
    case = case_on_device(*shape, reset_after=reset_after, dtype=torch.bfloat16)
    clean = scan_forward(*case.arguments, **case.options)
    gates_x = case.arguments[0].clone()
    gates_x.view(torch.int16)[1, 1] = -1  # the sentinel's own pattern, as an input
    y = scan_forward(gates_x, *case.arguments[1:], **case.options)
    check()
    assert y[1:, 1].isnan().all()
    rest = [row for row in range(shape[1]) if row != 1]
    assert torch.equal(y[:, rest], clean[:, rest])


@BOTH
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    ("batch", "hidden"), [(1, 1), (3, 17), (64, 128), (1, 650), (17, 1500), (64, 2048)]
)
def test_one_step(batch, hidden, name, reset_after):
    B, H = min(batch, size(batch, 3)), min(hidden, size(hidden, 33))
    with precision(name) as dtype:
        case = case_on_device(1, B, H, reset_after=reset_after, dtype=dtype)
        gates_x, h, weight, bias = (a[0] for a in case.arguments)
        result = step.step(gates_x[:, 0], h, weight, bias, reset_after=reset_after)
        arguments = (gates_x[:, 0].double(), h.double(), weight.double(), bias.double())
        exact = equations.step(*arguments, reset_after)
        assert_near({"h": result}, {"h": exact}, name)
