"""Repeats, quantiles and rounds, on a clock that tells prepared times."""

import numpy as np
import pytest

from benchmarks import timing


class FakeClock:
    """Each call takes what it returns."""

    def __init__(self):
        self.calls = 0

    def seconds(self, calls):
        self.calls += len(calls)
        return [call() for call in calls]

    def synchronize(self):
        pass


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("q", timing.QUANTILES)
def test_quantiles_are_numpys(count, q):
    values = np.random.default_rng(count).random(count).tolist()
    assert timing.quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-12)


def test_summary_is_of_all_rounds_and_of_each():
    found = timing.summary([[1e-3, 2e-3, 3e-3], [2e-3, 3e-3, 10e-3]])
    assert found["median_ms"] == pytest.approx(2.5)
    assert found["min_ms"] == pytest.approx(1)
    assert found["p90_ms"] == pytest.approx(6.5)
    assert found["round_medians_ms"] == pytest.approx([2, 3])
    assert found["repeats"] == 6


@pytest.mark.parametrize(
    ("each", "repeats"),
    [(1e-6, timing.MOST_REPEATS), (0.01, 25), (1.0, timing.LEAST_REPEATS)],
)
def test_repeats_fill_the_time_within_bounds(each, repeats):
    clock = FakeClock()
    times = timing.measure([lambda: each], clock, seconds=0.25)
    assert times == [each] * repeats
    assert clock.calls == repeats + 1 + timing.WARM_UPS


def test_inputs_take_turns():
    turns = []
    calls = [lambda i=i: turns.append(i) or 1.0 for i in range(3)]
    timing.measure(calls, FakeClock(), seconds=0.0, least=7)
    assert turns[-7:] == [0, 1, 2, 0, 1, 2, 0]


def test_the_wall_clock_counts_what_a_call_takes():
    import time

    quick, slow = timing.WallClock().seconds([lambda: None, lambda: time.sleep(0.02)])
    assert quick < 0.02 <= slow
