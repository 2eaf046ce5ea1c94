"""Shards hold the tokens of the token cache, in its order, for any number of workers."""

import hashlib
import json
import os
import random
import signal
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lightning_module.data.corpora import Corpus, Document, files, records, text_files
from lightning_module.data.corpora.corpus import Part
from lightning_module.data.shards import index, preparing
from lightning_module.data.shards.executors import Local
from lightning_module.data.shards.index import BLOCK, FILES, Index
from lightning_module.data.token_cache import TokenCache
from lightning_module.data.tokenizers import TokenizerSettings
from lightning_module.errors import DataError


class Inline:
    """An executor whose jobs run at once, in this process."""

    def __init__(self, workers: int = 1):
        self.workers = workers
        self.started = 0

    def start(self, function, *arguments):
        self.started += 1
        job: Future = Future()
        try:
            job.set_result(function(*arguments))
        except Exception as error:
            job.set_exception(error)
        return job

    def stop(self):
        pass


CHAR = TokenizerSettings("char")
BPE = TokenizerSettings("bpe", 300)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(files, "PART", 997)


def text(lines: int, seed: int) -> str:
    draw = random.Random(seed)
    words = ["thee", "thou", "水滸", "a", "'tis", "night\n", "\n", "  ", "é", "42", "…"]
    return "".join(
        " ".join(draw.choices(words, k=draw.randrange(1, 14))) + draw.choice(["\n", "\r\n", "\n\n"])
        for _ in range(lines)
    )


@pytest.fixture
def paths(tmp_path):
    for n, lines in enumerate((60, 3, 200)):
        (tmp_path / f"{n}.txt").write_bytes(
            (b"\xef\xbb\xbf" if n else b"") + text(lines, seed=n).encode()
        )
    return [str(tmp_path / f"{n}.txt") for n in range(3)]


def read(folder: str, whole: Index, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The stream of a split and where its documents begin, after every check of its files."""
    fs, path = fsspec.core.url_to_fs(folder)
    streams, begins, before = [], [], 0
    for shard in whole.splits[split]:
        contents = {file: fs.cat_file(f"{path}/{shard.name}.{file}") for file in FILES}
        assert {f: hashlib.sha256(c).hexdigest() for f, c in contents.items()} == shard.sha256
        tokens = contents["tokens"]
        blocks = [tokens[b : b + BLOCK] for b in range(0, len(tokens), BLOCK)]
        assert contents["blocks"] == b"".join(hashlib.sha256(b).digest() for b in blocks)
        stream = np.frombuffer(tokens, np.dtype(whole.dtype))
        assert len(stream) == shard.length
        begin = np.frombuffer(contents["begins"], "<i8")
        assert len(begin) == shard.documents
        streams.append(stream)
        begins.append(begin + before)
        before += shard.length
    return np.concatenate(streams), np.concatenate(begins)


def check(folder: str, whole: Index, corpus: Corpus, settings: TokenizerSettings) -> None:
    """The shards are the token cache's."""
    cache = TokenCache(corpus, settings)
    cache.make()
    tokenizer, *splits = cache.open()
    assert whole.fingerprint == tokenizer.fingerprint
    for name, split in zip(index.SPLITS, splits, strict=True):
        stream, begins = read(folder, whole, name)
        np.testing.assert_array_equal(stream, split.stream)
        np.testing.assert_array_equal(begins, split.begins[:-1])
        shards = whole.splits[name]
        assert sum(shard.characters for shard in shards) == split.characters
        assert sum(shard.unknown for shard in shards) == split.unknown


@pytest.mark.parametrize(
    "settings", [CHAR, BPE, TokenizerSettings("word", 9)], ids=lambda s: s.kind
)
@pytest.mark.parametrize("val_fraction", [0.1, 0.37, 0.9])
def test_shards_of_files_are_the_token_cache(tmp_path, paths, settings, val_fraction):
    corpus = text_files(paths, val_fraction)
    out = str(tmp_path / "out")
    whole = preparing.prepare(corpus, settings, out, Inline(3), size=1024)
    check(out, whole, corpus, settings)
    assert len(whole.splits["train"]) + len(whole.splits["val"]) > 2
    assert sorted(p.name for p in Path(out).iterdir()) == sorted(
        [index.INDEX, index.TOKENIZER]
        + [f"{s.name}.{file}" for shards in whole.splits.values() for s in shards for file in FILES]
    )


def test_any_number_of_workers_makes_the_same_files(tmp_path, paths):
    made = []
    for workers in (1, 2, 7):
        out = tmp_path / f"out{workers}"
        preparing.prepare(text_files(paths), CHAR, str(out), Inline(workers), size=1024)
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1] == made[2]


