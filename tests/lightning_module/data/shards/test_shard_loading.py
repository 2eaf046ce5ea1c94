"""Passes over shards: resumed anywhere, by any number of ranks; and shards that are refused."""

import json
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from lightning_module import commands
from lightning_module.credentials import without_credentials, without_secrets
from lightning_module.data.chunks import PackedChunks, StreamChunks
from lightning_module.data.corpora import files, text_files
from lightning_module.data.datamodule import SentenceDataModule
from lightning_module.data.loading import ShardLoader
from lightning_module.data.shards import preparing, reading
from lightning_module.data.shards.corpus import shards
from lightning_module.data.tokenizers import SHARDS, Tokenizer, TokenizerSettings
from lightning_module.distributed import ranks
from lightning_module.errors import DataError, StoreError
from tests.lightning_module.conftest import made_text
from tests.lightning_module.data.shards.making import (
    CHAR,
    hang,
    made_tokenizer,
    made_tokens,
    write_shards,
)
from tests.lightning_module.data.shards.test_shard_tokens import URL, assert_equal, made_cache
from tests.lightning_module.data.test_preparing import Inline

OF_SHARDS = TokenizerSettings(SHARDS)
LENGTHS = [30, 5, 61, 17, 1, 70]


@pytest.fixture
def corpus(store, block):
    """Shards of a few tokens at `URL`; returns the tokens."""
    block(32)
    tokenizer = made_tokenizer()
    splits = {
        "train": made_tokens(LENGTHS, tokenizer.vocab_size),
        "val": made_tokens([40], tokenizer.vocab_size, 1),
    }
    write_shards(URL, tokenizer, splits, [50, 20, 41])
    return splits


def made_module(url=URL, tokenizer=OF_SHARDS, **arguments):
    arguments = {"batch_size": 3, "seq_len": 8, **arguments}
    module = SentenceDataModule(shards, tokenizer, url=url, **arguments)
    module.prepare_data()
    module.setup()
    return module


def columns(chunks):
    """Every chunk's tensors, of all ranks side by side."""
    found = []
    for items in zip(*chunks, strict=True):
        for name in ("inputs", "targets", "fresh"):
            found.append(torch.cat([getattr(item, name) for item in items], -1))
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["stream", "packed"])
def test_resumed_at_every_chunk_by_any_number_of_ranks(corpus, packed):
    """Rank by rank, from the position that other ranks saved, in processes that know nothing."""
    cache = made_cache(1 if packed else 8)

    def loader(number, world):
        own = ranks.share(4, number, world)
        tokens = cache.open()[1]
        ends_line = np.arange(40) % 7 == 3
        if packed:
            return ShardLoader(PackedChunks(tokens, ends_line, 4, 8, own=own))
        return ShardLoader(StreamChunks(tokens, 4, 8, own=own))

    whole = columns([list(loader(0, 1))])
    length = len(loader(0, 1))
    assert length > 5
    for stopped in range(length + 1):
        for before, after in ((1, 2), (2, 1), (2, 3)):
            saved = []
            for number in range(before):
                passed = loader(number, before)
                for k, _ in enumerate(passed, 1):
                    if k == stopped:
                        break
                if stopped:
                    saved.append(passed.state_dict())
            resumed = [loader(number, after) for number in range(after)]
            for one in resumed:
                for state in saved[:1]:
                    one.load_state_dict(state)
            rest = columns([list(one) for one in resumed])
            first = 3 * (stopped % length)
            assert all(map(torch.equal, rest, whole[first:]))
            assert len(rest) == len(whole) - first


def test_a_checkpoint_of_other_shards_is_refused(corpus, store):
    state = made_module().train_dataloader().state_dict()
    made_module().train_dataloader().load_state_dict(state)
    tokenizer = made_tokenizer()
    other = {name: made_tokens([200], tokenizer.vocab_size, seed=9) for name in ("train", "val")}
    store.reset()
    write_shards(URL, tokenizer, other, [50])
    with pytest.raises(DataError, match="saved with other shards than those that are at"):
        made_module().train_dataloader().load_state_dict(state)


