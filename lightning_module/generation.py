"""Generation with a trained model: likeliest next tokens, and sentences sampled to their end."""

import unicodedata
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_module.data.tokenizers import Tokenizer
from lightning_module.model import SentencePredictor, State, map_state

# The members of Unicode's Sentence_Terminal that end most sentences of a living script.
SENTENCE_END = frozenset(".!?…‼⁇⁈⁉‽。！？．｡﹒﹖﹗؟۔।॥։።፧။៕⸮")
# Tokens sampled on an accelerator between two checks for the end: each check synchronizes. On a CPU
# it costs nothing, and a check at every token stops earliest.
CHECK_EVERY = 16
# Quotes that open and close with the same sign; see `_belongs_to_end`.
_QUOTES = frozenset("\"'＂＇")
_INCOMPLETE = "\ufffd"  # the decoding of bytes that are not a complete character


class NextToken(NamedTuple):
    """A candidate for the next token: its id, its display text, and its probability."""

    id: int
    text: str
    probability: float


@torch.inference_mode()
def next_tokens(
    model: SentencePredictor, tokenizer: Tokenizer, prompt: str, k: int
) -> list[NextToken]:
    """The `k` likeliest tokens after `prompt`, likeliest first, by the model's own probabilities.

    Raises:
        DataError: the prompt contains characters that are not in the vocabulary.
    """
    logits, _ = _read(model, tokenizer, prompt)
    best = torch.softmax(logits[0], -1).topk(min(k, tokenizer.vocab_size))
    return [
        NextToken(i, tokenizer.token(i), p)
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


@torch.inference_mode()
def continue_prompt(
    model: SentencePredictor,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_sentences: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int = 1,
) -> list[str]:
    """Sample continuations of `prompt`, each to the end of its sentence.

    All continuations are sampled in parallel, one token each per step. Tokens stay on the model's
    device until the host checks whether all sentences have ended, see `CHECK_EVERY`.

    Args:
        model: in evaluation mode.
        tokenizer: the one that the model was trained with.
        prompt: text to continue; empty for the beginning of a document.
        num_sentences: number of continuations, sampled in parallel.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability (nucleus
            sampling, Holtzman et al. 2020).
        max_tokens: maximum length; a longer sentence is cut.
        seed: the same seed gives the same text on the same machine.

    Returns:
        The continuations without the prompt.

    Raises:
        DataError: the prompt contains characters that are not in the vocabulary.
    """
    if num_sentences == 0:
        return []
    first, state = _read(model, tokenizer, prompt)
    generator = torch.Generator(first.device).manual_seed(seed)
    logits = first.expand(num_sentences, -1)
    state = map_state(state, lambda s: s.expand(-1, num_sentences, -1).contiguous())
    sentences = [_Sentence(tokenizer) for _ in range(num_sentences)]
    special = [i for i in (tokenizer.doc_id, tokenizer.unk_id) if i is not None]
    never = torch.tensor(special, device=first.device, dtype=torch.int64)
    check_every = 1 if _check_is_free(first.device) else CHECK_EVERY
    unread: list[Tensor] = []
    for number in range(1, max_tokens + 1):
        tokens = _sample(logits.index_fill(1, never, -torch.inf), temperature, top_p, generator)
        unread.append(tokens)
        if number % check_every == 0 or number == max_tokens:
            for sentence, ids in zip(sentences, torch.stack(unread, 1).tolist(), strict=True):
                sentence.add(ids)
            unread = []
            if all(sentence.ended for sentence in sentences):
                break
        logits, state = model.step(tokens, state)
        logits = logits.float()
    return [tokenizer.decode(sentence.ids) for sentence in sentences]


class _Sentence:
    """Tokens up to a full stop and the closing marks after it.

    A token may be a part of a character (byte pairs): tokens are kept until they are characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.waiting: list[int] = []
        self.full_stop = False
        self.ended = False

    def add(self, tokens: list[int]) -> None:
        for token in tokens:
            if self.ended:
                return
            self.waiting.append(token)
            text = self.tokenizer.decode(self.waiting)
            by_bytes = self.tokenizer.unk_id is None
            whole = text.removesuffix(_INCOMPLETE) if by_bytes else text
            if self.full_stop and not all(map(_belongs_to_end, whole)):
                self.ended = True
            elif whole == text:
                self.ids += self.waiting
                self.waiting = []
                self.full_stop = self.full_stop or not SENTENCE_END.isdisjoint(text)


def _belongs_to_end(character: str) -> bool:
    """Whether it belongs to the sentence after a full stop: another stop or a closing mark."""
    return (
        character in SENTENCE_END
        or character in _QUOTES
        or unicodedata.category(character) in ("Pe", "Pf")  # closing brackets and final quotes
    )


def _read(model: SentencePredictor, tokenizer: Tokenizer, prompt: str) -> tuple[Tensor, State]:
    """Logits `[1, V]` after the prompt, and the state."""
    ids = tokenizer.encode(prompt) or [tokenizer.doc_id]
    logits, state = model(torch.tensor(ids, device=model.device)[:, None])
    return logits[-1].float(), state


def _check_is_free(device: torch.device) -> bool:
    return device.type == "cpu"


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token id per row of logits `[B, V]`."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
    # A token is kept if those before it have less than top_p together; so the likeliest always is.
    before = probabilities.cumsum(-1) - probabilities
    left_out = before >= top_p
    left_out[:, 0] = False
    probabilities = probabilities.masked_fill(left_out, 0.0)
    # As torch.multinomial for one draw, number for number, without its check that the probabilities
    # are valid, which synchronizes.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    chosen = (probabilities / noise).argmax(-1, keepdim=True)
    return ids.gather(1, chosen)[:, 0]
