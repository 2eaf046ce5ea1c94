"""What "auto" takes on a GPU: what the verdict says, for the life of a process."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.triton_gru.verdicts.conftest import forget
from triton_gru import GRU, dispatch
from triton_gru.dispatch import choose_backend
from triton_gru.verdicts import deciding, environment, store
from triton_gru.verdicts.measuring import MODES, Outcome
from triton_gru.verdicts.shapes import LONG, SHORT, ShapeClass, Verdict

WHERE = "a GPU | versions | kernels"


def verdict(us, other_us, launch=0.0):
    times = [(launch + us * SHORT, launch + us * LONG), (other_us * SHORT, other_us * LONG)]
    return Verdict("2026-01-01", None, *times)


FASTER, BY_TOO_LITTLE = verdict(1.0, 2.0), verdict(1.9, 2.0)
FAILED = Verdict("2026-01-01", "wrong dh0")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A device with kernels that nothing stands in the way of."""
    monkeypatch.setattr(dispatch, "_triton_obstacle", lambda *layer: None)
    monkeypatch.setattr(deciding, "environment", lambda device: WHERE)


def choice(T=100, B=20, *, training=True, **others):
    layer = {"reset_after": True, "dtype": torch.bfloat16, "hidden_size": 32, **others}
    if "tensors" not in layer:
        layer["tensors"] = (torch.zeros(2), torch.zeros(2, requires_grad=training))
    return choose_backend("auto", device=torch.device("cuda"), steps=T, batch_size=B, **layer)


def shape(B=32, **others):
    layer = {"reset_after": True, "dtype": "bfloat16", "hidden": 32, "directions": 1, **others}
    return ShapeClass(batch=B, **layer)


def say(training, *, B=32, of=FASTER, **others):
    store.remember(WHERE, {shape(B, **others).key(training): of})


def test_faster_by_a_tenth_is_faster():
    say(True)
    say(False, of=BY_TOO_LITTLE)
    found = choice()
    assert found.backend == "triton"
    for part in (
        "2026-01-01",
        "forward and backward",
        "1.00 us",
        "cuDNN 2.00 us",
        "check --hidden",
    ):
        assert part in found.reason
    slower = choice(training=False)
    assert slower.backend == "torch" and "1.90 us" in slower.reason
    with torch.no_grad():
        assert choice().backend == "torch"


def test_in_inference_alone():
    say(True, of=BY_TOO_LITTLE)
    say(False)
    assert choice(training=False).backend == "triton"
    assert choice().backend == "torch"


def test_batches_of_another_class_have_no_verdict():
    say(True)
    assert [choice(B=B).backend for B in (16, 17, 32, 33)] == ["torch", "triton", "triton", "torch"]


def test_without_a_verdict_it_is_cudnn_and_one_line(caplog):
    with caplog.at_level(logging.INFO):
        found = [choice(B=B) for B in (1, 1, 5, 9)]
    assert {c.backend for c in found} == {"torch"}
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and shape(1).command() in lines[0]
    assert "have not been measured" in found[-1].reason
    assert "(cuDNN) computes" in found[-1].reason


def test_kernels_that_failed_are_not_taken(caplog):
    say(True, of=FAILED)
    with caplog.at_level(logging.INFO):
        found = choice()
    assert found.backend == "torch" and "wrong dh0" in found.reason and "wrong dh0" in caplog.text
    assert choice(resets=True).backend == "reference"


