"""Which calls share a verdict, and from how many steps on one says "faster"."""

import json
import random

import pytest
import torch

from triton_gru.verdicts.shapes import FASTER, LONG, SHORT, ShapeClass, Verdict


def shape_of(batch_size=20, dtype=torch.bfloat16, **others):
    layer = {"reset_after": True, "hidden_size": 512, "directions": 1, **others}
    return ShapeClass.of(dtype=dtype, batch_size=batch_size, **layer)


def test_batches_up_to_a_power_of_two_share_a_class():
    classes = {}
    for batch_size in range(130):
        classes.setdefault(shape_of(batch_size), []).append(batch_size)
    ends = [sizes[-1] for sizes in classes.values()]
    assert ends == [1, 2, 4, 8, 16, 32, 64, 128, 129]
    assert [shape.batch for shape in classes] == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_what_else_tells_classes_apart(monkeypatch):
    classes = [
        shape_of(),
        shape_of(dtype=torch.float16),
        shape_of(dtype=torch.float32),
        shape_of(hidden_size=513),
        shape_of(directions=2),
        shape_of(reset_after=False),
    ]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    classes.append(shape_of(dtype=torch.float32))
    keys = {shape.key(training) for shape in classes for training in (True, False)}
    assert len(keys) == 2 * len(classes)
    assert {classes[2].dtype, classes[-1].dtype} == {"float32", "tf32"}
    assert {classes[2].torch_dtype, classes[-1].torch_dtype} == {torch.float32}
    assert len({shape.command() for shape in classes}) == len(classes)


def test_a_class_without_a_batch_begins_the_names_of_its_batches():
    every = shape_of(None).key(True)
    assert shape_of(3).key(True).startswith(every)
    for other in (shape_of(3, hidden_size=5120), shape_of(3, reset_after=False)):
        assert not other.key(True).startswith(every)
    assert not shape_of(3).key(False).startswith(every)


def at(verdict, steps):
    """Microseconds of a call with the kernels and with the other, on the lines measured."""
    lines = []
    for short, long in (verdict.kernel_us, verdict.other_us):
        lines.append(short + (long - short) / (LONG - SHORT) * (steps - SHORT))
    return lines


def test_from_steps_is_where_a_call_becomes_faster_by_a_tenth():
    draw = random.Random(torch.initial_seed())
    seen = set()
    for _ in range(500):
        times = []
        for _ in range(2):
            launch, step = draw.uniform(10, 400), draw.uniform(0.5, 3)
            times.append((launch + SHORT * step, launch + LONG * step))
        verdict = Verdict("2026-01-01", None, *times)
        least = verdict.from_steps
        if least is None:
            assert verdict.kernel_step_us >= FASTER * verdict.other_step_us
        else:
            ours, other = at(verdict, least)
            assert least >= SHORT and ours <= FASTER * other * (1 + 1e-9)
            if least > SHORT:
                ours, other = at(verdict, least - 1)
                assert ours > FASTER * other * (1 - 1e-9)
        seen.add("never" if least is None else "later" if least > SHORT else "at once")
    assert seen == {"never", "later", "at once"}


@pytest.mark.parametrize(
    ("kernel_us", "other_us", "least"),
    [
        ((10.0, 522.0), (20.0, 1044.0), SHORT),  # 1 us per step against 2
        ((10.0, 500.0), (10.0, 520.0), None),  # faster, but by less than a tenth
        ((300.0, 200.0), (20.0, 10.0), None),  # noise
    ],
)
def test_some_verdicts(kernel_us, other_us, least):
    assert Verdict("2026-01-01", None, kernel_us, other_us).from_steps == least


def test_a_record_reads_back():
    for verdict in (
        Verdict.today("wrong y"),
        Verdict.today(None, kernel_us=(1.0, 2.0), other_us=(3.0, 4.5)),
    ):
        assert Verdict.read(json.loads(json.dumps(verdict.record()))) == verdict
    assert Verdict.today("wrong y").from_steps is None


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"day": 5},
        {"day": "2026-01-01"},
        {"day": "2026-01-01", "kernel_us": [1, 2]},
        {"day": "2026-01-01", "kernel_us": [1, 2], "other_us": [1]},
        {"day": "2026-01-01", "kernel_us": [1, 2], "other_us": [1, "2"]},
        {"day": "2026-01-01", "kernel_us": [1, 2], "other_us": [1, float("nan")]},
        {"day": "2026-01-01", "kernel_us": [1, 2], "other_us": [0, 1]},
        {"day": "2026-01-01", "kernel_us": [True, 2], "other_us": [1, 1]},
    ],
)
def test_what_is_no_verdict_is_refused(record):
    with pytest.raises(ValueError, match="verdict"):
        Verdict.read(record)
