"""Rows and token files: every token predicted once, in order, whatever interrupts the making."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import hydra
import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_module.data import checksums
from lightning_module.data.cache_folder import NOT_WHOLE
from lightning_module.data.checksums import CHECKED, SUMS
from lightning_module.data.chunks import IGNORE, StreamChunks
from lightning_module.data.corpora import Corpus, Document, text_files
from lightning_module.data.datamodule import SentenceDataModule
from lightning_module.data.token_cache import SplitTokens, TokenCache
from lightning_module.data.tokenizers import TokenizerSettings
from lightning_module.distributed import ranks
from lightning_module.errors import DataError

CONF = Path(__file__).parents[3] / "conf"
CHAR = TokenizerSettings("char")
LETTERS = "".join(chr(97 + i * i % 23) for i in range(400))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_corpus(train=(LETTERS,), val=("abcd" * 10,), name="made"):
    return Corpus(
        name=name,
        fingerprint=json.dumps([train, val]),
        description="a made corpus",
        train=lambda: (Document(f"t{i}", text) for i, text in enumerate(train)),
        val=lambda: (Document(f"v{i}", text) for i, text in enumerate(val)),
    )


def made_module(train=(LETTERS,), val=("abcd" * 10,), tokenizer=CHAR, **arguments):
    module = SentenceDataModule(made_corpus, tokenizer, train=train, val=val, **arguments)
    module.prepare_data()
    module.setup()
    return module


# --- rows ----------------------------------------------------------------------------------------

DOC_ID = 0


def made_split(lengths):
    """Documents of these lengths, all their tokens different."""
    ids = iter(range(1, 10_000))
    streams = [[DOC_ID, *(next(ids) for _ in range(length))] for length in lengths]
    begins = np.cumsum([0, *(len(stream) for stream in streams)])
    stream = np.concatenate(streams).astype(np.uint16)
    return SplitTokens(stream, begins, DOC_ID, sum(lengths), sum(lengths), 0)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seq_len=st.integers(1, 13),
    batch_size=st.integers(1, 17),
)
def test_every_token_is_predicted_once_in_order(lengths, seq_len, batch_size):
    split = made_split(lengths)
    chunks = -(-np.array(lengths) // seq_len)
    batch_size = min(batch_size, int(chunks.sum()))
    data = StreamChunks(split, batch_size, seq_len)
    items = [data[k] for k in range(len(data))]
    for item in items:
        assert item.inputs.shape == item.targets.shape == (seq_len, batch_size)
        assert item.inputs.dtype == item.targets.dtype == torch.int64
        assert item.fresh.shape == (batch_size,) and item.fresh.dtype == torch.bool
        assert item.inputs.is_contiguous() and item.targets.is_contiguous()
    predicted, filled = [], []
    for row in range(batch_size):
        before = None  # the token that a carried state has read up to
        for k, item in enumerate(items):
            inputs, targets = item.inputs[:, row].tolist(), item.targets[:, row].tolist()
            count = sum(target != IGNORE for target in targets)
            assert targets[count:] == [IGNORE] * (seq_len - count)
            # Each target follows the input beside it, and is the next input.
            assert inputs[1:count] == targets[: count - 1 if count else 0]
            if count and inputs[0] != DOC_ID:
                assert split.stream[list(split.stream).index(inputs[0]) + 1] == targets[0]
                assert item.fresh[row] or before == inputs[0]
            if k == 0 or (count and inputs[0] == DOC_ID):
                assert item.fresh[row]
            elif count:
                assert not item.fresh[row]
            if not count:
                assert k == len(items) - 1 and item.fresh[row]
            before = targets[count - 1] if count else None
            predicted += targets[:count]
            filled.append(count)
    assert predicted == list(range(1, sum(lengths) + 1))
    # Padding at documents' ends and in the last item alone.
    padding = seq_len * chunks.sum() - sum(lengths)
    empty = len(items) * batch_size - chunks.sum()
    assert len(filled) * seq_len - sum(filled) == padding + empty * seq_len
    assert empty < batch_size


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seq_len=st.integers(1, 13),
    batch_size=st.integers(1, 17),
    world=st.integers(1, 5),
)
def test_ranks_together_read_what_one_rank_reads(lengths, seq_len, batch_size, world):
    split = made_split(lengths)
    batch_size = min(batch_size, int((-(-np.array(lengths) // seq_len)).sum()))
    world = min(world, batch_size)
    alone = StreamChunks(split, batch_size, seq_len)
    parts = [
        StreamChunks(split, batch_size, seq_len, own=ranks.share(batch_size, number, world))
        for number in range(world)
    ]
    for k in range(len(alone)):
        whole, shares = alone[k], [part[k] for part in parts]
        assert len({len(part) for part in parts} | {len(alone)}) == 1
        for name in ("inputs", "targets", "fresh"):
            together = torch.cat([getattr(item, name) for item in shares], -1)
            assert torch.equal(together, getattr(whole, name))
        # Every rank knows how many tokens all of them predict.
        count = int((whole.targets != IGNORE).sum())
        assert {item.token_count() for item in shares} == {whole.token_count()} == {count}


def test_rows_by_hand():
    data = StreamChunks(made_split([5, 2, 3]), batch_size=2, seq_len=2)
    # Chunks: 12 34 5. | 67 | 89 10., three for each row.
    assert [item.targets.T.tolist() for item in (data[0], data[1], data[2])] == [
        [[1, 2], [6, 7]],
        [[3, 4], [8, 9]],
        [[5, IGNORE], [10, IGNORE]],
    ]
    assert [item.inputs.T.tolist() for item in (data[0], data[1], data[2])] == [
        [[0, 1], [0, 6]],
        [[2, 3], [0, 8]],
        [[4, 5], [9, 10]],
    ]
    assert [item.fresh.tolist() for item in (data[0], data[1], data[2])] == [
        [True, True],
        [False, True],
        [False, False],
    ]
    for k in (-1, 3):
        with pytest.raises(IndexError, match=f"chunk {k} of 3"):
            data[k]


def test_too_many_rows():
    split = made_split([5, 2, 3])
    assert len(StreamChunks(split, 6, 2)) == 1
    with pytest.raises(DataError) as error:
        StreamChunks(split, 7, 2, "data.batch_size")
    message = str(error.value)
    for part in ("too short for 7 rows", "10 tokens", "6 chunks of seq_len=2", "7 x 2 = 14"):
        assert part in message
    assert "data.batch_size to 6 or less" in message


# --- the data module ------------------------------------------------------------------------------


def read_back(chunks):
    """The text of every row, one after the other."""
    targets = torch.cat([chunks[k].targets for k in range(len(chunks))]).T
    return targets[targets != IGNORE].tolist()


@pytest.mark.parametrize("kind", ["char", "bpe", "word"])
def test_rows_contain_the_text(kind):
    train = ["to be, or not to be\n" * 9, "", "天下大势，\n分久必合。\n" * 5, "to be\n"]
    val = ["to be not to be\n" * 3, "天下大势，\n"]
    module = made_module(train, val, TokenizerSettings(kind, 300), batch_size=3, seq_len=4)
    assert module.tokenizer.decode(read_back(module.train)) == "".join(train)
    assert module.tokenizer.decode(read_back(module.val)) == "".join(val)
    assert module.vocab_size == module.tokenizer.vocab_size
    tokens = len(module.tokenizer.encode("".join(val)))
    assert module.chars_per_token == len("".join(val)) / tokens
    assert module.train.tokens.characters == len("".join(train))
    assert module.train.tokens.tokens == len(module.tokenizer.encode("".join(train)))
    assert isinstance(module.train.tokens.stream, np.memmap)
    assert module.train.tokens.stream.dtype == np.uint16


def test_many_tokens_need_wider_numbers():
    text = "".join(chr(0x10000 + i) for i in range(2**16 - 2))
    exactly = made_module([text], batch_size=2)
    assert exactly.vocab_size == 2**16 and exactly.train.tokens.stream.dtype == np.uint16
    more = made_module([text + "a"], batch_size=2)
    assert more.train.tokens.stream.dtype == np.uint32
    assert more.tokenizer.decode(read_back(more.train)) == text + "a"


def test_unknown_characters_count():
    module = made_module(["abc" * 10], ["abxycz" * 5], batch_size=1, seq_len=4)
    assert module.val.tokens.unknown == 15
    assert read_back(module.val).count(module.tokenizer.unk_id) == 15
    validation = module.describe().splitlines()[1]
    assert "30 characters = 30 tokens to validate on (50.00% <unk>) in 1 rows" in validation


def test_validation_rows():
    assert made_module(batch_size=8, seq_len=10).val.batch_size == 4  # 40 tokens
    assert made_module(batch_size=2, seq_len=10).val.batch_size == 2
    assert made_module(batch_size=2, seq_len=10, val_batch_size=4).val.batch_size == 4
    with pytest.raises(DataError, match=r"data\.val_batch_size to 4 or less"):
        made_module(batch_size=2, seq_len=10, val_batch_size=5)


def test_refused_before_training():
    with pytest.raises(DataError, match=r"too short for 41 rows.*data\.batch_size to 40 or less"):
        made_module(batch_size=41, seq_len=10)
    for name in ("batch_size", "seq_len", "val_batch_size"):
        with pytest.raises(DataError, match=rf"data\.{name} must be at least 1, got 0"):
            made_module(**{name: 0})
    with pytest.raises(DataError, match="the val split has no text"):
        made_module(val=[""])
    with pytest.raises(DataError, match="the train split has no text"):
        made_module(train=[])
    with pytest.raises(DataError, match=r"call prepare_data\(\)"):
        SentenceDataModule(made_corpus, CHAR, name="other").setup()


def test_rows_that_ranks_cannot_share(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 4)
    with pytest.raises(
        DataError, match=r"data\.batch_size=6 cannot be .* 4 ranks: set data\.batch_size=8"
    ):
        made_module(batch_size=6, seq_len=10)
    with pytest.raises(
        DataError, match=r"data\.batch_size=2 cannot be .* 4 ranks: set data\.batch_size=4"
    ):
        made_module(batch_size=2, seq_len=10)
    with pytest.raises(DataError, match=r"makes 3 rows, fewer than the 4 ranks"):
        made_module(batch_size=4, seq_len=10, val_batch_size=3)
    made_module(batch_size=4, seq_len=10, val_batch_size=4)


def test_max_chars():
    module = made_module(max_chars=220, batch_size=2, seq_len=10)
    assert module.train.tokens.characters == 200
    assert module.val.tokens.characters == 20
    assert module.tokenizer.decode(read_back(module.train)) == LETTERS[:200]


def compose(*overrides):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(overrides=list(overrides))


@pytest.mark.parametrize("as_config", [True, False])
def test_config_of_text_files(tmp_path, as_config):
    text = "to be, or not to be\n" * 50
    (tmp_path / "a.txt").write_text(text)
    config = compose(
        "+data=text_files", "+tokenizer=bpe", f"data.paths=[{tmp_path}/*.txt]", "data.batch_size=2",
        "data.val_fraction=0.2", "data.seq_len=8", "tokenizer.vocab_size=300",
    )  # fmt: skip
    tokenizer = config.tokenizer if as_config else hydra.utils.instantiate(config.tokenizer)
    module = hydra.utils.instantiate(config.data, tokenizer=tokenizer)
    module.prepare_data()
    module.setup()
    assert module.tokenizer_settings == TokenizerSettings("bpe", 300)
    assert (module.train.batch_size, module.train.seq_len) == (2, 8)
    assert module.tokenizer.decode(read_back(module.train)) == text[:800]


def test_errors_of_a_corpus_come_as_they_are():
    config = compose("+data=text_files", "+tokenizer=char", "data.paths=[nowhere.txt]")
    module = hydra.utils.instantiate(config.data, tokenizer=config.tokenizer)
    with pytest.raises(DataError, match=r"There is no file nowhere\.txt"):
        module.prepare_data()


@pytest.mark.parametrize("data", ["shakespeare", "sanguo", "hf"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe", "word"])
def test_configs_make_modules(data, tokenizer):
    config = compose(
        f"+data={data}", f"+tokenizer={tokenizer}", *["data.name=a/b"] * (data == "hf")
    )
    module = hydra.utils.instantiate(config.data, tokenizer=config.tokenizer)
    folder = module._cache().folder
    assert folder.name.startswith(f"{'hf-a-b' if data == 'hf' else data}-{tokenizer}-")
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("data", "vocab_size"), [("shakespeare", 82), ("sanguo", 3872)])
def test_corpora_in_rows(data, vocab_size):
    config = compose(f"+data={data}", "+tokenizer=char")
    module = hydra.utils.instantiate(config.data, tokenizer=config.tokenizer)
    module.prepare_data()
    module.setup()
    assert module.vocab_size == vocab_size
    assert len(read_back(module.train)) == module.train.tokens.tokens


# --- the files of tokens --------------------------------------------------------------------------


# For processes of their own: without torch they start in a second.
MAKE = (
    "import os, sys, time; from lightning_module.data.corpora import text_files;"
    "from lightning_module.data.token_cache import TokenCache;"
    "from lightning_module.data.tokenizers import TokenizerSettings;"
)


def files_of(folder):
    """All but what holds the times of the others."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CHECKED}