def test_a_large_file_is_one_document_in_many_shards(tmp_path):
    (tmp_path / "a.txt").write_text(text(400, seed=5))
    out = str(tmp_path / "out")
    corpus = text_files(str(tmp_path / "a.txt"))
    whole = preparing.prepare(corpus, CHAR, out, Inline(2), size=1024)
    assert [shard.documents for shard in whole.splits["train"]][:3] == [1, 0, 0]
    check(out, whole, corpus, CHAR)


def test_a_file_of_one_line_is_whole(tmp_path):
    (tmp_path / "a.txt").write_text("no end " * 1000)
    corpus = text_files(str(tmp_path / "a.txt"))
    whole = preparing.prepare(corpus, CHAR, str(tmp_path / "out"), Inline(2), size=2048)
    check(str(tmp_path / "out"), whole, corpus, CHAR)


def write_records(path: Path, texts: list) -> None:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
        return
    with fsspec.open(str(path), "wt", compression="infer", encoding="utf-8") as file:
        for n, record in enumerate(texts):
            print(json.dumps({"id": n, "text": record}, ensure_ascii=n % 2 == 0), file=file)
            if n % 5 == 0:
                print(file=file)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("with_val_paths", [False, True])
def test_records(tmp_path, ending, with_val_paths):
    for n in range(3):
        texts = [None if k % 9 == 4 else "" if k % 11 == 3 else text(3, seed=50 * n + k)
                 for k in range(30)]  # fmt: skip
        write_records(tmp_path / f"{n}{ending}", texts)
    paths = str(tmp_path / f"[01]{ending}")
    val_paths = str(tmp_path / f"2{ending}") if with_val_paths else None
    corpus = records(paths, val_paths=val_paths, val_fraction=0.2)
    whole = preparing.prepare(corpus, CHAR, str(tmp_path / "out"), Inline(2), size=2048)
    check(str(tmp_path / "out"), whole, corpus, CHAR)
    documents = sum(shard.documents for shard in whole.splits["val"])
    assert documents == sum(1 for _ in corpus.val() if list(_.pieces()) != [""])
    assert documents > 3


def test_a_record_without_the_field_is_named(tmp_path):
    write_records(tmp_path / "a.jsonl", ["a"] * 10)
    with pytest.raises(DataError, match=r"a.jsonl has no field 'body' but 'id', 'text'"):
        preparing.prepare(
            records(str(tmp_path / "a.jsonl"), "body"), CHAR, str(tmp_path / "out"), Inline()
        )


def test_a_line_that_is_not_json_is_shown(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": broken}\n' * 3)
    with pytest.raises(DataError, match=r"a line that is not JSON.*'\{\"text\": broken\}'"):
        preparing.prepare(records(str(tmp_path / "a.jsonl")), CHAR, str(tmp_path / "o"), Inline())


def test_half_a_surrogate_pair_is_refused(tmp_path):
    write_records(tmp_path / "a.jsonl", ["a"] * 10)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "a \\ud800 b"}\n' * 5)
    corpus = records(str(tmp_path / "a.jsonl"), val_fraction=0.2)
    with pytest.raises(DataError, match=r"a.jsonl has text in 'text' that is not Unicode.*ud800"):
        preparing.prepare(corpus, CHAR, str(tmp_path / "out"), Inline())


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".parquet"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "changed"])
def test_a_damaged_file_is_named(tmp_path, ending, cut):
    path = tmp_path / f"a{ending}"
    write_records(path, [text(9, seed=n) for n in range(300)])
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + (b"" if cut else bytes(200) + content[middle + 200 :]))
    with pytest.raises(DataError, match=rf"^(Cannot read )?{path}[: ](?!.*Cannot write)"):
        preparing.prepare(records(str(path)), CHAR, str(tmp_path / "out"), Inline(2), size=2**14)


