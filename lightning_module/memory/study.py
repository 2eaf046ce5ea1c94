"""What a layer type learns to remember, and how far back its gradient reaches.

A study trains a `SentencePredictor` on one task: on the delays one after the other, each from the
weights after the longest delay learnt so far (or, if none was learnt, after the previous delay), or
on text. Before and after training it measures the norm of the derivative of the last step's loss
with respect to the state k steps before.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lightning_module.callbacks.stopping import ValidateAtEnd
from lightning_module.data.datamodule import SentenceDataModule
from lightning_module.memory.tasks import TASKS, Sequences
from lightning_module.model import SentencePredictor
from lightning_module.schedules import constant, cosine

SOLVED = 0.99  # share of right answers that ends the training on a delay
LEARNED = 0.9  # share from which the next delay starts from these weights
CHECK_EVERY = 25  # training steps
CHECK_ROWS = 128  # sequences of a check, all new to the model
GRADIENT_ROWS = 32  # sequences over which the median of the gradient's norm is taken
POINTS = 60  # of a curve of norms, spaced evenly on a logarithmic axis
CONTEXT_ROWS = 512  # positions in the validation text
CONTEXT_TARGETS = 16  # characters evaluated at each

# Progress callback of a study: share done, and a line for users.
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Study:
    """The settings of a study.

    Attributes:
        task: `copy`, `adding` or `text`.
        layer_type: one of `LAYER_TYPES`.
        steps: maximum training steps for each delay; for text the delays are contexts.
        text_steps: training steps on text.
        hidden_size: see `SentencePredictor`.
        embedding_size: likewise.
        batch_size: sequences per training step.
        learning_rate: of Adam.
        seed: of weights and sequences.
    """

    task: str
    layer_type: str
    steps: dict[int, int]
    text_steps: int
    hidden_size: int
    embedding_size: int
    batch_size: int
    learning_rate: float
    seed: int


def remember(study: Study, report: Report, keep: Callable[[dict[str, Any]], None]) -> str:
    """Trains on every delay of `copy` or `adding`.

    Args:
        study: the settings.
        report: called with the progress.
        keep: called with the results so far, whenever there are new ones: `parameters`, `success`
            by delay, and `gradient` at `start` and `end`, see `gradient_norms`.

    Returns:
        The outcome in a line for users.
    """
    L.seed_everything(study.seed, workers=True, verbose=False)
    model = _predictor(study, TASKS[study.task].vocab_size, constant)
    longest = max(study.steps)
    kept, learned = copy.deepcopy(model.state_dict()), False
    probe = next(iter(Sequences(study.task, longest, GRADIENT_ROWS, study.seed + 2)))
    success: dict[int, dict[str, float]] = {}
    gradient = {"start": gradient_norms(model, probe.inputs, probe.targets[-1])}
    parameters = sum(p.numel() for p in model.parameters())
    results = {"parameters": parameters, "success": success, "gradient": gradient}
    keep(results)
    work = {delay: delay * most for delay, most in study.steps.items()}
    done = 0
    for delay, most in sorted(study.steps.items()):
        model.load_state_dict(kept)
        begun = time.process_time()
        check = Sequences(study.task, delay, CHECK_ROWS, study.seed + 1, batches=1)
        whole = sum(work.values())
        progress = _Progress(report, done / whole, work[delay] / whole, f"delay {delay}")
        solved = EarlyStopping(
            "val_top1",
            mode="max",
            stopping_threshold=SOLVED,
            patience=most,
            check_on_train_epoch_end=False,
        )
        trainer = _trainer(most, ValidateAtEnd(), solved, progress)
        trainer.fit(model, Sequences(study.task, delay, study.batch_size, study.seed), check)
        right = trainer.callback_metrics["val_top1"].item()
        success[delay] = {
            "right": right,
            "steps": trainer.global_step,
            "cpu_seconds": time.process_time() - begun,
        }
        # The weights after a delay too long to learn would harm the following delays.
        if right >= LEARNED or not learned:
            kept, learned = copy.deepcopy(model.state_dict()), learned or right >= LEARNED
        done += work[delay]
        keep(results)
    model.load_state_dict(kept)
    gradient["end"] = gradient_norms(model, probe.inputs, probe.targets[-1])
    keep(results)
    return "right after " + ", ".join(
        f"{delay}: {found['right']:.0%}" for delay, found in success.items()
    )


def read_text(
    study: Study, data: SentenceDataModule, report: Report, keep: Callable[[dict], None]
) -> str:
    """Trains on running text; `success` is the loss after contexts of different lengths.

    Args:
        study: the settings.
        data: a `SentenceDataModule` after `setup`.
        report: as for `remember`.
        keep: as for `remember`.

    Returns:
        The outcome in a line for users.
    """
    L.seed_everything(study.seed, workers=True, verbose=False)
    model = _predictor(study, data.vocab_size, partial(cosine, final_lr=0.0))
    longest = max(study.steps)
    tokens = data.val.tokens
    stream = torch.from_numpy(tokens.take(np.arange(tokens.begins[-1])[:, None])[:, 0])
    generator = torch.Generator().manual_seed(study.seed)
    last = len(stream) - CONTEXT_TARGETS
    indices = torch.randint(longest, last, (CONTEXT_ROWS,), generator=generator)
    probe = stream[indices[:GRADIENT_ROWS] - torch.arange(longest, -1, -1)[:, None]]
    success: dict[int, dict[str, float]] = {}
    gradient = {"start": gradient_norms(model, probe[:-1], probe[-1])}
    parameters = sum(p.numel() for p in model.parameters())
    results = {"parameters": parameters, "success": success, "gradient": gradient}
    keep(results)
    progress = _Progress(report, 0.0, 0.99, "training")
    trainer = _trainer(study.text_steps, progress, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    gradient["end"] = gradient_norms(model, probe[:-1], probe[-1])
    for context in sorted(study.steps):
        success[context] = {
            "bits_per_char": context_loss(model, stream, indices, context) / data.chars_per_token
        }
        keep(results)
    return "bits per character after " + ", ".join(
        f"{context}: {found['bits_per_char']:.2f}" for context, found in success.items()
    )


def gradient_norms(model: SentencePredictor, inputs: Tensor, last: Tensor) -> dict[str, list]:
    """How much of the derivative of the last step's loss reaches the earlier states.

    The state is everything that a layer carries from step to step: h, for an LSTM h and c together.
    Computed in float64, because a vanishing gradient underflows in float32.

    Args:
        model: with one layer; not changed.
        inputs: tokens, int64 [T, B].
        last: the target of the last step, int64 [B].

    Returns:
        `k`, steps before the last, from 0; `norm`, the median over the rows of the Euclidean norm
        of d loss_t / d state_{t-k}; `share`, the median of its ratio to the norm at k = 0.
    """
    model = copy.deepcopy(model).double().eval()
    state, states = None, []
    for x in model.embedding(inputs).split(1):
        hidden, state = model.core(x, state)
        states.append(state if isinstance(state, tuple) else (state,))
    logits = model.output(model.to_embedding(hidden[0]))
    loss = F.cross_entropy(logits, last, reduction="sum")  # the rows are independent
    # The loss depends on the last state through the layer's output, which no later step reads.
    states[-1] = (hidden,)
    found = iter(torch.autograd.grad(loss, [part for parts in states for part in parts]))
    norms = torch.stack(
        [torch.cat([next(found)[0] for _ in parts], 1).norm(dim=1) for parts in states]
    ).flip(0)
    kept = sorted({0, *np.geomspace(1, len(norms) - 1, POINTS).round().astype(int).tolist()})
    return {
        "k": kept,
        "norm": norms.median(1).values[kept].tolist(),
        "share": (norms / norms[0]).median(1).values[kept].tolist(),
    }


def context_loss(model: SentencePredictor, stream: Tensor, indices: Tensor, context: int) -> float:
    """Bits per token after reading `context` tokens from a state of zero.

    Args:
        model: the model.
        stream: tokens of the text, int64 [tokens].
        indices: of the first of `CONTEXT_TARGETS` evaluated tokens, int64 [B].
        context: number of tokens read before it.
    """
    model.eval()
    steps = torch.arange(-context, CONTEXT_TARGETS)[:, None]
    window = stream[indices + steps]
    with torch.inference_mode():
        logits, _ = model(window[:-1])
        logits = logits[-CONTEXT_TARGETS:]
        loss = F.cross_entropy(logits.flatten(0, 1), window[-CONTEXT_TARGETS:].flatten())
    return loss.item() / math.log(2)


class _Progress(L.Callback):
    """Reports the progress of the study at every check."""

    def __init__(self, report: Report, begin: float, share: float, label: str) -> None:
        self.report, self.begin, self.share, self.label = report, begin, share, label

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % CHECK_EVERY == 0:
            right = trainer.callback_metrics.get("val_top1")
            doing = f"loss {trainer.callback_metrics['train_loss']:.2f}"
            if right is not None:
                doing = f"{right:.0%} right"
            done = self.begin + self.share * trainer.global_step / trainer.max_steps
            self.report(done, f"{self.label}, {doing}")


def _predictor(study: Study, vocab_size: int, schedule: Callable[..., float]) -> SentencePredictor:
    return SentencePredictor(
        vocab_size,
        layer_type={"name": study.layer_type},
        embedding_size=study.embedding_size,
        hidden_size=study.hidden_size,
        optimizer=partial(torch.optim.Adam, lr=study.learning_rate, betas=(0.9, 0.99)),
        schedule=partial(schedule, warmup=0.02),
    )


def _trainer(max_steps: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        val_check_interval=CHECK_EVERY,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
