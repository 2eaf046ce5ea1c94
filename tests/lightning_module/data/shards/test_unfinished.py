"""`triton-gru-prepare` writes to a folder of its own, one process at a time."""

import json
from pathlib import Path

import pytest

from lightning_module.data.corpora import text_files
from lightning_module.data.shards import index, preparing
from lightning_module.data.shards.unfinished import UNFINISHED
from lightning_module.data.tokenizers import TokenizerSettings
from lightning_module.errors import DataError, RunError
from tests.lightning_module.data.test_preparing import CHAR, Inline


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("thee and thou\n" * 200)
    return text_files(str(tmp_path / "a.txt"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", [index.TOKENIZER, f"{UNFINISHED}/mine", "notes.txt"])
def test_a_folder_with_other_files_is_left_as_it_is(tmp_path, corpus, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=r"other files \(.*set a new folder"):
        preparing.prepare(corpus, CHAR, str(tmp_path / "out"), Inline())
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_hidden_files_do_not_matter(tmp_path, corpus):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    preparing.prepare(corpus, CHAR, str(tmp_path / "out"), Inline())


def test_a_name_with_brackets_is_a_name(tmp_path, corpus):
    out = tmp_path / "out [1] *"
    whole = preparing.prepare(corpus, CHAR, str(out), Inline())
    assert sorted(whole.splits) == ["train", "val"]
    assert not (out / UNFINISHED).exists()


def test_a_second_process_is_refused(tmp_path, corpus):
    out = str(tmp_path / "out")

    class Second(Inline):
        def start(self, *arguments):
            with pytest.raises(RunError, match="is held by pid"):
                preparing.prepare(corpus, CHAR, out, Inline())
            return super().start(*arguments)

    preparing.prepare(corpus, CHAR, out, Second())


def test_a_part_of_other_shards_is_left_as_it_is(tmp_path, corpus, monkeypatch):
    out = tmp_path / "out"

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(preparing, "write_shards", fail)
        with pytest.raises(DataError, match="No space left"):
            preparing.prepare(corpus, CHAR, str(out), Inline())
    # Nothing was made: the settings may change.
    settings = TokenizerSettings("word")
    with monkeypatch.context() as failing:
        failing.setattr(index.Index, "to_json", fail)
        with pytest.raises(DataError, match="No space left"):
            preparing.prepare(corpus, settings, str(out), Inline())
    before = contents(out)
    with pytest.raises(DataError, match="part of the shards of other text or of other settings"):
        preparing.prepare(corpus, CHAR, str(out), Inline())
    assert contents(out) == before
    whole = preparing.prepare(corpus, settings, str(out), Inline())
    assert whole.tokenizer == settings
    wanted = preparing.prepare(corpus, settings, str(tmp_path / "whole"), Inline())
    assert whole == wanted


@pytest.mark.parametrize("cut", ["plan.json", index.TOKENIZER])
def test_a_file_that_a_kill_cut_is_made_again(tmp_path, corpus, monkeypatch, cut):
    out = tmp_path / "out"

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(preparing, "write_shards", fail)
        with pytest.raises(DataError, match="No space left"):
            preparing.prepare(corpus, CHAR, str(out), Inline())
    file = out / UNFINISHED / cut if cut == "plan.json" else out / cut
    file.write_bytes(file.read_bytes()[:20])
    whole = preparing.prepare(corpus, CHAR, str(out), Inline())
    json.loads((out / index.TOKENIZER).read_text())
    assert whole == preparing.prepare(corpus, CHAR, str(tmp_path / "whole"), Inline())
    assert not (out / UNFINISHED).exists()


def test_what_a_kill_at_the_very_end_left_is_removed(tmp_path, corpus):
    out = tmp_path / "out"
    preparing.prepare(corpus, CHAR, str(out), Inline())
    (out / UNFINISHED).mkdir()
    preparing.prepare(corpus, CHAR, str(out), Inline())
    assert not (out / UNFINISHED).exists()