def test_text_in_a_store_without_credentials_is_one_line(monkeypatch):
    class NoCredentialsError(Exception):
        __module__ = "botocore.exceptions"

    class Store(fsspec.get_filesystem_class("memory")):
        def info(self, path, **_):
            raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(files, "open_store", lambda url: (Store(), "/x"))
    with pytest.raises(DataError, match=r"^Cannot read s3://bucket/x: .*Unable to locate"):
        text_files("s3://bucket/x")


def test_all_of_a_compressed_file_trains_the_tokenizer(tmp_path):
    write_records(tmp_path / "a.jsonl.gz", ["thee and thou " * 99] * 60 + ["é"] + ["thou"] * 9)
    corpus = records(str(tmp_path / "a.jsonl.gz"), val_fraction=0.1)
    out = str(tmp_path / "out")
    check(out, preparing.prepare(corpus, CHAR, out, Inline()), corpus, CHAR)


def test_text_at_a_url(tmp_path):
    memory = fsspec.filesystem("memory")
    for n in range(3):
        memory.pipe_file(f"/urls/{n}.txt", text(50, seed=n).encode())
        (tmp_path / f"{n}.txt").write_text(text(50, seed=n))
    at_url = preparing.prepare(
        text_files("memory://urls/*.txt"), CHAR, str(tmp_path / "a"), Inline(2), size=1024
    )
    local = preparing.prepare(
        text_files(str(tmp_path / "?.txt")), CHAR, str(tmp_path / "b"), Inline(2), size=1024
    )
    assert at_url.splits == local.splits


def test_only_tasks_that_were_not_done_are_made_again(tmp_path, paths, monkeypatch):
    corpus, out = text_files(paths), tmp_path / "out"
    wanted = preparing.prepare(corpus, CHAR, str(tmp_path / "whole"), Inline(), size=1024)
    write, made = preparing.write_shards, []

    def failing(filesystem, folder, name, *arguments):
        if name == "train-00002":
            raise OSError(28, "No space left on device")
        made.append(name)
        return write(filesystem, folder, name, *arguments)

    monkeypatch.setattr(preparing, "write_shards", failing)
    with pytest.raises(DataError, match=r"train-00002.*No space left.*makes the rest"):
        preparing.prepare(corpus, CHAR, str(out), Inline(), size=1024)
    assert made == ["train-00000", "train-00001"]
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("train-0000[01]*")}
    monkeypatch.setattr(preparing, "write_shards", write)
    # The tokenizer is not trained again either.
    monkeypatch.setattr(preparing.Tokenizer, "train", None)
    assert preparing.prepare(corpus, CHAR, str(out), Inline(), size=1024) == wanted
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("train-0000[01]*")}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_complete_shards_are_left_as_they_are(tmp_path, paths):
    out, executor = str(tmp_path / "out"), Inline()
    whole = preparing.prepare(text_files(paths), CHAR, out, executor)
    started = executor.started
    assert preparing.prepare(text_files(paths), CHAR, out, executor) == whole
    assert executor.started == started
    with pytest.raises(DataError, match=r"out has shards of other text.*set another out"):
        preparing.prepare(text_files(paths), BPE, out, executor)
    with pytest.raises(DataError, match="other settings"):
        preparing.prepare(text_files(paths[:1]), CHAR, out, executor)


def test_a_split_without_text_is_found_before_tokenising(tmp_path):
    write_records(tmp_path / "a.jsonl", ["a"])
    executor = Inline()
    with pytest.raises(DataError, match="the train split has no text"):
        preparing.prepare(records(str(tmp_path / "a.jsonl")), CHAR, str(tmp_path / "o"), executor)
    assert executor.started == 0


