import pytest

from triton_gru import dispatch
from triton_gru.engines.cpu import rule


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    """The backends that run without a GPU; "triton" in tests/interpreter, in its place."""
    return request.param


@pytest.fixture(autouse=True)
def cpu_engine_from_one_step_on(monkeypatch):
    """Lets "auto" take the CPU engine in the short sequences of tests; "torch" by name is ATen."""
    choices = dispatch._choose_on_cpu  # it keeps reasons, which name the limits
    choices.cache_clear()
    rule.ranges.cache_clear()
    monkeypatch.setattr(rule, "STEPS", 1)
    monkeypatch.setattr(rule, "UNITS_A_STEP", 10**9)
    monkeypatch.setattr(rule, "ROWS_IF_WIDE", 0)
    monkeypatch.setattr(rule, "PRODUCT", dict.fromkeys(rule.PRODUCT, 10**18))
    yield
    choices.cache_clear()
    rule.ranges.cache_clear()