def test_blocks_are_read_when_rows_come_near_and_forgotten_after(corpus, store):
    """No read before its time, none twice, and a bounded number in memory."""
    module = made_module()
    loader = module.train_dataloader()
    held = []
    for _ in loader:
        held.append(len(loader.tokens._held))
    # A row asks for 3 chunks of 8 tokens: at most 3 blocks of 16, of which a shard may cut one.
    assert max(held) <= 12
    needed = len(set(store.reads))
    assert needed <= len(store.reads) <= needed + 2  # where a row ends in the next one's first
    store.reads.clear()
    module.train_dataloader()._resume_at = 0
    one = iter(made_module().train_dataloader())
    next(one)
    assert 3 <= len(store.reads) <= 12


def test_limits_are_not_read_past(corpus, store):
    loader = ShardLoader(made_module().train, limit=1)
    next(iter(loader))
    assert {path for path, *_ in store.reads} <= {f"/corpus/train-0000{n}.tokens" for n in range(4)}
    assert len(store.reads) <= 5  # a chunk of 8 tokens in each of 3 rows


def test_tokens_of_other_tokenizers_are_refused(corpus):
    assert made_module(tokenizer=CHAR).tokenizer.vocab_size == made_tokenizer().vocab_size
    for settings in (TokenizerSettings("bpe", 300), TokenizerSettings("char", 20)):
        with pytest.raises(
            DataError, match=r"holds tokens of tokenizer=char .*set tokenizer=shards"
        ):
            made_module(tokenizer=settings)
    with pytest.raises(DataError, match="max_chars=1000 cannot shorten shards"):
        made_module(max_chars=1000)
    with pytest.raises(DataError, match="tokenizer=shards stands for the tokenizer of data=shards"):
        OF_SHARDS.check()


def damaged_index(change):
    def run(store):
        path = "/corpus/index.json"
        content = json.loads(store().cat_file(path))
        store().pipe_file(path, json.dumps(change(content)).encode())

    return run


def other_file(name, content):
    return lambda store: store().pipe_file(f"/corpus/{name}", content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_index(lambda index: index | {"format": 99}), r"index.json has format 99"),
        (damaged_index(lambda index: {"format": 1}), r"index.json is not an index of shards"),
        (
            damaged_index(lambda i: i | {"splits": i["splits"] | {"val": []}}),
            r"faulty://corpus: the val split has no text",
        ),
        (
            damaged_index(
                lambda i: i | {"splits": i["splits"] | {"train": i["splits"]["train"][::-1]}}
            ),
            r"train-0000\d.begins does not fit index.json",
        ),
        (
            other_file("train-00000.begins", b"\0" * 8),
            r"train-00000.begins is damaged: 8 bytes were read where 24 were written",
        ),
        (
            other_file("train-00000.begins", b"\1" * 24),
            r"train-00000.begins is damaged: its checksum is another one",
        ),
        (other_file("tokenizer.json", b"{}"), r"faulty://corpus/tokenizer.json is damaged"),
        (lambda store: store().rm("/corpus/train-00001.blocks"), r"train-00001.blocks .*FileNotFo"),
        (lambda store: store().rm("/corpus/index.json"), r"index.json cannot be read: FileNotFo"),
    ],
)
def test_what_is_not_as_it_was_written_is_named(corpus, store, damage, message, cache, impatient):
    damage(store)
    with pytest.raises(DataError, match=message):
        made_module()
    assert not list((cache / "shards").glob("*")) if (cache / "shards").exists() else True


def test_another_tokenizer_beside_the_shards_is_refused(corpus, store):
    made = Tokenizer.train(CHAR, ["xyz"])._tokenizer.to_str().encode()
    store().pipe_file("/corpus/tokenizer.json", made)
    with pytest.raises(DataError, match=r"tokenizer.json is another tokenizer than that of index"):
        made_module()


def test_tables_of_the_cache_that_are_damaged_are_made_again(corpus, cache):
    expected = list(made_module().train_dataloader())
    for path in sorted((cache / "shards").rglob("train.*")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        again = list(made_module().train_dataloader())
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(expected, again, strict=True))
        assert path.read_bytes() == content


# --- stores ---------------------------------------------------------------------------------------