def killed(flag: Path | None, parent: int):
    """A document whose reading kills each worker, or only the first."""
    if os.getpid() != parent and (flag is None or not flag.exists()):
        if flag is not None:
            flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield Document("", "ab\n" * 7)


def corpus_of(*train: Part) -> Corpus:
    val = Part(lambda: iter([Document("", "ab\n" * 9)]), 27)
    return Corpus("test", "1", "a test", None, None, lambda apply: (list(train), [val]))


def part(n: int) -> Part:
    return Part(lambda: iter([Document("", f"ab {n}\n" * 5)]), None)


def test_the_shards_of_a_killed_worker_are_made_again(tmp_path):
    flag, out = tmp_path / "flag", tmp_path / "out"
    kills = Part(partial(killed, flag, os.getpid()))
    corpus = corpus_of(part(0), kills, part(2), part(3))
    whole = preparing.prepare(corpus, CHAR, str(out), Local(2))
    assert flag.exists()
    stream, begins = read(str(out), whole, "train")
    assert [len(stream) - begins[-1], *np.diff(begins)] == [26, 26, 22, 26]
    assert len(list(out.glob("*.tokens"))) == 5


def length(path: Path, flag: Path | None, parent: int) -> int:
    return sum(len(piece) for document in killed(flag, parent) for piece in document.pieces())


@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_is_killed_while_it_counts(tmp_path, always):
    flag, executor = None if always else tmp_path / "flag", Local(2)
    count = partial(length, flag=flag, parent=os.getpid())
    try:
        if always:
            with pytest.raises(DataError, match=r"without having read the text.*makes the rest"):
                preparing._apply(executor, "out", count, [0, 1, 2])
        else:
            assert preparing._apply(executor, "out", count, [0, 1, 2]) == [21, 21, 21]
            assert flag.exists()
    finally:
        executor.stop()


def test_a_task_that_kills_every_worker_ends_in_an_error(tmp_path):
    kills = Part(partial(killed, None, os.getpid()))
    with pytest.raises(DataError, match=r"without having made any shard.*fewer workers"):
        preparing.prepare(corpus_of(part(0), kills), CHAR, str(tmp_path / "out"), Local(1))
    assert (tmp_path / "out" / "unfinished" / "train-00000.json").exists()


def test_the_tokenizer_is_trained_on_a_share_of_each_part(tmp_path):
    letters = [Part(lambda c=c: iter([Document("", f"{c}\n" * 100)]), 200) for c in "abcdef"]
    read = "".join(preparing._text(letters, 60, lambda _: None))
    assert read == "".join(f"{c}\n" * 5 for c in "abcdef")
    everything = "".join(preparing._text(letters, 1200, lambda _: None))
    assert everything == "".join(f"{c}\n" * 100 for c in "abcdef")


def test_progress_has_tokens_per_second_and_time_left(tmp_path, paths, caplog, monkeypatch):
    monkeypatch.setattr(preparing, "_REPORT_EVERY", 0.0)
    monkeypatch.setattr("lightning_module.terminal.progress_bars.EVERY_SECONDS", 0.0)
    caplog.set_level("INFO")
    preparing.prepare(text_files(paths), CHAR, str(tmp_path / "out"), Inline(2), size=1024)
    assert "Tokenising in 2 workers: " in caplog.text
    assert " tokens/s" in caplog.text


def test_a_store_that_cannot_be_used_is_one_line(tmp_path, paths, monkeypatch):
    monkeypatch.setenv("SOME_SECRET_KEY", "hunter2hunter2")

    class Store(fsspec.get_filesystem_class("memory")):
        def exists(self, path, **_):
            raise ValueError("Invalid endpoint, with the key hunter2hunter2")

    monkeypatch.setattr(preparing, "open_store", lambda url: (Store(), "/x"))
    with pytest.raises(DataError, match=r"^s3://x cannot be read: .*Invalid endpoint.*\*\*\*"):
        preparing.prepare(text_files(paths), CHAR, "s3://x", Inline())
