"""Streams, graphs, compilation, neighbours: the circumstances a launch may meet."""

import os

import pytest
import torch
import triton
import triton.language as tl

from tests.gpu.device import DEVICE, bits, case_on_device, plan_for
from tests.scan_cases import assert_exact_enough, compute
from tests.tolerances import assert_close
from triton_gru import GRU
from triton_gru.kernel_errors import check
from triton_gru.kernels.forward import scan_forward
from triton_gru.kernels.step import step
from triton_gru.plan import selection
from triton_gru.plan.plan import COUNTER, SENTINEL, Problem
from triton_gru.plan.planner import all_plans

PROTOCOLS = (SENTINEL, COUNTER)
LAUNCHES = ("single", *PROTOCOLS)
# Launches of which every one must give the same bits; 10,000 take a few seconds.
REPEATS = int(os.environ.get("TRITON_GRU_REPEATS", "1000")) if DEVICE.type == "cuda" else 3
DIRECTIONS = ("forward", "backward")
BEST = dict.fromkeys(DIRECTIONS)


def some_case(launch: str = SENTINEL, hidden: int = 768, **options):
    tiny = DEVICE.type == "cpu"
    hidden = 20 if tiny else 100 if launch == "single" else hidden
    options = {"reset_after": True, "dtype": torch.bfloat16} | options
    return case_on_device(2 if tiny else 32, 3 if tiny else 16, hidden, **options)


def some_layer(hidden: int = 300) -> tuple[GRU, torch.Tensor]:
    gru = GRU(24, hidden, bidirectional=True, backend="triton").to(DEVICE, torch.bfloat16)
    return gru, torch.randn(20, 5, 24, device=DEVICE, dtype=torch.bfloat16)


def train(gru, x) -> list[torch.Tensor]:
    """Output, last state, and gradients of everything."""
    leaf = x.detach().clone().requires_grad_()
    y, h = gru(leaf)
    loss = y.float().square().sum() + h.float().sum()
    return [y, h, *torch.autograd.grad(loss, [leaf, *gru.parameters()])]


@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_repeated_launches_give_the_same_bits(launch, reset_after):
    case = some_case(launch, reset_after=reset_after, lengths=True)
    plans = {d: plan_for(case, d, launch) for d in DIRECTIONS}
    first = compute(case, plans)
    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(REPEATS):
        for name, result in compute(case, plans).items():
            differ += (bits(result) != bits(first[name])).any()
    assert differ.item() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("launch", LAUNCHES)
def test_beside_a_busy_stream(launch):
    """Copies, products and small kernels elsewhere take multiprocessors and L2 in turn."""
    case = some_case(launch)
    plans = {d: plan_for(case, d, launch) for d in DIRECTIONS}
    first = compute(case, plans)
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(100):
        with torch.cuda.stream(other):
            b = a @ a
            b.copy_(a)
            b[:64].mul_(2)
        for name, result in compute(case, plans).items():
            differ += (bits(result) != bits(first[name])).any()
    check()
    assert differ.item() == 0


@triton.jit
def _spin(flag, looks):
    """Holds its multiprocessor until the flag is set, or for so many looks."""
    seen = tl.load(flag, volatile=True)
    left = looks
    while (seen == 0) & (left > 0):
        seen = tl.load(flag, volatile=True)
        left -= 1
    tl.store(flag + 1 + tl.program_id(0), seen + 1)


@pytest.mark.cuda
@pytest.mark.parametrize("programs", [2, 64])
def test_beside_a_kernel_that_spins(programs):
    """As a collective waits for its peers: for a while some multiprocessors are not available.

    H = 2048 takes 128 programs. Beside 2 others they fit on an H200; beside 64 they have to wait.
    """
    case = some_case(hidden=2048)
    plans = {d: plan_for(case, d, SENTINEL) for d in DIRECTIONS}
    first = compute(case, plans)
    flag = torch.zeros(1 + programs, dtype=torch.int32, device=DEVICE)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        # About 30 ms at half a microsecond a look, should nobody come to end it.
        _spin[(programs,)](flag, 60_000, num_warps=16)
    for _ in range(20):
        results = compute(case, plans)
    with torch.cuda.stream(torch.cuda.Stream()):
        flag[0] = 1
    check()
    assert all(torch.equal(bits(results[name]), bits(first[name])) for name in first)
    assert (flag[1:] > 0).all(), "the other kernel did not end"


