"""Tokens in shards against the same tokens in memory: order, bits, and what is read."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_module.data.chunks import PackedChunks, StreamChunks
from lightning_module.data.loading import ShardLoader
from lightning_module.data.shards.tables import ShardCache
from lightning_module.data.tokenizers import SHARDS, TokenizerSettings
from lightning_module.distributed import ranks
from tests.lightning_module.data.shards.making import (
    FaultyStore,
    made_tokenizer,
    made_tokens,
    write_shards,
)

URL = "faulty://corpus"
OF_SHARDS = TokenizerSettings(SHARDS)


def made_cache(seq_len, url=URL):
    cache = ShardCache(url, OF_SHARDS, seq_len)
    cache.make()
    return cache


def written(lengths, sizes, dtype=np.uint16, val_lengths=(5,)):
    tokenizer = made_tokenizer()
    splits = {
        "train": made_tokens(lengths, tokenizer.vocab_size, len(lengths), dtype),
        "val": made_tokens(val_lengths, tokenizer.vocab_size, 1, dtype),
    }
    FaultyStore.reset()
    write_shards(URL, tokenizer, splits, sizes)
    return splits["train"]


def assert_equal(one, other):
    for name, a, b in zip(one._fields, one, other, strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, name
    assert one.inputs.is_contiguous() == other.inputs.is_contiguous()


corpora = {
    "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=12),
    "sizes": st.lists(st.integers(1, 40), min_size=1, max_size=5),
    "seq_len": st.integers(1, 13),
    "batch_size": st.integers(1, 9),
    "world": st.integers(1, 3),
    "size": st.sampled_from([4, 8, 24, 64, 2**18]),
    "wide": st.booleans(),
}
once = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@once
@given(**corpora)
def test_chunks_are_those_of_mapped_tokens(
    lengths, sizes, seq_len, batch_size, world, size, wide, block, store
):
    """Documents straddle shards, shards have no begin, blocks are cut by the ends of shards."""
    block(size)
    mapped = written(lengths, sizes, np.uint32 if wide else np.uint16)
    cache = made_cache(seq_len)
    tokens = cache.open()[1]
    assert np.array_equal(tokens.begins, mapped.begins)
    assert np.array_equal(tokens.chunks_before(seq_len), mapped.chunks_before(seq_len))
    assert (tokens.tokens, tokens.characters) == (mapped.tokens, mapped.characters)
    tokens = lambda: cache.open()[1]  # noqa: E731
    batch_size = min(batch_size, int(mapped.chunks_before(seq_len)[-1]))
    for number in range(world):
        own = ranks.share(batch_size, number, world)
        expected = StreamChunks(mapped, batch_size, seq_len, own=own)
        chunks = StreamChunks(tokens(), batch_size, seq_len, own=own)
        _check_reads(chunks, list(ShardLoader(chunks)), expected)
        for k in np.random.default_rng(seq_len).permutation(len(expected)).tolist():
            assert_equal(chunks[k], expected[k])  # from anywhere


@once
@given(**corpora)
def test_packed_chunks_are_those_of_mapped_tokens(
    lengths, sizes, seq_len, batch_size, world, size, wide, block, store
):
    block(size)
    mapped = written(lengths, sizes, np.uint32 if wide else np.uint16)
    cache = made_cache(1)
    tokens = lambda: cache.open()[1]  # noqa: E731
    ends_line = np.arange(cache.open()[0].vocab_size) % 7 == 3
    batch_size = min(batch_size, mapped.tokens)
    for number in range(world):
        own = ranks.share(batch_size, number, world)
        expected = PackedChunks(mapped, ends_line, batch_size, seq_len, own=own)
        chunks = PackedChunks(tokens(), ends_line, batch_size, seq_len, own=own)
        _check_reads(chunks, list(ShardLoader(chunks)), expected)


def _check_reads(chunks, items, expected):
    """Equal chunks, and no block read that no row needs, or twice by one row."""
    for k in range(len(expected)):
        assert_equal(items[k], expected[k])
    assert len(items) == len(expected)
    needed = [chunks.tokens._blocks(a[None], b[None] - 1) for a, b in _row_spans(chunks)]
    assert len(set().union(*needed)) <= chunks.tokens.reads <= sum(map(len, needed))


def _row_spans(chunks):
    return list(zip(*chunks.spans(0, len(chunks)), strict=True))
