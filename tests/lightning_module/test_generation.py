import pytest
import torch

from lightning_module import generation
from lightning_module.data.tokenizers import Tokenizer, TokenizerSettings
from lightning_module.errors import DataError
from lightning_module.generation import _sample, _Sentence, continue_prompt, next_tokens
from lightning_module.model import SentencePredictor

TEXT = "ab.c!”d 。"


@pytest.fixture
def tokenizer():
    return Tokenizer.train(TokenizerSettings("char"), [TEXT])


class Scripted(SentencePredictor):
    """Says the given text whatever it reads; its state counts the tokens read."""

    def __init__(self, tokenizer, text):
        super().__init__(tokenizer.vocab_size)
        self.ids = tokenizer.encode(text)
        self.read = []

    def forward(self, tokens, state=None):
        step = 0 if state is None else int(state.flatten()[0])
        self.read.append(tokens.clone())
        logits = torch.full((len(tokens), tokens.shape[1], self.hparams.vocab_size), -20.0)
        logits[-1, :, self.ids[min(step, len(self.ids) - 1)]] = 20.0
        return logits, torch.full((1, tokens.shape[1], 1), step + 1.0)

    def step(self, tokens, state=None):
        logits, state = self(tokens[None], state)
        return logits[0], state


def say(model, tokenizer, prompt, num_sentences=1, max_tokens=40):
    """The likeliest text."""
    settings = {"num_sentences": num_sentences, "max_tokens": max_tokens}
    return continue_prompt(model, tokenizer, prompt, temperature=0, top_p=1, **settings)


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ("ab.c", "ab."),
        ("ab.”c", "ab.”"),
        ("a!.”c", "a!.”"),
        ("d。a", "d。"),
        (".", "." * 6),  # nothing else comes: cut at max_tokens
        ("abdaba", "abdaba"),
    ],
)
def test_a_sentence_ends_after_its_full_stop_and_closing_marks(tokenizer, says, sentence):
    model = Scripted(tokenizer, says)
    got = say(model, tokenizer, "ab", num_sentences=2, max_tokens=6)
    assert got == [sentence, sentence]


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ("天。地", "天。"),
        ("天。”地", "天。”"),
        ("天！？…」』）地", "天！？…」』）"),
        ("he said: “no.”’] But", "he said: “no.”’]"),
        ("non.» Si", "non.»"),
        ("天。“地", "天。"),  # a quote that opens belongs to what follows
        ("क्या। हाँ", "क्या।"),
        ("天地玄黄", "天地玄黄"),
    ],
)
@pytest.mark.parametrize("vocab_size", [257, 400])
def test_a_sentence_ends_in_byte_tokens_as_in_characters(vocab_size, says, sentence):
    learnt = "天地玄黄。”宇宙洪荒！？…」』）he said: “no.”’] But\n" * 50
    by_bytes = Tokenizer.train(TokenizerSettings("bpe", vocab_size), [learnt])
    by_character = Tokenizer.train(TokenizerSettings("char"), [says])
    for tokenizer in (by_bytes, by_character):
        whole = len(tokenizer.encode(says))
        assert say(Scripted(tokenizer, says), tokenizer, "", max_tokens=whole) == [sentence]


def test_bytes_that_make_no_character_end_no_sentence_and_hold_none_up():
    tokenizer = Tokenizer.train(TokenizerSettings("bpe", 257), ["a"])
    first, *_ = tokenizer.encode("。")
    for follows, expected in (([first, first], "."), (tokenizer.encode("b"), ".")):
        sentence = _Sentence(tokenizer)
        sentence.add([*tokenizer.encode("."), *follows])
        assert sentence.ended and tokenizer.decode(sentence.ids) == expected
    sentence = _Sentence(tokenizer)
    sentence.add([first, *tokenizer.encode("a.b")])
    assert sentence.ended and tokenizer.decode(sentence.ids) == "\ufffda."
    # Cut within a character: no part of it is shown.
    assert say(Scripted(tokenizer, "天地"), tokenizer, "", max_tokens=4) == ["天"]


def test_the_model_reads_the_prompt_and_then_its_own_tokens(tokenizer):
    model = Scripted(tokenizer, "cd.a")
    say(model, tokenizer, "ab")
    read = [tokenizer.decode(t[:, 0].tolist()) for t in model.read]
    assert read == ["ab", "c", "d", "."]


def test_an_empty_prompt_begins_a_document(tokenizer):
    model = Scripted(tokenizer, "a.b")
    say(model, tokenizer, "")
    assert model.read[0].tolist() == [[tokenizer.doc_id]]