@pytest.mark.cuda
def test_another_stream_is_respected():
    """The inputs are made late on that stream, so that a launch elsewhere would miss them."""
    gru, x = some_layer()
    expected = train(gru, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.full_like(x, torch.nan)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        results = train(gru, late)
    stream.synchronize()
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(bits(result), bits(other))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_is_respected():
    gru, x = some_layer()
    expected = train(gru, x)
    results = train(gru.to("cuda:1"), x.to("cuda:1"))
    assert_close([result.cpu() for result in results], [other.cpu() for other in expected])


@pytest.mark.cuda
@pytest.mark.parametrize("hidden", [64, 300])
def test_cuda_graphs(hidden):
    """Captured once, replayed on other inputs: the same bits as without a graph."""
    gru, x = some_layer(hidden)
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(gru, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(gru, static)
    for seed in range(3):
        torch.manual_seed(seed)
        static.copy_(torch.randn_like(x))
        for result in captured:
            result.fill_(torch.nan)
        graph.replay()
        for result, other in zip(captured, train(gru, static), strict=True):
            assert torch.equal(bits(result), bits(other))


@pytest.mark.cuda
@pytest.mark.parametrize("hidden", [64, 300])
def test_compiled_in_one_graph(hidden):
    gru, x = some_layer(hidden)
    compiled = torch.compile(gru, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), gru(x))
    for shorter in (x, x[:7]):
        leaf, other = (shorter.detach().clone().requires_grad_() for _ in range(2))
        for module, given in ((compiled, leaf), (gru, other)):
            module(given)[0].float().square().sum().backward()
        assert_close(leaf.grad, other.grad)


@pytest.mark.cuda
def test_compiled_with_cuda_graphs():
    gru, x = some_layer()
    compiled = torch.compile(gru, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            y = compiled(x)[0].clone()
        assert_close(y, gru(x)[0])


@pytest.mark.cuda
@pytest.mark.skipif(os.environ.get("TRITON_GRU_LARGE") != "1", reason="TRITON_GRU_LARGE=1 runs it")
def test_offsets_beyond_32_bits():
    """gates_x holds 3 * 2^31 elements; the last rows and steps are where a 32-bit offset ends."""
    T, B, H = 2048, 8192, 128
    gates_x = torch.empty(T, B, 1, 3 * H, dtype=torch.bfloat16, device=DEVICE).normal_()
    h0 = torch.zeros(1, B, H, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.randn(1, 3 * H, H, device=DEVICE).mul_(H**-0.5).bfloat16()
    y = scan_forward(gates_x, h0, weight, None, reset_after=True)
    few = scan_forward(
        gates_x[:, -16:].contiguous(), h0[:, -16:].contiguous(), weight, None, reset_after=True
    )
    assert_close(y[:, -16:], few)


@pytest.mark.cuda
@pytest.mark.skipif(os.environ.get("TRITON_GRU_LARGE") != "1", reason="TRITON_GRU_LARGE=1 runs it")
@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
def test_offsets_of_a_step_beyond_32_bits(reset_after):
    """gates_x holds 1.5 * 2^31 elements."""
    B, H = 2**23, 128
    gates_x = torch.empty(B, 3 * H, dtype=torch.bfloat16, device=DEVICE).normal_()
    h = torch.empty(B, H, dtype=torch.bfloat16, device=DEVICE).normal_()
    weight = torch.randn(3 * H, H, device=DEVICE).mul_(H**-0.5).bfloat16()
    found = step(gates_x, h, weight, None, reset_after=reset_after)
    few = step(
        gates_x[-16:].contiguous(), h[-16:].contiguous(), weight, None, reset_after=reset_after
    )
    assert_close(found[-16:], few)


def test_every_rival_plan_computes_the_same():
    """What `tune` may choose from: at H = 768 each plan on its own, both protocols."""
    case = some_case()
    gates_x, h0 = case.arguments[:2]
    for direction in DIRECTIONS:
        problem = Problem(
            batch=gates_x.shape[1],
            hidden=h0.shape[-1],
            dtype="bfloat16",
            reset_after=True,
            direction=direction,
        )
        plans = all_plans(problem, selection.device_limits(DEVICE))
        for plan in plans[: 8 if DEVICE.type == "cuda" else 2]:
            assert_exact_enough(case, BEST | {direction: plan}, "bfloat16")