def test_made_once_and_found_again(monkeypatch):
    cache = TokenCache(made_corpus(), CHAR)
    cache.make()
    monkeypatch.setattr(TokenCache, "_write", lambda *_: pytest.fail("made again"))
    TokenCache(made_corpus(), CHAR).make()
    assert os.listdir(cache.folder.parent) == [cache.folder.name]
    names = {"about.json", "tokenizer.json", SUMS} | {
        f"{split}.{kind}" for split in ("train", "val") for kind in ("tokens", "begins")
    }
    assert set(files_of(cache.folder)) == names


def test_other_text_or_settings_are_other_files(tmp_path):
    (tmp_path / "a.txt").write_text(LETTERS)
    folders = {
        TokenCache(corpus, tokenizer).folder
        for corpus in (made_corpus(), made_corpus(("abc",)), text_files(f"{tmp_path}/a.txt"))
        for tokenizer in (CHAR, TokenizerSettings("char", 9), TokenizerSettings("word", 9))
    }
    assert len(folders) == 9


@pytest.mark.parametrize("how", ["truncated", "longer", "missing", "empty"])
@pytest.mark.parametrize(
    "name", ["about.json", "tokenizer.json", "train.tokens", "train.begins", "val.tokens"]
)
def test_damaged_files_are_made_again(name, how, caplog):
    cache = TokenCache(made_corpus(), CHAR)
    cache.make()
    whole = files_of(cache.folder)
    file = cache.folder / name
    if how == "missing":
        file.unlink()
    else:
        changed = {"truncated": whole[name][:-1], "longer": whole[name] + b"x", "empty": b""}[how]
        file.write_bytes(changed)
    if (name, how) == ("tokenizer.json", "truncated"):
        assert whole[name].endswith(b"}")
    with pytest.raises(NOT_WHOLE):
        cache.open()
    cache.make()
    assert files_of(cache.folder) == whole
    assert "are damaged" in caplog.text
    assert os.listdir(cache.folder.parent) == [cache.folder.name]