def test_next_tokens_are_the_softmax_in_order(tokenizer):
    torch.manual_seed(0)
    model = SentencePredictor(tokenizer.vocab_size).eval()
    got = next_tokens(model, tokenizer, "ab", k=4)
    logits, _ = model(torch.tensor(tokenizer.encode("ab"))[:, None])
    expected = logits[-1, 0].softmax(-1).sort(descending=True)
    assert [t.id for t in got] == expected.indices[:4].tolist()
    assert [t.probability for t in got] == pytest.approx(expected.values[:4].tolist(), rel=1e-5)
    assert got[0].text == tokenizer.token(got[0].id)
    everything = next_tokens(model, tokenizer, "ab", k=1000)
    assert sum(t.probability for t in everything) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("layer_type", ["gru", "gru_reset_before", "lstm"])
def test_a_step_scores_as_the_whole_text_does(tokenizer, layer_type):
    torch.manual_seed(0)
    options = {"num_layers": 2, "hidden_size": 9, "embedding_size": 5, "tie_weights": True}
    model = SentencePredictor(tokenizer.vocab_size, {"name": layer_type}, **options).eval()
    tokens = torch.randint(tokenizer.vocab_size, (6, 3))
    expected, _ = model(tokens)
    state, logits = None, []
    for row in tokens:
        scores, state = model.step(row, state)
        logits.append(scores)
    torch.testing.assert_close(torch.stack(logits), expected)


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_fewer_checks_on_the_host_change_no_sentence(tokenizer, every, monkeypatch):
    torch.manual_seed(0)
    model = SentencePredictor(tokenizer.vocab_size).eval()
    torch.nn.init.constant_(model.output.bias, 0)
    ask = {"num_sentences": 3, "max_tokens": 30, "temperature": 1.0, "top_p": 0.9}
    looks, tokens = [], []
    look, step = torch.Tensor.tolist, model.step
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "tolist", lambda t: looks.append(t.shape) or look(t))
        expected = continue_prompt(model, tokenizer, "a", **ask)
        steps_at_once = len(looks)
        looks.clear()

        def on_accelerator(ids, state):
            tokens.append(ids)
            return step(ids, state)

        patched.setattr(model, "step", on_accelerator)
        patched.setattr(generation, "CHECK_EVERY", every)
        patched.setattr(generation, "_check_is_free", lambda device: False)
        with Waits() as waits:
            got = continue_prompt(model, tokenizer, "a", **ask)
    assert got == expected
    assert sum(shape[1] for shape in looks) == min(30, -(-steps_at_once // every) * every)
    assert len(looks) == -(-min(30, -(-steps_at_once // every) * every) // every)
    assert not waits.seen


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what would make the host wait for the device, besides tolist."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "multinomial"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_the_seed_decides_and_doc_and_unk_are_never_generated(tokenizer):
    torch.manual_seed(0)
    model = SentencePredictor(tokenizer.vocab_size).eval()
    torch.nn.init.constant_(model.output.bias, 0)
    model.output.bias.data[[tokenizer.doc_id, tokenizer.unk_id]] = 10.0
    ask = {"num_sentences": 4, "max_tokens": 30, "temperature": 1.0, "top_p": 1.0}
    first = continue_prompt(model, tokenizer, "a", seed=3, **ask)
    assert first == continue_prompt(model, tokenizer, "a", seed=3, **ask)
    assert first != continue_prompt(model, tokenizer, "a", seed=4, **ask)
    assert len(set(first)) > 1
    assert not any("<" in text for text in first)


def test_sampling_follows_temperature_and_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(40_000, -1)
    generator = torch.Generator().manual_seed(0)

    def shares(temperature, top_p):
        drawn = _sample(logits, temperature, top_p, generator)
        return drawn.bincount(minlength=4) / len(logits)

    close = {"rtol": 0, "atol": 0.015}
    torch.testing.assert_close(shares(1.0, 1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), **close)
    torch.testing.assert_close(shares(1.0, 0.6), torch.tensor([0.625, 0.375, 0, 0]), **close)
    assert shares(1.0, 0.0)[0] == 1
    assert shares(0, 1.0)[0] == 1
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(shares(0.5, 1.0), squared / squared.sum(), **close)


def test_unknown_characters_in_a_prompt_are_named(tokenizer):
    model = SentencePredictor(tokenizer.vocab_size)
    with pytest.raises(DataError, match="'ß'"):
        say(model, tokenizer, "aß")
    with pytest.raises(DataError, match="'ß'"):
        next_tokens(model, tokenizer, "aß", 3)
