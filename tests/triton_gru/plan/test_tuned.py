"""What `tune` remembers and `planned` takes, without a GPU. (The timed launches: tests/gpu.)"""

import dataclasses
import json

import pytest

from triton_gru import tuning
from triton_gru.plan import tuned
from triton_gru.plan.devices import DEVICES
from triton_gru.plan.plan import Problem
from triton_gru.plan.planner import DoesNotFit, all_plans, best_plan


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans.json"


def problem(**changes):
    return dataclasses.replace(Problem(16, 768, "bfloat16", True), **changes)


def test_without_a_measurement_the_estimate_decides():
    assert tuned.planned(problem(), DEVICES[90]) == best_plan(problem(), DEVICES[90])
    with pytest.raises(DoesNotFit):
        tuned.planned(problem(hidden=9000), DEVICES[90])


def test_a_stored_plan_is_used_for_its_class_only(cache):
    other = all_plans(problem(), DEVICES[90])[2]
    tuned.remember(problem(), DEVICES[90], other)
    assert tuned.planned(problem(), DEVICES[90]) == other
    for same in (problem(batch=1), problem(batch=9), problem(hidden=760)):
        found = tuned.planned(same, DEVICES[90])
        assert tuned._choice(found) == tuned._choice(other)
    for different in (
        problem(batch=17),
        problem(hidden=784),
        problem(dtype="float16"),
        problem(reset_after=False),
        problem(direction="backward"),
        problem(directions=2),
    ):
        assert tuned.planned(different, DEVICES[90]) == best_plan(different, DEVICES[90])
    elsewhere = dataclasses.replace(DEVICES[90], name="another card")
    assert tuned.planned(problem(), elsewhere) == best_plan(problem(), elsewhere)


def test_choices_add_up_and_survive_a_damaged_file(cache, caplog):
    first = all_plans(problem(), DEVICES[90])[1]
    second = all_plans(problem(direction="backward"), DEVICES[90])[1]
    tuned.remember(problem(), DEVICES[90], first)
    tuned.remember(problem(direction="backward"), DEVICES[90], second)
    assert len(json.loads(cache.read_text())) == 2
    assert tuned.planned(problem(), DEVICES[90]) == first
    assert [p.name for p in cache.parent.iterdir()] == ["plans.json"]
    cache.write_text("{ damaged")
    tuned._read.cache_clear()
    assert tuned.planned(problem(), DEVICES[90]) == best_plan(problem(), DEVICES[90])
    assert "plans come from arithmetic alone" in caplog.text


def test_a_plan_that_no_longer_exists_is_passed_over(cache):
    tuned.remember(problem(), DEVICES[90], best_plan(problem(), DEVICES[90]))
    content = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: ["group", 7, 7, 7, "telepathy", False] for key in content}))
    tuned._read.cache_clear()
    assert tuned.planned(problem(), DEVICES[90]) == best_plan(problem(), DEVICES[90])


@pytest.mark.parametrize(
    ("batch", "rows"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (65, 128), (129, 256)]
)
def test_batches_are_classed_by_powers_of_two(batch, rows):
    assert f" B{rows} " in tuned.shape_class(problem(batch=batch))


def test_tune_says_that_it_needs_a_gpu():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="there is none at cpu"):
        tuning.tune(64, 4, device="cpu")