@pytest.mark.parametrize(
    "name", ["about.json", "tokenizer.json", "train.tokens", "train.begins", "val.begins", SUMS]
)
def test_a_byte_that_changed_anywhere_is_noticed(name, caplog):
    cache = TokenCache(made_corpus(), CHAR)
    cache.make()
    whole = files_of(cache.folder)
    file = cache.folder / name
    for place in range(0, len(whole[name]), max(1, len(whole[name]) // 7)):
        stat = file.stat()
        file.write_bytes(_with_other_byte(whole[name], place))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had been written
        caplog.clear()
        cache.make()
        assert "are damaged" in caplog.text, place
        assert files_of(cache.folder) == whole


def _with_other_byte(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_files_found_right_are_not_read_again_until_they_change(monkeypatch):
    cache = TokenCache(made_corpus(), CHAR)
    cache.make()
    read = []
    crc32 = checksums._crc32
    monkeypatch.setattr(checksums, "_crc32", lambda path: read.append(path.name) or crc32(path))
    cache.make()
    assert len(read) == 6  # so young that a change in the same tick of the clock would not show
    monkeypatch.setattr(checksums, "_TICK_NS", -(10**12))
    read.clear()
    cache.make()
    assert not read
    (cache.folder / "train.tokens").touch()
    cache.make()
    assert read == ["train.tokens"]
    cache.make()
    assert read == ["train.tokens"]
    (cache.folder / CHECKED).write_bytes(b"damaged")
    cache.make()
    assert len(read) == 7


def test_full_disk_leaves_nothing(monkeypatch):
    """The disk is full from the tenth kilobyte of a file on."""
    cache = TokenCache(made_corpus((LETTERS * 50,)), CHAR)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DataError, match=r"Cannot write the tokens to .*TRITON_GRU_CACHE"):
            cache.make()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(cache.folder.parent) == []
    cache.make()
    assert cache.open()[1].tokens == len(LETTERS) * 50


def test_a_full_disk_is_reported(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = TokenCache(made_corpus(), CHAR)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device.*Free some space"):
        cache.make()
    assert os.listdir(cache.folder.parent) == []


def test_cache_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"Cannot write the tokens to .*Not a directory"):
        TokenCache(made_corpus(), CHAR).make()


def test_runs_at_once_do_not_disturb_each_other(tmp_path, cache):
    """Three processes make the same tokens at the same time, twice, once over damaged files."""
    (tmp_path / "a.txt").write_text("to be, or not\n" * 5_000)
    code = MAKE + (
        "cache = TokenCache(text_files(sys.argv[1]), TokenizerSettings('bpe', 300));"
        "time.sleep(max(0, float(sys.argv[2]) - time.time())); cache.make();"
        "tokenizer, train, val = cache.open();"
        "print(tokenizer.decode(train.stream) == 'to be, or not\\n' * 4500, train.stream.sum())"
    )
    outputs = set()
    for _ in range(2):
        begin = str(time.time() + 3)
        command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), begin]
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
        for run in runs:
            outputs.add(run.communicate()[0])
            assert run.returncode == 0
        (folder,) = (cache / "tokens").iterdir()
        os.truncate(folder / "train.tokens", 1_000)
    assert len(outputs) == 1 and outputs.pop().startswith(b"True ")


