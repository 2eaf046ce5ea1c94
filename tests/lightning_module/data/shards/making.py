"""Shards of given streams, as small as a test needs them, and stores that fail."""

import hashlib
import threading
import time

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

from lightning_module.data.shards import index as format
from lightning_module.data.shards.index import INDEX, SPLITS, TOKENIZER, Index, Shard
from lightning_module.data.token_cache import SplitTokens
from lightning_module.data.tokenizers import Tokenizer, TokenizerSettings

CHAR = TokenizerSettings("char")


def made_tokens(lengths, vocab_size, seed=0, dtype=np.uint16):
    """Documents of these lengths, of random tokens; <doc> is 0 and <unk> is 1."""
    random = np.random.default_rng(seed)
    begins = np.cumsum([0, *(1 + length for length in lengths)])
    stream = random.integers(2, vocab_size, begins[-1]).astype(dtype)
    stream[begins[:-1]] = 0
    return SplitTokens(stream, begins, 0, sum(lengths), sum(lengths), 0)


def made_tokenizer(text="abcdefghijklmnopqrstuvwxyz .\n"):
    return Tokenizer.train(CHAR, [text])


def write_shards(url, tokenizer, splits, sizes, settings=CHAR):
    """Writes the tokens of each split as shards of these numbers of tokens, in turn.

    Args:
        url: Where.
        tokenizer: A `Tokenizer`.
        splits: `SplitTokens` by name.
        sizes: Tokens of the first shard, the second, ...; the last one again for those that follow.
        settings: Of the tokenizer, for the index.
    """
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.makedirs(root, exist_ok=True)
    listed = {}
    for split in SPLITS:
        tokens, begin, shards = splits[split], 0, []
        while begin < len(tokens.stream) or not shards:
            size = sizes[min(len(shards), len(sizes) - 1)]
            end = min(begin + size, len(tokens.stream))
            part = tokens.stream[begin:end]
            begins = tokens.begins[:-1]
            begins = begins[(begins >= begin) & (begins < end)] - begin
            content = part.astype(part.dtype.newbyteorder("<")).tobytes()
            sums = [
                hashlib.sha256(content[at : at + format.BLOCK]).digest()
                for at in range(0, len(content), format.BLOCK)
            ]
            files = {
                "tokens": content,
                "begins": begins.astype("<i8").tobytes(),
                "blocks": b"".join(sums),
            }
            name = f"{split}-{len(shards):05d}"
            for kind, written in files.items():
                filesystem.pipe_file(f"{root}/{name}.{kind}", written)
            shards.append(
                Shard(
                    name=name,
                    length=len(part),
                    documents=len(begins),
                    characters=len(part) - len(begins),
                    unknown=int((part == 1).sum()),
                    sha256={k: hashlib.sha256(v).hexdigest() for k, v in files.items()},
                )
            )
            begin = end
        listed[split] = shards
    index = Index(
        corpus="a made corpus",
        source="made",
        tokenizer=settings,
        fingerprint=tokenizer.fingerprint,
        dtype=splits["train"].stream.dtype.name,
        splits=listed,
    )
    filesystem.pipe_file(f"{root}/{TOKENIZER}", tokenizer._tokenizer.to_str(pretty=True).encode())
    filesystem.pipe_file(f"{root}/{INDEX}", index.to_json())


class FaultyStore(MemoryFileSystem):
    """`faulty://`, in the memory of the process: reads are counted, and fail or hang as told.

    Attributes:
        reads: The files and ranges that were read, in order.
        fault: Called with the number of a read of tokens, from 0, and its path, before it is read:
            may raise, or wait, or return other content.
    """

    protocol = "faulty"
    store = {}  # noqa: RUF012, not that of memory://
    pseudo_dirs = [""]  # noqa: RUF012
    reads: list = []  # noqa: RUF012
    fault = staticmethod(lambda number, path: None)
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path):
        path = path.removeprefix("faulty://").strip("/")
        return f"/{path}" if path else ""

    def cat_file(self, path, start=None, end=None, **options):
        path = self._strip_protocol(path)
        if path.endswith(".tokens"):
            with self.lock:
                number = len(self.reads)
                self.reads.append((path, start, end))
            instead = FaultyStore.fault(number, path)
            if instead is not None:
                return instead
        return super().cat_file(path, start, end, **options)

    @classmethod
    def reset(cls):
        cls.store.clear()
        cls.reads.clear()
        cls.fault = staticmethod(lambda number, path: None)


def hang(number, path):
    """A fault: no answer, for longer than any test."""
    time.sleep(1000)


fsspec.register_implementation("faulty", FaultyStore, clobber=True)