def test_a_process_ends_although_its_store_hangs(tmp_path):
    code = (
        "from lightning_module.data.shards import reading\n"
        "import time\n"
        "reader = reading.Reader('memory://x')\n"
        "reads = [reader.begin('file', lambda: time.sleep(1000)) for _ in range(40)]\n"
        "begun = lambda: sum(read.begun is not None for read in reads)\n"
        "while begun() < reading.THREADS:\n"
        "    time.sleep(0.1)\n"
        "print(begun(), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == [str(reading.THREADS)]


def test_hanging_reads_do_not_occupy_the_threads(corpus, store, monkeypatch):
    """All first attempts hang; the second ones answer."""
    monkeypatch.setattr(reading, "ATTEMPT", 0.3)
    monkeypatch.setattr(reading, "PATIENCE", 60)
    seen = set()

    def first_hangs(number, path):
        with store.lock:
            new = number not in seen and len(seen) < 40
            seen.add(number)
        if new:
            hang(number, path)

    expected = list(made_module().train_dataloader())
    store.fault = staticmethod(first_hangs)
    again = list(made_module().train_dataloader())
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(expected, again, strict=True))


def test_a_late_failure_does_not_undo_a_success(monkeypatch):
    """The first attempt hangs, and fails for good when the second one has succeeded."""
    monkeypatch.setattr(reading, "ATTEMPT", 0.1)
    late, calls = threading.Event(), []

    def attempt():
        calls.append(threading.current_thread())
        if len(calls) == 1:
            late.wait(60)
            raise PermissionError("too late")
        return b"content"

    reader = reading.Reader("memory://x")
    read = reader.begin("file", attempt)
    assert reader.contents([read]) == [b"content"]
    late.set()
    calls[0].join(60)
    assert read.error is None and reader.contents([read]) == [b"content"]


def test_waiting_for_many_reads_ends_at_once(monkeypatch):
    reader = reading.Reader("memory://x")
    reads = [reader.begin("file", lambda: time.sleep(1000)) for _ in range(100)]
    begun = time.monotonic()
    assert reader.contents(reads, stop=lambda: True) == [None] * 100
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:geheim99@bucket/corpus",
        "https://host/corpus?X-Amz-Signature=geheim99",
        "abfs://container/corpus?sig=geheim99",
        "https://geheim99@host/corpus",
        "s3://bucket/corpus?token=geheim99&x=1",
        "simplecache::https://me:geheim99@host/corpus",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url):
    with pytest.raises(DataError) as refused:
        made_module(url)
    assert "geheim99" not in str(refused.value)
    assert "environment" in str(refused.value)


def test_urls_without_credentials_stay():
    for url in (
        "s3://bucket/corpus", "abfs://container@account.host/corpus", "ssh://me@host/corpus",
        "/a/folder?x=1", "https://host/corpus?version=2", "a@b/c", "/a&key=b.txt",
    ):  # fmt: skip
        assert without_secrets(url) == url


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_command_refuses_credentials_before_anything_is_written(command, fails, tmp_path):
    key = {"train": "data.url", "prepare": "out"}[command]
    main = getattr(commands, command)
    said = fails(main, "-m", "data=shards", f"{key}=s3://me:geheim99@bucket/x,s3://bucket/y")
    assert "without it" in said and "geheim99" not in said
    assert not list(tmp_path.iterdir())


def test_a_command_without_a_url_says_what_it_is(fails):
    assert "data.url must be given: a folder or a URL" in fails(commands.train, "data=shards")
    assert "out must be given: " in fails(commands.prepare, "data=shakespeare")


def test_errors_of_stores_are_shown_without_credentials(monkeypatch):
    monkeypatch.setenv("MY_SECRET_ACCESS_KEY", "geheim99")
    monkeypatch.setitem(sys.modules["fsspec.config"].conf, "abfs", {"account_key": "verborgen7"})
    text = without_credentials(
        OSError("geheim99 at https://me:pass@host/x?sig=abc&y=1, verborgen7\nsecond line")
    )
    assert text == "OSError: *** at https://***@host/x?***, *** second line"
    assert len(without_credentials(ValueError("x" * 5000))) < 400