def test_one_run_alone_replaces_damaged_tokens(cache, monkeypatch):
    """A second run comes between the first one's look at the damaged folder and its replacement."""
    first, second = (TokenCache(made_corpus(), CHAR) for _ in range(2))
    first.make()
    os.truncate(first.folder / "train.tokens", 2)
    moved, looks, other = [], [], threading.Thread(target=second.make)
    look, rename = TokenCache._is_whole, os.rename

    def look_and_let_the_other_go_on(self):
        whole = look(self)
        if self is first:
            looks.append(whole)
            if len(looks) == 2:
                other.start()
                other.join(0.5)
        return whole

    def counted(source, target):
        rename(source, target)
        if Path(source) == first.folder:
            moved.append(target)

    monkeypatch.setattr(TokenCache, "_is_whole", look_and_let_the_other_go_on)
    monkeypatch.setattr(os, "rename", counted)
    first.make()
    other.join()
    assert looks[:2] == [False, False] and len(moved) == 1
    assert second.open()[1].stream.tolist() == first.open()[1].stream.tolist()


def test_folders_left_by_killed_runs_are_removed(cache):
    old, new = cache / "tokens/.made-old", cache / "tokens/.made-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "train.tokens").touch()
    os.utime(old, (0, 0))
    TokenCache(made_corpus(), CHAR).make()
    assert new.exists() and not old.exists()


