"""Every setting of the commands: its type, its range, and whether it is text.

`SETTINGS` has the keys of `conf/` by command; a test compares the two. A key that is not in it
(`+trainer.benchmark=true`) is passed on unchecked. Imports no torch: an invalid value is refused at
once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lightning_module.errors import SettingsError
from lightning_module.settings.former_names import KEYS, present_key
from lightning_module.settings.kinds import (
    DEVICES,
    DROPOUT,
    FLAG,
    NAME,
    ONE_PATH,
    PATH,
    PATHS,
    PRECISIONS,
    SHARE,
    SHARE_OR_COUNT,
    SIZE,
    SOME_OR_COUNT,
    TEXT,
    TEXTS,
    TIME,
    URL,
    WORD,
    Kind,
    choice,
    maybe,
    number,
    numbers,
    pair,
    shown,
    some_of,
    whole,
)

MAX_CANDIDATES = 10  # likeliest next tokens, as many as fit above one another

DATA: dict[str, Kind] = {
    "data.batching": choice("stream", "packed"),
    "data.batch_size": SIZE,
    "data.seq_len": SIZE,
    "data.val_batch_size": maybe(SIZE),
    "data.max_chars": maybe(whole(2)),
    "data.paths": PATHS,
    "data.val_paths": maybe(PATHS),
    "data.val_fraction": number(0, 1, above=0, below=1),
    "data.name": NAME,
    "data.config": maybe(NAME),
    "data.text_column": NAME,
    "data.train_split": NAME,
    "data.val_split": NAME,
    "data.revision": maybe(NAME),
    "data.url": URL,
    "tokenizer.kind": choice("char", "bpe", "word", "shards"),
    "tokenizer.vocab_size": maybe(whole(3)),
}
MODEL: dict[str, Kind] = {
    "model.embedding_size": SIZE,
    "model.hidden_size": SIZE,
    "model.num_layers": SIZE,
    "model.dropout": DROPOUT,
    "model.tie_weights": FLAG,
    "model.layer_type.name": choice("gru", "gru_reset_before", "lstm", "rnn"),
    "model.layer_type.backend": choice("auto", "triton", "cpu", "torch", "reference"),
    "model.layer_type.recurrent_dropout": DROPOUT,
    "model.layer_type.weight_dropout": DROPOUT,
    "model.layer_type.zoneout": DROPOUT,
    "model.layer_type.layer_norm": FLAG,
}
RUN: dict[str, Kind] = {
    "seed": whole(0, 2**32 - 1),
    "run_dir": ONE_PATH,
    "resume": maybe(ONE_PATH),
    "trust": replace(TEXTS, swept=False),
    "compile": FLAG,
    "rank_timeout": number(0, above=0),
    "check": choice("auto", "off"),
    "optimizer.lr": number(0),
    "optimizer.betas": pair(DROPOUT),
    "optimizer.weight_decay": number(0),
    "optimizer.fused": maybe(FLAG),
    "scheduler.warmup": SHARE,
    "scheduler.final_lr": number(0),
    "trainer.accelerator": WORD,
    "trainer.precision": choice(*PRECISIONS),
    "trainer.max_steps": whole(-1),
    "trainer.max_epochs": maybe(whole(-1)),
    "trainer.max_time": maybe(TIME),
    "trainer.gradient_clip_val": maybe(number(0)),
    "trainer.accumulate_grad_batches": SIZE,
    "trainer.val_check_interval": SOME_OR_COUNT,
    "trainer.check_val_every_n_epoch": maybe(SIZE),
    "trainer.limit_train_batches": SOME_OR_COUNT,
    "trainer.limit_val_batches": SHARE_OR_COUNT,
    # Lightning's 0 means "no logging", but curves, summary and resuming need the log.
    "trainer.log_every_n_steps": SIZE,
    "trainer.num_sanity_val_steps": whole(-1),
    "trainer.deterministic": maybe(choice(True, False, "warn")),
    "trainer.default_root_dir": PATH,
    "trainer.enable_progress_bar": FLAG,
    "trainer.enable_model_summary": FLAG,
    "trainer.devices": DEVICES,
    "trainer.num_nodes": SIZE,
    "callbacks.learning_rate.logging_interval": maybe(choice("step", "epoch")),
    "callbacks.samples.run_dir": PATH,
    "callbacks.samples.prompts": TEXTS,
    "callbacks.samples.num_sentences": whole(0),
    "callbacks.samples.temperature": number(0),
    "callbacks.samples.top_p": SHARE,
    "callbacks.samples.max_tokens": SIZE,
    "callbacks.report.run_dir": PATH,
    "callbacks.best.dirpath": PATH,
    "callbacks.best.filename": NAME,
    # The metrics whose lowest value is the best one.
    "callbacks.best.monitor": choice("val_loss", "val_perplexity", "val_bits_per_char"),
    "callbacks.best.save_top_k": whole(-1),
    "callbacks.best.enable_version_counter": FLAG,
    "callbacks.last.checkpoint_dir": PATH,
    "callbacks.last.every_minutes": number(0),
    "callbacks.stop_on_signal.checkpoint_dir": PATH,
    "callbacks.averaging.decay": SHARE,
    "callbacks.averaging.update_every_n_steps": SIZE,
    "callbacks.averaging.start": DROPOUT,
    "callbacks.early_stopping.patience": whole(0),
    "callbacks.early_stopping.min_delta": number(0),
    "trainer.profiler.dirpath": PATH,
    "trainer.profiler.filename": NAME,
    "logger.csv.save_dir": PATH,
    "logger.csv.name": TEXT,
    "logger.csv.version": TEXT,
    "logger.tensorboard.save_dir": PATH,
    "logger.tensorboard.name": TEXT,
    "logger.tensorboard.version": TEXT,
    "logger.wandb.run_dir": PATH,
    "logger.wandb.project": NAME,
    "logger.wandb.offline": FLAG,
    "logger.mlflow.run_dir": PATH,
    "logger.mlflow.experiment": NAME,
    "logger.mlflow.tracking_uri": maybe(NAME),
}
SWEEPER: dict[str, Kind] = {
    "hydra.run.dir": ONE_PATH,
    "hydra.sweep.dir": ONE_PATH,
    "hydra.sweep.subdir": ONE_PATH,
    "hydra.sweeper.study": replace(NAME, swept=False),
    "hydra.sweeper.objective": replace(NAME, swept=False),
    "hydra.sweeper.direction": choice("minimize", "maximize"),
    "hydra.sweeper.n_trials": SIZE,
    "hydra.sweeper.n_jobs": SIZE,
    "hydra.sweeper.sampler": choice("tpe", "random"),
    "hydra.sweeper.startup_trials": whole(0),
    "hydra.sweeper.seed": whole(0, 2**32 - 1),
}
ANSWER: dict[str, Kind] = {
    "checkpoint": ONE_PATH,
    "runs": ONE_PATH,
    "device": replace(NAME, swept=False),
}
SETTINGS: dict[str, dict[str, Kind]] = {
    "train": {**DATA, **MODEL, **RUN, **SWEEPER},
    "predict": {
        **ANSWER,
        "k": whole(0),
        "num_sentences": whole(0),
        "temperature": number(0),
        "top_p": SHARE,
        "max_tokens": SIZE,
        "seed": whole(-(2**63), 2**63 - 1),
        "format": choice("text", "json", "web"),
        "port": whole(0, 65535),
    },
    "eval": {
        **ANSWER,
        "data.paths": maybe(PATHS),
        "format": choice("text", "json"),
        "trust": replace(TEXTS, swept=False),
    },
    "prepare": {
        **DATA,
        "out": ONE_PATH,
        "tokenizer_chars": SIZE,
        "executor.workers": maybe(SIZE),
        "executor.folder": ONE_PATH,
        "executor.timeout_min": SIZE,
        "executor.mem_gb": SIZE,
        "executor.partition": maybe(NAME),
        "executor.account": maybe(NAME),
        "executor.cluster": choice("slurm", "local"),
        "executor.address": maybe(NAME),
    },
    "inspect": {**ANSWER, "layer": SIZE, "k": whole(1, MAX_CANDIDATES), "output": ONE_PATH},
    "memory": {
        **DATA,
        "layer_types": some_of("gru", "gru_reset_before", "lstm", "rnn"),
        "tasks": some_of("copy", "adding", "text"),
        "delays": numbers(whole(3)),
        "steps": numbers(SIZE),
        "text_steps": SIZE,
        "hidden_size": SIZE,
        "embedding_size": SIZE,
        "batch_size": SIZE,
        "learning_rate": number(0, above=0),
        "seed": whole(0, 2**32 - 4),  # validation and probe use higher seeds
        "workers": maybe(SIZE),
        "run_dir": ONE_PATH,
    },
}
# Groups that every run needs, and settings among them.
NEEDED = {
    "train": (*("data", "tokenizer", "model", "model.layer_type", "optimizer", "scheduler"),
              *("trainer", "callbacks", "logger", "seed", "run_dir", "compile", "rank_timeout")),
    "memory": ("data", "tokenizer"),
    "prepare": ("data", "tokenizer", "executor", "out", "tokenizer_chars"),
}  # fmt: skip


def kind_of_text(key: str) -> Kind | None:
    """The kind of a setting that is text in any command; None for all others."""
    kinds = (settings[key] for settings in SETTINGS.values() if key in settings)
    return next((kind for kind in kinds if kind.text), None)


def check(config: DictConfig, command: str = "train") -> None:
    """Raises if a setting of a config has the wrong type or is out of range.

    Args:
        config: composed from `conf/{command}.yaml`. Values are converted for the program: one path
            for a list of paths becomes a list of one.
        command: a key of `SETTINGS`.

    Raises:
        SettingsError: the first such setting.
    """
    settings = SETTINGS[command]
    _rename_former_keys(config)
    for key in NEEDED.get(command, settings):
        above, _, name = key.rpartition(".")
        node = _section(config, above)
        group = key not in settings
        if node is not None and not group and OmegaConf.is_missing(node, name):
            continue  # it is named below
        if node is None or name not in node or (group and node.get(name) is None):
            raise SettingsError(f"{key} cannot be left out")
    for key, kind in settings.items():
        above, _, name = key.rpartition(".")
        node = _section(config, above)
        if node is None or not (name in node or OmegaConf.is_missing(node, name)):
            continue
        if above.startswith("hydra") and OmegaConf.is_interpolation(node, name):
            continue  # for example of the number of a job that does not run yet
        try:
            if OmegaConf.is_missing(node, name):
                raise SettingsError(f"{key} must be given: {kind.expected}")
            value = node[name]
        except OmegaConfBaseException as error:
            raise SettingsError(f"{key} cannot be read: {str(error).splitlines()[0]}") from None
        if isinstance(value, ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
        read = kind.read(key, value)
        if read != value or type(read) is not type(value):
            node[name] = read


def _rename_former_keys(config: DictConfig) -> None:
    """Moves values that configs of the user's own set under former names."""
    for former in KEYS:
        above, _, name = former.rpartition(".")
        node = _section(config, above)
        if node is None or name not in node:
            continue
        value = node[name]
        with open_dict(node):
            del node[name]
            present = present_key(former).rpartition(".")[2]
            merge = isinstance(value, DictConfig) and isinstance(node.get(present), DictConfig)
            node[present] = OmegaConf.merge(node[present], value) if merge else value


def _section(config: DictConfig, path: str) -> DictConfig | None:
    """The part of a config with that path; None where it is left out.

    Raises:
        SettingsError: a value stands in its place.
    """
    node: Any = config
    for depth, name in enumerate(path.split(".") if path else (), 1):
        node = node.get(name)
        if node is None:
            return None
        if not isinstance(node, DictConfig):
            value = OmegaConf.to_container(node) if isinstance(node, ListConfig) else node
            here = ".".join(path.split(".")[:depth])
            group = here.replace(".", "/")
            raise SettingsError(
                f"{here} has settings of its own and cannot be {shown(value)}; set one of those "
                f"({here}.NAME=...), or choose a file of conf/{group} ({group}=NAME)"
            )
    return node
