import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lightning_module.settings.overrides import quote_arguments, quoted, take_argument, take_changes
from lightning_module.settings.table import SETTINGS


def hydra_reads(argument):
    return OverridesParser.create().parse_override(argument).value()


def swept(argument):
    """What each job of a sweep reads: its override is written out and quoted once more."""
    override = OverridesParser.create().parse_override(quoted(argument))
    key = override.get_key_element()
    values = override.sweep_string_iterator()
    return [hydra_reads(quoted(f"{key}={value}", multirun=False)) for value in values]


# A text wholly in quotes is what is in them, as everywhere in Hydra.
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: not text.startswith(("'", '"')) and text.strip() == text
)
like_values = st.sampled_from(
    ["2024_01_02", "2024", "1e3", "true", "Null", "nan", "~", "-x", "a,b", "[a]", "{a:1}", "a=b",
     "choice(1)", "C:\\x\\", "$HOME", "(1)", "it's", "a'b,c'd", "${now:%Y}", "三国 (1).txt", "0x1"]
)  # fmt: skip


@pytest.mark.parametrize("key", ["run_dir", "checkpoint", "runs", "output"])
@given(texts | like_values)
def test_a_path_is_always_text(key, text):
    argument = quoted(f"{key}={text}")
    assert hydra_reads(argument) == text
    assert quoted(argument) == argument


@given(st.lists(texts.filter(lambda text: not set("[],{}") & set(text)) | st.just("2024_01_02")))
def test_a_list_of_texts_holds_them_as_typed(items):
    argument = f"data.paths=[{','.join(items)}]"
    assert hydra_reads(quoted(argument)) == items
    assert quoted(quoted(argument)) == quoted(argument)


@given(texts)
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
        ("checkpoint=runs/one/checkpoints/epoch=3.ckpt", "runs/one/checkpoints/epoch=3.ckpt"),
        ("checkpoint=runs/my, run (2)", "runs/my, run (2)"),
        ("run_dir='my run'", "my run"),
        ("run_dir=null", "null"),
        ("resume=null", None),
        ("run_dir=${oc.env:HOME}/跑", "${oc.env:HOME}/跑"),
        ("data.paths=[三国.txt,b/*.txt,'水 浒.txt']", ["三国.txt", "b/*.txt", "水 浒.txt"]),
        ("data.paths=[文 件.txt, 三国(1).txt]", ["文 件.txt", "三国(1).txt"]),
        ("data.paths=['三国.txt', \"é\"]", ["三国.txt", "é"]),
        ("data.paths=[a[1,2].txt,b.txt]", ["a[1,2].txt", "b.txt"]),
        ("data.paths=[a[1.txt,b.txt]", ["a[1.txt", "b.txt"]),
        ("data.paths=[]", []),
        ("data.paths=a.txt", "a.txt"),  # a list of one, see settings.check
        ("callbacks.samples.prompts=[却说,x]", ["却说", "x"]),
        ("callbacks.samples.prompts=[No,1,null]", ["No", "1", "null"]),
        ("callbacks.samples.prompts=[the cat's,the dogs']", ["the cat's", "the dogs'"]),
        ('callbacks.samples.prompts=["the cat\'s",x]', ["the cat's", "x"]),
        (r"callbacks.samples.prompts=['the cat\'s']", ["the cat's"]),
        ("callbacks.samples.prompts=['To be, or not']", ["To be, or not"]),
        ("optimizer.betas=[0.9,0.95]", [0.9, 0.95]),
        ("+any.text=it's 好", "it's 好"),
        ("+any.list=[甲,3,null,a!b]", ["甲", 3, None, "a!b"]),
        ("+any.map={a:你好,b:1}", {"a": "你好", "b": 1}),
        (r"+any.text=甲\,乙", "甲,乙"),
        ("trainer.max_time=1:00:00:00", "1:00:00:00"),
    ],
)
def test_values_need_no_quotes(typed, value):
    assert hydra_reads(quoted(typed, multirun=False)) == value


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("data.paths=[甲.txt],[乙.txt]", [["甲.txt"], ["乙.txt"]]),
        ("data.paths=[甲.txt,2024],[it's]", [["甲.txt", "2024"], ["it's"]]),
        ("data.paths=甲.txt,2024_01_02", ["甲.txt", "2024_01_02"]),
        ("data.paths=choice([甲.txt],[乙.txt])", [["甲.txt"], ["乙.txt"]]),
        ("callbacks.samples.prompts=[你好],[再见]", [["你好"], ["再见"]]),
        ("data.name=甲,乙", ["甲", "乙"]),
        ("data.name=1,true", ["1", "true"]),
        ("+any.text=甲,it's", ["甲", "it's"]),
        ("+any.text=choice(甲,'乙 丙')", ["甲", "乙 丙"]),
        ("optimizer.lr=0.1,0.2", [0.1, 0.2]),
    ],
)
def test_commas_sweep(typed, values):
    assert swept(typed) == values


@pytest.mark.parametrize(
    "typed",
    [
        "optimizer.lr=0.1",
        "-m",
        "model/layer_type=gru,rnn",
        "resume=null",
        "run_dir=",
        "data.paths=[made.txt,/tmp/b.txt]",
        "a.b='x y'",
        "~é",
        "a=[[1,2],[3]]",
        "a=choice(1,2)",
        "optimizer.lr=tag(log,interval(0.001,0.03))",
    ],
)
def test_everything_else_stays(typed):
    assert quoted(typed) == typed


def test_every_text_is_read_as_text():
    for settings in SETTINGS.values():
        for key, kind in settings.items():
            if kind.text:
                read = hydra_reads(quoted(f"{key}={'[2024]' if kind.many else '2024'}"))
                assert read == (["2024"] if kind.many else "2024"), key


def test_flags_may_stand_anywhere_and_changes_of_a_resumed_run_are_not_for_hydra(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "a=1", "-m", "data.name=甲,乙", "~b"])
    assert take_changes() == []
    quote_arguments()
    assert sys.argv == ["train", "-m", "a=1", "data.name='甲','乙'", "~b"]
    monkeypatch.setattr(sys, "argv", ["train", "a.b=1", "resume=2024", "+c=d", "--config-dir", "x"])
    assert take_changes() == ["a.b=1", "+c=d"]
    quote_arguments()
    assert sys.argv == ["train", "--config-dir", "x", "resume='2024'"]