def test_partial_folders_of_a_killed_run_are_not_used(tmp_path, cache):
    (tmp_path / "a.txt").write_text(LETTERS)
    code = MAKE + (
        "os.rename = lambda *_: os._exit(9);"
        "TokenCache(text_files(sys.argv[1]), TokenizerSettings('char')).make()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    assert subprocess.run(command).returncode == 9
    assert [path.name[0] for path in (cache / "tokens").iterdir()] == ["."]
    again = TokenCache(text_files(str(tmp_path / "a.txt")), CHAR)
    again.make()
    assert again.open()[1].tokens == 360


# --- passes and their resumption ------------------------------------------------------------------


def at(chunk):
    """Where a loader of 4 rows and 10 chunks stands."""
    return {"next_chunk": chunk, "batch_size": 4, "chunks": 10}


def test_passes():
    loader = made_module(batch_size=4, seq_len=10).train_dataloader()
    assert len(loader) == len(list(loader)) == len(list(loader)) == 10
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict() == at(1)
    # A new pass begins at its beginning, even when the last one was broken off.
    assert torch.equal(next(iter(loader)).inputs, loader.chunks[0].inputs)
    assert len(list(loader)) == 10 and loader.state_dict() == at(0)
    loader.load_state_dict(at(7))
    assert loader.state_dict() == at(7)
    assert [len(list(loader)) for _ in range(2)] == [3, 10]
    with pytest.raises(DataError, match=r"chunk 7 of 20 in 4 rows, this data has 10 in 4 rows"):
        loader.load_state_dict(at(7) | {"chunks": 20})
    with pytest.raises(DataError, match=r"chunk 7 of 10 in 2 rows, this data has 10 in 4 rows"):
        loader.load_state_dict(at(7) | {"batch_size": 2})


class Witness(lightning.LightningModule):
    """Writes down what it is trained on; two hundred are made below, so it is small."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, chunk, index):
        self.seen.append((self.current_epoch, index, chunk.targets.tolist(), chunk.fresh.tolist()))
        return self.weight.sum()

    def validation_step(self, chunk, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveEverywhere(lightning.Callback):
    """Saves in every hook in which a checkpoint may be saved."""

    def __init__(self, folder):
        self.folder, self.saved = folder, []

    def save(self, trainer):
        if not trainer.sanity_checking:
            seen = len(trainer.lightning_module.seen)
            self.saved.append((self.folder / f"{len(self.saved)}.ckpt", seen))
            trainer.save_checkpoint(self.saved[-1][0])

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer)

    def on_validation_end(self, trainer, *_):
        self.save(trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"limit_train_batches": 3, "val_check_interval": 2}, {"limit_train_batches": 0.5}],
    ids=["whole", "limited", "share"],
)
def test_resuming_anywhere_sees_the_rest(tmp_path, arguments):
    """From a checkpoint of every moment, a run sees exactly what the uninterrupted run saw."""

    def fit(callbacks=(), checkpoint=None):
        module = Witness()
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
            **arguments,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*not resumable.*")
            data = SentenceDataModule(made_corpus, CHAR, batch_size=8, seq_len=10)
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
        return module.seen

    saver = SaveEverywhere(tmp_path)
    whole = fit([saver])
    assert len(whole) == 2 * {3: 3, 0.5: 2}.get(arguments.get("limit_train_batches"), 5)
    assert len(saver.saved) > len(whole) + 2
    for path, seen in saver.saved:
        assert fit(checkpoint=path) == whole[seen:], path
