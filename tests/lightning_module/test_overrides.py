import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lightning_module.overrides import quoted


def hydra_reads(argument):
    return OverridesParser.create().parse_override(argument).value()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1))
def test_a_prompt_reaches_hydra_as_typed(prompt):
    if prompt != "null":
        assert str(hydra_reads(quoted(f"prompt={prompt}"))) == prompt


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("run_dir=跑/一", "跑/一"),
        ("data.paths=[三国.txt,b/*.txt,'水 浒.txt']", ["三国.txt", "b/*.txt", "水 浒.txt"]),
        ("data.paths=['三国.txt', \"é\"]", ["三国.txt", "é"]),
        ("callbacks.samples.prompts=[却说,x]", ["却说", "x"]),
    ],
)
def test_words_beyond_ascii_need_no_quotes(typed, value):
    assert hydra_reads(quoted(typed)) == value


@pytest.mark.parametrize(
    "typed",
    ["optimizer.lr=0.1", "-m", "model/core=gru,rnn", "prompt=null", "prompt=", "a.b='x y'", "~é"],
)
def test_everything_else_stays(typed):
    assert quoted(typed) == typed
