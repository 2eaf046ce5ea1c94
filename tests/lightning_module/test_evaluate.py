"""A checkpoint judged afterwards: by the command, and from Python as docs/training.md shows it."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from lightning_module.commands import evaluate
from lightning_module.run_files import CHECKPOINTS, LAST, METRICS, read_metrics
from tests.lightning_module.conftest import made_text

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def judged(monkeypatch, capsys):
    """Runs the command in this process and returns the object that it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval", "format=json", *map(str, arguments)])
        evaluate()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_a_checkpoint_is_evaluated_as_in_its_run(trained, command, judged, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(command.home / "cache"))
    validated = [row for row in read_metrics(trained / METRICS) if "val_loss" in row]
    best = min(validated, key=lambda row: row["val_loss"])
    for checkpoint, expected in ((trained / CHECKPOINTS / LAST, validated[-1]), (trained, best)):
        found = judged(f"checkpoint={checkpoint}")
        for name in ("loss", "perplexity", "bits_per_char", "top1", "top5"):
            assert found[name] == pytest.approx(expected[f"val_{name}"], rel=1e-6), name


def test_other_text_is_evaluated_completely(trained, judged, tmp_path, fails):
    text = made_text(3_000, seed=5)
    (tmp_path / "a.txt").write_text(text[:1000] + "ß")
    (tmp_path / "b.txt").write_text(text[1000:])
    found = judged(f"checkpoint={trained}", f"data.paths=[{tmp_path}/*.txt]")
    assert (found["tokens"], found["characters"], found["unknown"]) == (3001, 3001, 1)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-6)
    assert found["bits_per_char"] == pytest.approx(found["loss"] / math.log(2), rel=1e-6)
    for arguments, expected in (
        (["data.paths=[none.txt]"], "There is no file none.txt"),
        (["format=xml"], "format must be"),
        (["device=abacus"], "abacus"),
    ):
        assert expected in fails(evaluate, f"checkpoint={trained}", *arguments)


@pytest.mark.parametrize("page", ["training.md", "zh/training.md"])
def test_the_script_of_the_docs_runs(page, monkeypatch, tmp_path, capsys):
    (script,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    assert len(script.splitlines()) <= 40
    if page.startswith("zh"):
        compile(script, page, "exec")  # the same but for its comments
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    Path("my.txt").write_text(made_text(10_000))
    names = {}
    exec(script, names)
    (tested,) = names["trainer"].test(names["model"], datamodule=names["data"], verbose=False)
    nats = names["nats"]
    assert len(nats) == names["data"].val.tokens.tokens
    # Test and prediction are two ways to the same number.
    assert nats.double().mean().item() == pytest.approx(tested["test_loss"], rel=1e-5)
    assert tested["test_loss"] < 1.5  # it has learnt: chance is 3 nats
    assert "The " in capsys.readouterr().out
