"""Independent sentences in full rows: each token predicted once, from its own sentence alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_module.data.chunks import IGNORE, PackedChunks, padded_share
from lightning_module.data.token_cache import SplitTokens
from lightning_module.data.tokenizers import TokenizerSettings
from lightning_module.distributed import ranks
from lightning_module.errors import DataError
from lightning_module.model import SentencePredictor
from tests.lightning_module.conftest import TINY
from tests.lightning_module.data.test_data import cache, made_module  # noqa: F401

DOC, END = 0, 1
ENDS_LINE = np.array([False, True, *[False] * 500])


def made_split(documents):
    """Documents of lines of the given numbers of tokens, END included, and their sentences."""
    ids = iter(list(range(2, 500)) * 20)
    sentences, stream, begins = [], [], [0]
    for lines in documents:
        stream.append(DOC)
        for number in lines:
            sentences.append([*(next(ids) for _ in range(number - 1)), END])
            stream += sentences[-1]
        begins.append(len(stream))
    tokens = len(stream) - len(documents)
    split = SplitTokens(np.array(stream, np.uint16), np.array(begins), DOC, tokens, tokens, 0)
    return split, sentences


DOCUMENTS = st.lists(
    st.lists(st.integers(2, 20), min_size=1, max_size=9), min_size=1, max_size=6
)  # fmt: skip


@settings(max_examples=200)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 13), batch_size=st.integers(1, 9))
def test_every_token_is_predicted_once_from_its_own_sentence(documents, seq_len, batch_size):
    split, sentences = made_split(documents)
    batch_size = min(batch_size, split.tokens)
    data = PackedChunks(split, ENDS_LINE, batch_size, seq_len)
    items = [data[k] for k in range(len(data))]
    expected = []  # (input, target, whether the state is zero), one sentence after the other
    for sentence in sentences:
        expected += zip([DOC, *sentence], sentence, [True] + [False] * len(sentence), strict=False)
    found = []
    for row in range(batch_size):
        for k, item in enumerate(items):
            assert (
                item.inputs.shape
                == item.targets.shape
                == item.resets.shape
                == (seq_len, batch_size)
            )
            for t in range(seq_len):
                target = item.targets[t, row].item()
                if target == IGNORE:
                    assert k == len(items) - 1  # nothing is padded but the end of a row
                    continue
                new_row = k == t == 0
                reset = item.resets[t, row].item()
                assert item.fresh[row] == (new_row or item.resets[0, row]) or t > 0
                found.append((item.inputs[t, row].item(), target, reset))
    assert found == expected
    for item in items:
        assert item.token_count() == int((item.targets != IGNORE).sum())


@settings(max_examples=30)
@given(documents=DOCUMENTS, batch_size=st.integers(2, 9), world=st.integers(1, 4))
def test_ranks_together_read_what_one_rank_reads(documents, batch_size, world):
    split, _ = made_split(documents)
    batch_size = min(batch_size, split.tokens)
    world = min(world, batch_size)
    alone = PackedChunks(split, ENDS_LINE, batch_size, 5)
    parts = [
        PackedChunks(split, ENDS_LINE, batch_size, 5, own=ranks.share(batch_size, number, world))
        for number in range(world)
    ]
    for k in range(len(alone)):
        shares = [part[k] for part in parts]
        for name in ("inputs", "targets", "fresh", "resets"):
            together = torch.cat([getattr(item, name) for item in shares], -1)
            assert torch.equal(together, getattr(alone[k], name))
        assert {item.token_count() for item in shares} == {alone[k].token_count()}


@pytest.mark.parametrize("layer_type", ["gru", "gru_reset_before"])
def test_the_loss_is_that_of_the_sentences_one_by_one(layer_type):
    """In float64, against each sentence run alone from a state of zero."""
    split, sentences = made_split([[7, 2, 11, 5], [3, 3, 9], [30]])
    data = PackedChunks(split, ENDS_LINE, 1, 6)
    torch.manual_seed(1)
    net = SentencePredictor(500, {"name": layer_type}, embedding_size=5, hidden_size=7).double()
    assert net.takes_resets
    packed = sum(net.training_step(data[k], k) * data[k].token_count() for k in range(len(data)))
    alone = 0.0
    for sentence in sentences:
        logits, _ = net(torch.tensor([DOC, *sentence[:-1]])[:, None])
        alone += F.cross_entropy(logits[:, 0].float(), torch.tensor(sentence), reduction="sum")
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_nothing_leaks_over_a_boundary():
    """No token of one sentence has any influence on what is predicted in the next."""
    split, _ = made_split([[6, 6, 6, 6]])
    data = PackedChunks(split, ENDS_LINE, 1, 24)
    torch.manual_seed(1)
    net = SentencePredictor(500, {"name": "gru"}, embedding_size=5, hidden_size=7).double()
    before = net(data[0].inputs, None, data[0].resets)[0]
    split.stream[8] += 100  # a token of the second sentence
    after = net(data[0].inputs, None, data[0].resets)[0]
    changed = (before != after).any(-1)[:, 0].nonzero()[:, 0].tolist()
    assert changed == [8, 9, 10, 11]


def test_share_of_useful_tokens_by_hand():
    split, _ = made_split([[4, 2], [2, 8, 3]])
    # batches of two lines: 4 2 | 2 8 | 3
    assert padded_share(split, ENDS_LINE, 2) == pytest.approx(19 / (8 + 16 + 3))
    assert padded_share(split, ENDS_LINE, 1) == 1
    assert padded_share(split, ENDS_LINE, 2, first=6) == pytest.approx(6 / 8)


@pytest.mark.parametrize("kind", ["char", "bpe", "word"])
def test_lines_of_every_tokenizer(kind):
    train = ["To be.\n\nOr not?\n" * 40, "\nAnd so on\n" * 30]
    module = made_module(
        train, [train[0]], TokenizerSettings(kind, 300), batching="packed", batch_size=3, seq_len=8
    )
    stream = module.train.tokens.stream
    lines, targets, resets = [], [], []
    for row in range(3):
        for k in range(len(module.train)):
            targets += module.train[k].targets[:, row].tolist()
            resets += module.train[k].resets[:, row].tolist()
    for target, reset in zip(targets, resets, strict=True):
        if target != IGNORE:
            lines = [*lines, []] if reset else lines
            lines[-1].append(target)
    # Blank lines belong to the line before, and at the beginning of a document stand alone.
    assert [module.tokenizer.decode(line) for line in lines] == (
        ["To be.\n\n", "Or not?\n"] * 40 + ["\n"] + ["And so on\n\n"] * 29 + ["And so on\n"]
    )
    assert len(stream) - 2 == sum(map(len, lines))
    described = module.describe().splitlines()
    assert "batches of 3 lines padded to their longest would be" in described[2]


def test_refused():
    with pytest.raises(DataError, match=r"data\.batching must be one of stream, packed, got 'x'"):
        made_module(batching="x")
    with pytest.raises(
        DataError, match=r"400 tokens, too few for 500 rows\. Set data\.batch_size to"
    ):
        made_module(batching="packed", batch_size=500)


@pytest.mark.soak
def test_the_command_trains_on_lines(command, text_file, tmp_path):
    packed = [*TINY, f"data.paths=[{text_file}]", "data.batching=packed", "trainer.max_steps=150"]
    done = command("train", *packed, f"run_dir={tmp_path / 'run'}", "optimizer.lr=0.02")
    assert done.returncode == 0, done.stderr
    filled = [line.split(", ")[-1] for line in done.stdout.splitlines() if " filled" in line]
    assert float(filled[0].split("%")[0]) > 99
    done = command("train", *packed, f"run_dir={tmp_path / 'lstm'}", "model/layer_type=lstm")
    assert done.returncode == 1
    assert "data.batching=packed needs a layer" in done.stderr
    assert "data.batching=stream" in done.stderr
    assert not (tmp_path / "lstm").exists()
