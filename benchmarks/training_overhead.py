"""Overhead of Lightning, the callbacks and the data module over a plain loop on the same model.

    python -m benchmarks.training_overhead [--steps 200] [--rounds 5]

Both train the model of `experiment=quickstart` on the same chunks with the same optimizer and
clipping, with interleaved steps, so that other load on the machine affects both. The result is the
ratio of the speeds; the goal is at least 0.9. A last round under Lightning's profiler gives the
shares of the parts; the goal for the next chunk is at most 2 %.
"""

import argparse
import copy
import re
import tempfile
import time

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import DictConfig
from torch import nn

from lightning_module.data.chunks import Chunk
from lightning_module.data.datamodule import SentenceDataModule
from lightning_module.lightning_warnings import quiet
from lightning_module.model import LAYER_TYPES
from lightning_module.settings.config_folder import CONFIGS

# Steps in which loggers open their files and allocators grow; not counted.
WARM_UP = 20


class Bare(nn.Module):
    """The quickstart's model without Lightning: embedding, the same layer, output."""

    def __init__(self, vocab_size: int, settings: DictConfig) -> None:
        super().__init__()
        embedding_size, hidden_size = settings.embedding_size, settings.hidden_size
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.core = LAYER_TYPES[settings.layer_type.name](embedding_size, hidden_size)
        self.output = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens, state):
        hidden, state = self.core(self.embedding(tokens), state)
        return self.output(hidden), state


class BareLoop(L.Callback):
    """Does its own step after each of Lightning's.

    Attributes:
        seconds: times of Lightning's steps, and of its own.
    """

    def __init__(self, model: Bare, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.state = model, optimizer, None
        self.seconds, self._since = np.zeros(2), 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
        begun = time.perf_counter()
        self._step(batch)
        ended = time.perf_counter()
        if trainer.global_step > WARM_UP:
            self.seconds += begun - self._since, ended - begun
        self._since = ended

    def _step(self, batch: Chunk) -> None:
        # A separate function: the graph is freed when it returns, which is part of the step.
        logits, state = self.model(batch.inputs, self.state)
        self.state = state.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def composed(steps: int, run_dir: str) -> DictConfig:
    """The settings of `experiment=quickstart`, without validation."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(
            "train",
            [
                "experiment=quickstart",
                f"run_dir={run_dir}",
                f"trainer.max_steps={steps}",
                "trainer.strategy=auto",  # Lightning's own name for one process
                "trainer.limit_val_batches=0",
                "~callbacks.best",  # watches val_loss, and there is no validation here
            ],
        )


def train(config: DictConfig, data: SentenceDataModule, **more) -> None:
    """The quickstart's training, as the command runs it."""
    callbacks = [*(instantiate(c) for c in config.callbacks.values()), *more.pop("callbacks", ())]
    loggers = [instantiate(c) for c in config.logger.values()]
    predictor = instantiate(config.model, optimizer=config.optimizer, vocab_size=data.vocab_size)
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers, **more)
    trainer.fit(predictor, datamodule=data)


def profile(profiler: SimpleProfiler) -> list[tuple[str, float]]:
    """Shares of the parts of the training, largest first; parts of parts are not listed.

    Raises:
        LookupError: Lightning's name of a part differs from that of version 2.6.6.
    """
    seconds = {name: sum(times) for name, times in profiler.recorded_durations.items()}
    whole = seconds["run_training_epoch"]
    parts = {
        "forward": r"\[Strategy\].*\.training_step",
        "backward": r"\[Strategy\].*\.backward",
        "clipping": r"\[LightningModule\].*\.configure_gradient_clipping",
        "callbacks": r"\[Callback\].*\.on_(train_batch|before|after).*",
        "the next chunk": r"\[_TrainingEpochLoop\]\.train_dataloader_next",
        "putting it on the device": r"\[Strategy\].*\.batch_to_device",
    }
    shares = {}
    for part, pattern in parts.items():
        of_it = [s for name, s in seconds.items() if re.fullmatch(pattern, name)]
        if not of_it:
            raise LookupError(f"Lightning's profiler recorded nothing like {pattern} for {part}")
        shares[part] = sum(of_it) / whole
    shares["the rest: optimizer, logging, loops"] = 1 - sum(shares.values())
    return sorted(shares.items(), key=lambda item: -item[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} that are not counted")
    quiet()
    config = composed(arguments.steps, tempfile.mkdtemp())
    data = instantiate(config.data, tokenizer=instantiate(config.tokenizer))
    data.prepare_data()
    data.setup("fit")
    print(data.describe())
    untrained, ratios = Bare(data.vocab_size, config.model), []
    for round_ in range(arguments.rounds + 1):
        model = copy.deepcopy(untrained)
        bare = BareLoop(model, instantiate(config.optimizer)(model.parameters()))
        train(config, data, callbacks=[bare])
        lightnings, own = bare.seconds / (arguments.steps - WARM_UP) * 1e3
        warm_up = round_ == 0
        if not warm_up:
            ratios.append(own / lightnings)
        print(
            f"a step: bare {own:.1f} ms, Lightning {lightnings:.1f} ms, "
            f"ratio of the speeds {own / lightnings:.3f}{' (warm-up, not counted)' * warm_up}"
        )
    print(f"median ratio {np.median(ratios):.3f} on {torch.get_num_threads()} threads\n")
    profiler = SimpleProfiler()
    train(config, data, profiler=profiler)
    print("| part of a training step | share |\n|---|---|")
    for part, share in profile(profiler):
        print(f"| {part} | {share:.1%} |")


if __name__ == "__main__":
    main()