def test_stores_that_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    registry = sys.modules["fsspec.registry"]  # fsspec.registry is a mapping
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    with pytest.raises(DataError, match=r"pip install 'triton-gru\[shards\]'"):
        made_module("s3://bucket/corpus")
    with pytest.raises(DataError, match="nowhere://x cannot be opened"):
        made_module("nowhere://x")


def test_a_store_that_does_not_answer_at_the_start(corpus, store, impatient, monkeypatch):
    def slow(self, path, start=None, end=None, **options):
        hang(0, path)

    monkeypatch.setattr(store, "cat_file", slow)
    with pytest.raises(StoreError, match=r"faulty://corpus/index.json cannot be read: no answer"):
        made_module()


@pytest.fixture(scope="module")
def s3_server():
    """The URL of moto's S3 server."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_shards_in_s3(s3_server, block, monkeypatch):
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    block(64)
    fsspec.filesystem("s3").mkdir("bucket")
    tokenizer = made_tokenizer()
    splits = {
        "train": made_tokens([300] * 4, tokenizer.vocab_size),
        "val": made_tokens([40], tokenizer.vocab_size, 1),
    }
    write_shards("s3://bucket/corpus", tokenizer, splits, [500])
    expected = StreamChunks(splits["train"], 3, 8)
    found = list(made_module("s3://bucket/corpus").train_dataloader())
    assert len(found) == len(expected)
    for k, chunk in enumerate(found):
        assert torch.equal(chunk.inputs, expected[k].inputs)
        assert torch.equal(chunk.targets, expected[k].targets)


def test_a_folder_on_this_machine(tmp_path, block):
    block(64)
    tokenizer = made_tokenizer()
    splits = {name: made_tokens([300] * 4, tokenizer.vocab_size) for name in ("train", "val")}
    write_shards(str(tmp_path / "shards"), tokenizer, splits, [500])
    module = made_module(str(tmp_path / "shards"))
    expected = StreamChunks(splits["train"], 3, 8)
    for k, chunk in enumerate(module.train_dataloader()):
        assert torch.equal(chunk.inputs, expected[k].inputs)
    assert "1,200 characters = 1,200 tokens to train on" in module.describe()
    os.truncate(tmp_path / "shards" / "train-00001.tokens", 10)
    with pytest.raises(StoreError, match=r"shards/train-00001.tokens is damaged: bytes") as cut:
        list(made_module(str(tmp_path / "shards")).train_dataloader())
    assert re.search(r"bytes [\d,]+ to [\d,]+ came as \d+ bytes", str(cut.value))


@pytest.mark.parametrize("batching", ["stream", "packed"])
@pytest.mark.parametrize("vocab_size", [None, 300], ids=["char", "bpe"])
def test_what_prepare_writes_is_read_as_text_files(tmp_path, monkeypatch, batching, vocab_size):
    """The same chunks of the same files: a long one cut into many shards, and short ones."""
    monkeypatch.setattr(files, "PART", 997)
    paths = []
    for n, length in enumerate((20_000, 500, 3_000)):
        (tmp_path / f"{n}.txt").write_text(made_text(length, seed=n))
        paths.append(str(tmp_path / f"{n}.txt"))
    settings = TokenizerSettings("bpe" if vocab_size else "char", vocab_size)
    out = str(tmp_path / "out")
    preparing.prepare(text_files(paths), settings, out, Inline(2), size=1024)
    shape = {"batching": batching, "batch_size": 5, "seq_len": 32}
    mapped = SentenceDataModule(text_files, settings, paths=paths, **shape)
    mapped.prepare_data()
    mapped.setup()
    read = made_module(out, settings, **shape)
    assert read.tokenizer.fingerprint == mapped.tokenizer.fingerprint
    assert read.chars_per_token == mapped.chars_per_token
    assert read.describe().splitlines() == mapped.describe().splitlines()[:2]
    loaders = ("train_dataloader", "val_dataloader")
    for one, other in ((getattr(read, name)(), getattr(mapped, name)()) for name in loaders):
        assert len(one) == len(other) > 1
        for chunk, expected in zip(one, other, strict=True):
            assert_equal(chunk, expected)