def test_other_kernels_have_no_verdict(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(deciding, "environment", lambda device: environment.environment(device))
    device = torch.device("cpu")  # which the interpreter computes for
    store.remember(environment.environment(device), {shape().key(True): FASTER})
    assert deciding.decision(device, shape(), True, holds=False).passed
    forget()
    monkeypatch.setattr(environment, "source_hash", lambda: "another")
    assert not deciding.decision(device, shape(), True, holds=False).passed


def test_the_hash_is_of_every_kernel(monkeypatch, tmp_path):
    hashes = {environment.source_hash.__wrapped__()}
    for source in ("kernels/forward.py", "kernels/gates.py", "plan/planner.py"):
        for folder in environment.SOURCES:
            (tmp_path / folder).mkdir(exist_ok=True)
            for path in (environment.PACKAGE / folder).glob("*.py"):
                (tmp_path / folder / path.name).write_bytes(path.read_bytes())
        (tmp_path / source).write_bytes((tmp_path / source).read_bytes() + b"#")
        with monkeypatch.context() as patch:
            patch.setattr(environment, "PACKAGE", tmp_path)
            hashes.add(environment.source_hash.__wrapped__())
    assert len(hashes) == 4


def test_plans_that_tune_found_have_a_verdict_of_their_own():
    pytest.importorskip("triton")
    from triton_gru.plan import planner, selection, tuned

    device = torch.device("cpu")
    limits = selection.device_limits(device)
    names = [environment.environment(device)]
    problem = planner.Problem(16, 512, "bfloat16", True)
    for plan in planner.all_plans(problem, limits)[:2]:
        tuned.remember(problem, limits, plan)
        names.append(environment.environment(device))
    another = planner.dataclasses.replace(limits, name="another")
    tuned.remember(problem, another, plan)
    names.append(environment.environment(device))
    tuned._read.cache_clear()
    assert len(set(names)) == 3 and names[-1] == names[-2]


def test_a_process_never_changes_its_mind():
    assert choice().backend == "torch"
    say(True)
    assert choice().backend == "torch"
    assert choice(B=64).backend == "torch"
    forget()
    assert choice().backend == "triton"
    say(True, of=FAILED)
    assert choice().backend == "triton"


def test_explain_decides_nothing():
    layer = GRU(3, 32, dtype=torch.bfloat16)
    asked = {"steps": 100, "holds": False}
    assert choice(**{k: v for k, v in asked.items() if k != "steps"}).backend == "torch"
    say(True)
    assert choice().backend == "triton"
    assert layer.explain().startswith("Backend")


@pytest.mark.parametrize("T", [None, 1, SHORT - 1])
def test_fewer_steps_than_measured_are_left_to_cudnn(T):
    say(True)
    found = choice(T)
    assert found.backend == "torch" and f"at least {SHORT} steps" in found.reason
    assert choice(SHORT).backend == "triton"


def test_a_launch_that_takes_longer_pays_from_some_steps_on():
    slow_start = verdict(1.0, 2.0, launch=80.0)
    say(True, of=slow_start)
    assert slow_start.from_steps == 100
    assert [choice(T).backend for T in (99, 100)] == ["torch", "triton"]
    assert "fewer than 100 steps" in choice(99).reason


def test_what_torch_cannot_compute():
    """resets: kernels that passed; reset_after=False: kernels faster than plain torch."""
    say(True, of=BY_TOO_LITTLE)
    assert choice(resets=True).backend == "triton"
    assert choice(resets=True, training=False).backend == "reference", "not measured"
    assert choice(reset_after=False).backend == "reference"
    say(False, reset_after=False)
    found = choice(reset_after=False, training=False)
    assert found.backend == "triton" and "plain torch 2.00 us" in found.reason
    say(True, reset_after=False, B=64, of=BY_TOO_LITTLE)
    assert choice(reset_after=False, B=64).backend == "reference"


def test_several_verdicts_say_what_the_least_fast_says():
    late, early = verdict(1.0, 2.0, launch=80.0), verdict(0.5, 2.0)
    found = {shape(B).key(True): v for B, v in {8: early, 16: late, 32: early}.items()}
    assert deciding.judged(shape(None), True, found).from_steps == late.from_steps
    assert "1.00 us" in deciding.judged(shape(None), True, found).why
    assert deciding.judged(shape(32), True, found).from_steps == SHORT


def compiled(backend="eager"):
    def function(x):
        found = choice(x.shape[0], x.shape[1], tensors=(x,))
        return x + (1 if found.backend == "triton" else -1)

    return torch.compile(function, fullgraph=True, backend=backend, dynamic=True)


@pytest.mark.parametrize("others", [{}, {64: FASTER}, {64: BY_TOO_LITTLE}, {64: FAILED}])
def test_a_graph_for_any_sizes_takes_what_every_batch_size_says(others):
    torch._dynamo.reset()
    store.remember(WHERE, {shape(B).key(True): v for B, v in {32: FASTER, **others}.items()})
    expected = 1 if all(v is FASTER for v in others.values()) else -1
    graphs = torch._dynamo.utils.counters["stats"]
    function = compiled()
    assert function(torch.zeros(100, 20, requires_grad=True)).unique().item() == expected
    made = graphs["unique_graphs"]
    assert made
    for sizes in ((70, 64), (300, 7), (17, 1000)):
        assert function(torch.zeros(sizes, requires_grad=True)).unique().item() == expected
    assert graphs["unique_graphs"] == made, "no size is looked at"


class Chooses(torch.nn.Module):
    def forward(self, x):
        return x + (1 if choice(x.shape[0], tensors=(x,)).backend == "triton" else -1)


@pytest.fixture
def measured(monkeypatch):
    """TRITON_GRU_CHECK=first_use, and what was measured by it."""
    monkeypatch.setenv("TRITON_GRU_CHECK", "first_use")
    calls = []

    def measure(shape, device):
        calls.append(shape)
        return Outcome(dict.fromkeys(MODES, FASTER))

    monkeypatch.setattr(deciding.measuring, "measure", measure)
    return calls


def test_first_use_measures_a_class_once(measured):
    assert [choice(T).backend for T in (64, 64, SHORT)] == ["triton"] * 3
    assert choice(64, training=False).backend == "triton"
    assert measured == [shape(32)], "both modes at once"
    assert choice(64, 64).backend == "triton"
    assert measured == [shape(32), shape(64)]
    forget()
    assert choice(64).backend == "triton" and len(measured) == 2, "it is on disk"


def test_first_use_waits_for_no_short_sequence(measured):
    assert choice(63).backend == "torch"
    assert choice(64).backend == "torch", "decided, for this process"
    assert measured == []


def test_first_use_that_finds_nothing_is_cudnn(measured, monkeypatch, caplog):
    monkeypatch.setattr(deciding.measuring, "measure", lambda *a: Outcome({}, "no memory"))
    assert choice(64).backend == "torch" and "no memory" in caplog.text


def test_nothing_is_measured_unasked(measured, monkeypatch):
    monkeypatch.delenv("TRITON_GRU_CHECK")
    assert choice(64).backend == "torch" and measured == []


def test_another_value_is_refused(measured, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CHECK", "always")
    with pytest.raises(ValueError, match="TRITON_GRU_CHECK should be 'first_use'"):
        choice(64)


def while_capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    choice(64)


def while_compiling(monkeypatch):
    torch._dynamo.reset()
    compiled()(torch.zeros(64, 20, requires_grad=True))


def while_exporting(monkeypatch):
    torch.export.export(Chooses(), (torch.zeros(64, requires_grad=True),), strict=False)


def while_exporting_strictly(monkeypatch):
    torch.export.export(Chooses(), (torch.zeros(64, requires_grad=True),), strict=True)


def while_tracing(monkeypatch):
    torch.jit.trace(Chooses(), torch.zeros(64, requires_grad=True), check_trace=False)


def with_fake_tensors(monkeypatch):
    x = torch.zeros(2, requires_grad=True)
    with FakeTensorMode():
        choice(64, tensors=(x,))


def with_a_tensor_that_is_fake(monkeypatch):
    with FakeTensorMode():
        x = torch.zeros(2, requires_grad=True)
    choice(64, tensors=(x,))


def within_a_transform(monkeypatch):
    torch.func.grad(lambda x: choice(64, tensors=(x,)) and x.sum())(torch.zeros(2))


def with_deterministic_algorithms(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    choice(64)


def in_a_process_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    choice(64)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "at",
    [
        while_capturing,
        while_compiling,
        while_exporting,
        while_exporting_strictly,
        while_tracing,
        with_fake_tensors,
        with_a_tensor_that_is_fake,
        within_a_transform,
        with_deterministic_algorithms,
        in_a_process_group,
    ],
    ids=lambda function: function.__name__,
)
def test_where_nothing_is_measured(at, measured, monkeypatch):
    at(monkeypatch)
    assert measured == []
    assert deciding._decided, "it was asked, and is decided"
