"""What a trained GRU computes for each token of a text: gates, state, predictions.

The sign of z is torch's: `h = (1 - z) n + z h_before`. Where z is 1 a unit keeps its value, where z
is 0 the candidate n replaces it. A unit with constant z keeps what it has read for 1 / (1 - z)
tokens on average: after k tokens, z^k of it is left.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_module.data.tokenizers import Tokenizer
from lightning_module.errors import InspectionError
from lightning_module.generation import NextToken
from lightning_module.model import SentencePredictor
from triton_gru import GRU

# A picture with more columns than this is too wide to read.
MAX_TOKENS = 256
MOST_MARKED = 5  # tokens marked as those at which the model forgets most
# A longer text is refused before any computation.
MAX_CHARACTERS = 32 * MAX_TOKENS


@dataclass(frozen=True)
class Inspection:
    """One layer of a GRU over a text of T tokens, with H units.

    Attributes:
        layer_type: Name of the recurrent layer, see `model.LAYER_TYPES`.
        layer: Which layer; 1 reads the tokens.
        layers: Number of layers.
        ids: The ids of the tokens.
        tokens: The tokens as display text.
        r: Reset gate `[T, H]`, the share of the past that enters the candidate.
        z: Update gate `[T, H]`, the share of the state that is kept.
        n: Candidate `[T, H]`, within -1 and 1.
        h: State after the token `[T, H]`, within -1 and 1.
        next_tokens: For each token the likeliest next ones, likeliest first.
        surprise: The loss of each token in bits, -log2 of its predicted probability; None for the
            first, which nothing predicts.
    """

    layer_type: str
    layer: int
    layers: int
    ids: list[int]
    tokens: list[str]
    r: Tensor
    z: Tensor
    n: Tensor
    h: Tensor
    next_tokens: list[list[NextToken]]
    surprise: list[float | None]

    @property
    def memory(self) -> Tensor:
        """For how many tokens each unit remembers, the mean of 1 / (1 - z) over the text, `[H]`.

        Finite: where z is rounded to 1, 1 - z counts as the dtype's eps (8.4 million tokens).
        """
        replaced = (1 - self.z.double()).clamp(min=torch.finfo(self.z.dtype).eps)
        return (1 / replaced).mean(0)

    @property
    def forgotten(self) -> Tensor:
        """The share of the state that each token replaces, the mean of 1 - z over units, `[T]`."""
        return (1 - self.z.double()).mean(1)

    @property
    def written(self) -> Tensor:
        """The share of the state after token t that was written at token s, `[T, T]` as `[t, s]`.

        Exact, as the state is a sum over the written values: of the candidate n_s the factor
        (1 - z_s) z_{s+1} ... z_t is left in h_t; this is its mean over units. Rows sum to at most
        1; the rest is the share of the initial state, zero.
        """
        z = self.z.double()
        left, rows = torch.zeros_like(z), []
        for t, kept in enumerate(z):
            left = left * kept
            left[t] = 1 - kept
            rows.append(left.mean(1))
        return torch.stack(rows)

    def origin(self, recent: int) -> Tensor:
        """The origin of the state after each token, shares `[T, 3]`.

        From that token, from the `recent` ones before it, and from older ones, including the
        initial state, zero.
        """
        written = self.written
        newest = written.diagonal()
        near = written.tril(-1).triu(-recent).sum(1)
        return torch.stack([newest, near, 1 - newest - near], 1)

    @property
    def forgets_most(self) -> list[int]:
        """Positions of the tokens that replace most of the state, largest share first.

        At most `MOST_MARKED`, and at most one token in four. Without the first token, before which
        the state is zero.
        """
        count = min(MOST_MARKED, len(self.tokens) // 4)
        return (self.forgotten[1:].argsort(descending=True)[:count] + 1).tolist()


def check_gates(model: SentencePredictor) -> GRU:
    """The model's recurrent layers, which must have a GRU's gates.

    Raises:
        InspectionError: They are not GRU layers.
    """
    if not isinstance(model.core, GRU):
        raise InspectionError(
            f"the model's layer type is {model.hparams['layer_type']['name']!r}, which has no "
            "update and reset gates to show; train one with model/layer_type=gru or "
            "model/layer_type=gru_reset_before"
        )
    return model.core


@torch.no_grad()
def inspect_text(
    model: SentencePredictor, tokenizer: Tokenizer, text: str, *, layer: int = 1, k: int = 5
) -> Inspection:
    """Reads a text as `generation.next_tokens` reads a prompt, and records gates and states.

    Args:
        model: in evaluation mode, with GRU layers.
        tokenizer: the one that the model was trained with.
        text: at most `MAX_TOKENS` tokens; empty for the beginning of a document.
        layer: the layer of the gates, from 1.
        k: number of likeliest next tokens.

    Raises:
        InspectionError: the layers are not GRU layers, there is no such layer, or the text is too
            long.
        DataError: the text contains characters that are not in the vocabulary.
    """
    gru = check_gates(model)
    layers = gru.num_layers
    if not 1 <= layer <= layers:
        raise InspectionError(f"layer must be from 1 to {layers}, as the model has; got {layer}")
    if len(text) > MAX_CHARACTERS:
        raise _too_long(f"{len(text):,} characters", f"{MAX_CHARACTERS:,} characters")
    ids = tokenizer.encode(text) or [tokenizer.doc_id]
    if len(ids) > MAX_TOKENS:
        raise _too_long(f"{len(ids):,} tokens", f"{MAX_TOKENS} tokens")
    tokens = torch.tensor(ids, device=model.device)[:, None]
    logits, _ = model(tokens)
    if not logits.isfinite().all():
        raise InspectionError("the model has diverged: its predictions are not finite numbers")
    probabilities = torch.log_softmax(logits[:, 0].cpu().double(), -1)  # no float64 on mps
    best = probabilities.topk(min(k, tokenizer.vocab_size))
    cost = probabilities[:-1].gather(1, tokens[1:].cpu())[:, 0] / -math.log(2)
    trace = gru.trace(model.embedding(tokens))
    r, z, n, h = (tensor[layer - 1, 0, :, 0].cpu() for tensor in trace)
    return Inspection(
        layer_type=model.hparams["layer_type"]["name"],
        layer=layer,
        layers=layers,
        ids=ids,
        tokens=[tokenizer.token(i) for i in ids],
        r=r,
        z=z,
        n=n,
        h=h,
        next_tokens=[
            [NextToken(i, tokenizer.token(i), math.exp(p)) for p, i in zip(*row, strict=True)]
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ],
        surprise=[None, *cost.tolist()],
    )


def _too_long(length: str, most: str) -> InspectionError:
    return InspectionError(
        f"the text has {length}; at most {most} can be shown at once: give a shorter part of it"
    )


# Labels of tokens that consist of white space.
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u3000": "□"})


def visible(token: str) -> str:
    """A token as a label: white space at its ends is shown as signs."""
    bare = token.strip()
    if not bare:
        return token.translate(_VISIBLE)
    start = token.index(bare)
    return token[:start].translate(_VISIBLE) + bare + token[start + len(bare) :].translate(_VISIBLE)
