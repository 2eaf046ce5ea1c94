"""What Lightning, the callbacks and the data module cost against a bare loop on the same model.

    python -m benchmarks.training_overhead [--steps 150] [--rounds 3]

Both train the model of `experiment=quickstart` on the same chunks with the same optimizer and
clipping, in turn, in one process. The ratio of the speeds is what to read, by the clock and, where
others use the machine as well, by the process's CPU time; the goal is at least 0.9. A last round
under Lightning's profiler says where the time goes; of that, the next chunk is to take 2 % at most.
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
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_module.predictor import SentencePredictor
from lightning_module.train import CONFIGS, quiet


class Bare(nn.Module):
    """The quickstart's model without this project: embedding, nn.GRU, output."""

    def __init__(self, vocab_size: int, embedding_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.core = nn.GRU(embedding_size, hidden_size)
        self.output = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens, state):
        hidden, state = self.core(self.embedding(tokens), state)
        return self.output(hidden), state


class Clock(L.Callback):
    """Seconds of a training, by the clock and of the process's CPU."""

    def on_train_start(self, *_) -> None:
        self.begun = now()

    def on_train_end(self, *_) -> None:
        self.seconds = now() - self.begun


def now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def seconds_bare(model, optimizer, chunks) -> np.ndarray:
    state, begun = None, now()
    for inputs, targets, *_ in chunks:
        logits, state = model(inputs, state)
        state = state.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return now() - begun


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


def seconds_with_lightning(config, data, settings, profiler=None) -> np.ndarray:
    predictor = SentencePredictor(
        data.vocab_size, optimizer=instantiate(config.optimizer), **settings
    )
    clock = Clock()
    callbacks = [clock, *(instantiate(c) for c in config.callbacks.values())]
    loggers = [instantiate(c) for c in config.logger.values()]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers, profiler=profiler)
    trainer.fit(predictor, datamodule=data)
    return clock.seconds


def profile(profiler: SimpleProfiler) -> list[tuple[str, float]]:
    """What takes which share of the training, largest first; parts of parts are not named twice."""
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
    shares = {
        part: sum(s for name, s in seconds.items() if re.fullmatch(pattern, name)) / whole
        for part, pattern in parts.items()
    }
    shares["the rest: optimizer, logging, loops"] = 1 - sum(shares.values())
    return sorted(shares.items(), key=lambda item: -item[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    quiet()
    config = composed(arguments.steps, tempfile.mkdtemp())
    data = instantiate(config.data, tokenizer=instantiate(config.tokenizer))
    data.prepare_data()
    data.setup("fit")
    print(data.describe())
    loader = data.train_dataloader()
    chunks = [chunk for chunk, _ in zip(loader, range(arguments.steps), strict=False)]
    settings = OmegaConf.to_container(config.model)
    bare = Bare(data.vocab_size, settings["embedding_size"], settings["hidden_size"])
    ratios = []
    for round_ in range(arguments.rounds + 1):
        model = copy.deepcopy(bare)
        optimizer = instantiate(config.optimizer)(model.parameters())
        alone = seconds_bare(model, optimizer, chunks)
        ours = seconds_with_lightning(config, data, settings)
        ratio, warm_up = alone / ours, round_ == 0
        if not warm_up:
            ratios.append(ratio)
        tokens = sum(chunk.targets.numel() for chunk in chunks)
        print(
            f"bare {tokens / alone[0]:,.0f} tokens/s, Lightning {tokens / ours[0]:,.0f}, "
            f"ratio {ratio[0]:.3f} by the clock, {ratio[1]:.3f} by CPU time"
            f"{' (warm-up, not counted)' * warm_up}"
        )
    wall, cpu = np.median(ratios, axis=0)
    print(
        f"median ratio {wall:.3f} by the clock, {cpu:.3f} by CPU time, "
        f"on {torch.get_num_threads()} threads\n"
    )
    profiler = SimpleProfiler()
    seconds_with_lightning(config, data, settings, profiler)
    print("| part of a training step | share |\n|---|---|")
    for part, share in profile(profiler):
        print(f"| {part} | {share:.1%} |")


if __name__ == "__main__":
    main()
