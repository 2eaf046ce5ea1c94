"""docs/compatibility.md says what the marks of the tests say."""

import inspect
import re

import pytest
from torch import nn

from tests import compatibility
from tests.compatibility import CompatibilityError
from triton_gru import GRU, GRUCell


def test_the_page_matches_the_marks():
    assert compatibility.PAGE.read_text("utf-8") == compatibility.page(), (
        "run: python -m tests.compatibility"
    )


def test_every_row_names_a_test_that_pytest_collects():
    """A mark on what is shadowed or skipped over by collection shows nothing."""
    tests = {test for row in compatibility.rows() for test in row.tests}
    for file in sorted({test.partition("::")[0] for test in tests}):
        module = pytest.importorskip(file.removesuffix(".py").replace("/", "."))
        for test in tests:
            if test.startswith(f"{file}::"):
                assert callable(getattr(module, test.partition("::")[2])), test


def test_every_argument_and_public_method_has_a_row():
    """A name of nn.GRU's, or one of ours, that no row mentions is an omission."""
    text = " ".join(row.feature for row in compatibility.rows())
    names = set(inspect.signature(GRU.__init__).parameters) - {"self"}
    names |= set(inspect.signature(GRU.forward).parameters) - {"self"}
    names |= set(inspect.signature(nn.RNNBase.__init__).parameters) - {"self", "mode", "proj_size"}
    for module in (GRU, GRUCell):
        own = set(dir(module)) - set(dir(nn.Module))
        names |= {n for n in own if not n.startswith("_") and callable(getattr(module, n))}
    names -= {"check_forward_args", "check_hidden_size", "check_input", "permute_hidden"}
    names -= {"get_expected_hidden_size"}
    missing = sorted(name for name in names if not re.search(rf"\b{name}\b", text))
    assert not missing, f"no row of docs/compatibility.md mentions {', '.join(missing)}"


@pytest.mark.parametrize(
    ("decorators", "message"),
    [
        (['compat("arguments", "x", "works well")'], "verdict one of works"),
        (['compat("argument", "x", "works")'], "section should be one of arguments"),
        (['compat("arguments", "x")'], "compat takes section, feature, verdict and note"),
        (
            ['compat("arguments", "x", "works")', 'compat("arguments", "x", "differs")'],
            "contradicts",
        ),
        (
            ['compat("arguments", "x", "works", "a")', 'compat("arguments", "x", "works", "b")'],
            "contradicts",
        ),
        (['compat("arguments", name, "works")'], "malformed"),
    ],
)
def test_marks_that_make_no_row_are_errors(tmp_path, decorators, message):
    (tmp_path / "tests").mkdir()
    for i, decorator in enumerate(decorators):
        text = f"@pytest.mark.{decorator}\ndef test_{i}():\n    pass\n"
        (tmp_path / f"tests/test_{i}.py").write_text(text)
    with pytest.raises(CompatibilityError, match=message):
        compatibility.rows(tmp_path)


def test_rows_of_several_tests_and_sections_in_order(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_b.py").write_text(
        '@pytest.mark.compat("beyond", "resets", "works better")\n'
        '@pytest.mark.compat("arguments", "bias", "works", "with none")\n'
        "@other\ndef test_b():\n    pass\n"
    )
    (tmp_path / "tests/test_a.py").write_text(
        '@pytest.mark.compat("arguments", "bias", "works")\ndef test_a():\n    pass\n'
    )
    text = compatibility.page(tmp_path)
    assert "| bias | works | with none | [a](../tests/test_a.py), [b](../tests/test_b.py) |" in text
    assert text.index("## Arguments") < text.index("| bias") < text.index("| resets")
    assert "| resets | **works better** |  | [b](../tests/test_b.py) |" in text
