import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lightning_module.overrides import quoted, take_argument


def hydra_reads(argument):
    return OverridesParser.create().parse_override(argument).value()


paths = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    # A number or a word such as true stands for itself unless it is quoted by the user.
    lambda text: "${" not in text and not text.isascii()
)


@given(paths)
def test_a_path_reaches_hydra_as_typed(path):
    assert str(hydra_reads(quoted(f"run_dir={path}"))) == path


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_a_prompt_is_taken_as_typed(prompt):
    before = sys.argv
    sys.argv = ["predict", "k=3", f"prompt={prompt}", "seed=2"]
    try:
        assert take_argument("prompt") == prompt
        assert sys.argv == ["predict", "k=3", "seed=2"]
        assert take_argument("prompt") is None
    finally:
        sys.argv = before


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("run_dir=跑/一", "跑/一"),
        ("run_dir=跑 步", "跑 步"),
        ("checkpoint=runs/one/checkpoints/epoch=3.ckpt", "runs/one/checkpoints/epoch=3.ckpt"),
        ("checkpoint=runs/my, run (2)", "runs/my, run (2)"),
        ("data.paths=[三国.txt,b/*.txt,'水 浒.txt']", ["三国.txt", "b/*.txt", "水 浒.txt"]),
        ("data.paths=[文 件.txt, 三国(1).txt]", ["文 件.txt", "三国(1).txt"]),
        ("data.paths=['三国.txt', \"é\"]", ["三国.txt", "é"]),
        ("callbacks.samples.prompts=[却说,x]", ["却说", "x"]),
        ("optimizer.betas=[0.9,0.95]", [0.9, 0.95]),
    ],
)
def test_paths_and_lists_need_no_quotes(typed, value):
    assert hydra_reads(quoted(typed)) == value


@pytest.mark.parametrize(
    "typed",
    [
        "optimizer.lr=0.1",
        "-m",
        "model/core=gru,rnn",
        "resume=null",
        "run_dir=",
        "run_dir=${oc.env:HOME}/跑",
        "a.b='x y'",
        "~é",
        "a=[[1,2],[3]]",
        "a=choice(1,2)",
    ],
)
def test_everything_else_stays(typed):
    assert quoted(typed) == typed
