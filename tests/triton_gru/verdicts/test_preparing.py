"""`prepare`: what it measures for a model, and that all ranks take what rank 0 found."""

import multiprocessing

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from triton_gru import GRU, prepare, preparing
from triton_gru.verdicts import checks, deciding, store
from triton_gru.verdicts.measuring import MODES, Outcome
from triton_gru.verdicts.shapes import LONG, SHORT, ShapeClass, Verdict

WHERE = "a GPU | versions | kernels"


def outcome(us, other_us=2.0):
    times = [(us * SHORT, us * LONG), (other_us * SHORT, other_us * LONG)]
    return Outcome({mode: Verdict("2026-01-01", None, *times) for mode in MODES})


@pytest.fixture
def measured(monkeypatch):
    """This CPU stands for a GPU; the classes that were measured."""
    seen = []

    def measure(shape, device):
        seen.append(shape)
        return outcome(1.0)

    stand_in(monkeypatch.setattr, WHERE, measure)
    return seen


def stand_in(set_attribute, where, measure):
    set_attribute(preparing, "_measurable", lambda device: True)
    for module in (preparing, checks, deciding):
        set_attribute(module, "environment", lambda device: where)
    set_attribute(checks.measuring, "measure", measure)


def keys(shape):
    return {shape.key(mode == "training") for mode in MODES}


def test_on_a_cpu_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(checks.measuring, "measure", lambda *a: pytest.fail("measured"))
    assert prepare(GRU(3, 5), torch.zeros(4, 2, 3)) == {}


def test_a_layer_is_measured_once(measured):
    layer, x = GRU(3, 5), torch.zeros(4, 3, 3)
    expected = ShapeClass.of(
        reset_after=True, dtype=torch.float32, hidden_size=5, directions=1, batch_size=3
    )
    found = prepare(layer, x)
    assert measured == [expected] and expected.batch == 4
    assert set(found) == keys(expected)
    assert prepare(layer, torch.zeros(90, 4, 3)) == found and len(measured) == 1
    store._here.clear()  # as another process
    assert prepare(layer, x) == found and len(measured) == 1


def test_every_layer_of_a_model_that_asks(measured):
    model = nn.Sequential(
        GRU(3, 5, num_layers=2),
        GRU(3, 5),
        GRU(3, 6, bidirectional=True, batch_first=True),
        GRU(3, 7, reset_after=False),
        GRU(3, 8, backend="torch"),
        GRU(3, 9, layer_norm=True),
        GRU(3, 9, zoneout=0.1),
        nn.GRU(3, 9),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prepare(model, torch.zeros(4, 2, 3))
    assert [(s.hidden, s.batch, s.directions, s.reset_after) for s in measured] == [
        (5, 2, 1, True),
        (6, 4, 2, True),
        (7, 2, 1, False),
    ]


@pytest.mark.parametrize(
    ("x", "batch"),
    [(torch.zeros(9, 3), 1), (pack_sequence([torch.zeros(n, 3) for n in (4, 2, 1)]), 4)],
)
def test_other_inputs(x, batch, measured):
    prepare(GRU(3, 5), x)
    assert [shape.batch for shape in measured] == [batch]


def test_what_could_not_be_measured_is_left_out(measured, monkeypatch, caplog):
    monkeypatch.setattr(checks.measuring, "measure", lambda *a: Outcome({}, "no memory"))
    with caplog.at_level("INFO"):
        assert prepare(GRU(3, 5), torch.zeros(4, 2, 3)) == {}
    assert "no memory" in caplog.text


def test_a_class_that_was_used_before_stays_and_that_is_said(measured, caplog):
    layer, x = GRU(3, 5), torch.zeros(20, 2, 3)
    shape = ShapeClass.of(
        reset_after=True, dtype=torch.float32, hidden_size=5, directions=1, batch_size=2
    )
    deciding.decision(x.device, shape, True, holds=True)
    prepare(layer, x)
    assert "called before prepare()" in caplog.text and shape.key(True) in caplog.text
    assert shape.key(False) not in caplog.text
    assert not deciding.decision(x.device, shape, True, holds=True).passed
    assert deciding.decision(x.device, shape, False, holds=True).passed


def rank_of_two(rank, store_file, cache, where, answers):
    """A rank whose device would give other verdicts than the other's."""
    from tests.triton_gru.verdicts.conftest import forget

    forget()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store_file}", rank=rank, world_size=2
    )
    lines, seen = [], []
    preparing.log.warning = lambda message, *values: lines.append(message % values)

    def measure(shape, device):
        seen.append(shape)
        return outcome(1.0 + rank)

    stand_in(setattr, where, measure)
    store.cache_directory = lambda: cache / str(rank)  # machines of their own
    found = prepare(GRU(3, 5), torch.zeros(20, 2, 3))
    (shape,) = {ShapeClass.of(
        reset_after=True, dtype=torch.float32, hidden_size=5, directions=1, batch_size=2
    )}  # fmt: skip
    decision = deciding.decision(torch.device("cpu"), shape, True, holds=True)
    answers.put((rank, len(seen), found[shape.key(True)].kernel_step_us, decision, lines))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or not torch.distributed.is_available(),
    reason="processes are not forked here",
)
@pytest.mark.parametrize("others", [WHERE, "another GPU | versions | kernels"])
def test_two_ranks(others, tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(
            target=rank_of_two, args=(rank, tmp_path / "store", tmp_path, where, answers)
        )
        for rank, where in enumerate((WHERE, others))
    ]
    for process in processes:
        process.start()
    try:
        found = sorted(answers.get(timeout=100) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    (_, first, us, decision, lines), (_, second, other_us, other_decision, silence) = found
    assert first == 1 and us == 1.0 and decision.from_steps == SHORT and silence == []
    if others == WHERE:
        assert second == 0 and other_us == us and other_decision == decision and lines == []
    else:
        assert second == 1 and other_us == 2.0 and other_decision.from_steps is None
        assert len(lines) == 1 and "last bits" in lines[0] and others in lines[0]
