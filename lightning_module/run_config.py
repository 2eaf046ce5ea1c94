"""The `config.yaml` of a run that is resumed, read as data that may come from anyone.

Hydra imports and calls what a `_target_` names, so a run directory could run its author's code on
the machine that resumes it. Here a file may name exactly the targets of this project's own configs,
and those that the user trusts by name in the same command: `trust=[...]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader  # OmegaConf's YAML 1.2: no dates, 1e-3 is a number
from omegaconf.errors import OmegaConfBaseException

from lightning_module.errors import SettingsError
from lightning_module.settings.former_names import translate, translate_target
from lightning_module.settings.hydra_errors import in_one_line, no_setting
from lightning_module.settings.overrides import parse
from lightning_module.settings.table import NEEDED, check

_TRUST = "trust"


def read_config(file: Path) -> DictConfig:
    """The config that a run wrote; texts are literal, without interpolations.

    Raises:
        SettingsError: it is damaged or cannot be read.
    """
    try:
        config = from_yaml(file.read_bytes().decode())
    except UnicodeDecodeError:
        raise _damaged(file, "is not UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise _damaged(file, f"is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, DictConfig):
        raise _damaged(file, "is empty" if config is None else "is not a mapping")
    try:
        missing = [key for key in NEEDED["train"] if OmegaConf.select(config, key) is None]
    except OmegaConfBaseException as error:
        raise _damaged(file, str(error).splitlines()[0]) from None
    if missing:
        raise _damaged(file, f"lacks {', '.join(missing)}")
    config.pop(_TRUST, None)  # trust is not kept: the resuming command must state it
    return config


def from_yaml(text: str) -> Any:
    """The value that `OmegaConf.to_yaml(config, resolve=True)` wrote; texts are literal.

    Former names of earlier versions are replaced by the present ones.
    """
    content = _literal(translate(yaml.load(text, Loader=get_yaml_loader())))
    return OmegaConf.create(content) if isinstance(content, dict) else content


def change(config: DictConfig, changes: Iterable[str], file: Path, configs: list[Path]) -> None:
    """Sets single values of a run's config, and refuses a config that names foreign code.

    Args:
        config: as `read_config` returns it.
        changes: `key=value` as typed. Targets named here are the user's choice and allowed.
        file: file of the config.
        configs: the folders of configs that this command reads; their targets are trusted.

    Raises:
        SettingsError: a change that a resumed run cannot take, an invalid value, or a target that
            is not trusted.
    """
    trusted: list[str] = []
    try:
        overrides = parse(changes)
    except HydraException as error:
        raise SettingsError(in_one_line(error, "train", configs[0])) from None
    for override in overrides:
        key, typed = override.key_or_group, override.input_line
        if override.is_sweep_override():
            raise SettingsError(f"{typed}: resume= resumes a single run; give one value")
        if key == "run_dir":
            raise SettingsError(
                "run_dir= does not go with resume=: copy the run and resume the copy"
            )
        if key == _TRUST:
            value: Any = override.value()
            trusted += [value] if isinstance(value, str) else value or []
            continue
        present = OmegaConf.select(config, key, default=override)
        group = any((folder / key.replace(".", "/")).is_dir() for folder in configs)
        if "/" in key or group or override.is_delete() or isinstance(present, DictConfig):
            raise SettingsError(
                f"{typed} cannot be changed in a resumed run: with resume= only single "
                f"values of its {file} can, such as trainer.max_steps=5000"
            )
        if present is override and not (override.is_add() or override.is_force_add()):
            known = [".".join(path) for path, _ in _leaves(OmegaConf.to_container(config))]
            raise SettingsError(no_setting(key, "train", configs[0], known))
        value = override.value()
        named = {key.rpartition(".")[2]: value}
        trusted += [str(v) for path, v in _leaves(named) if path[-1] == "_target_"]
        OmegaConf.update(config, key, value, force_add=True)
    _check_targets(config, trusted, file, configs)
    try:
        check(config)
    except SettingsError as error:
        raise SettingsError(f"{error} (resuming {file})") from None


def _check_targets(config: DictConfig, trusted: list[str], file: Path, configs: list[Path]) -> None:
    own = {translate_target(target) for folder in configs for target in targets(folder)}
    trusted = [translate_target(target) for target in trusted]
    for path, value in _leaves(OmegaConf.to_container(config, resolve=True)):
        if path[-1] != "_target_" or value in own:
            continue
        if not any(value == t or str(value).startswith(f"{t}.") for t in trusted if t):
            raise SettingsError(
                f"{file} names {'.'.join(path)}={value}, which is not this project's: resuming "
                "the run would run that code. If you trust it, name it, or its package, in the "
                f"command: {_TRUST}=[{value}]"
            )


def targets(folder: Path) -> set[str]:
    """Every `_target_` of the configs in a folder."""
    pattern = re.compile(r"^[^#\n]*\b_target_:\s*[\"']?([\w.]+)", re.MULTILINE)
    return {t for file in folder.rglob("*.yaml") for t in pattern.findall(file.read_text("utf-8"))}


def _damaged(file: Path, how: str) -> SettingsError:
    return SettingsError(
        f"{file} is damaged: it {how}. The run cannot be resumed without it; its checkpoints can "
        "still be used (triton-gru-predict checkpoint=...)"
    )


def _literal(value: Any) -> Any:
    r"""A value whose texts OmegaConf reads literally: `${` is written as `\${`."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values of nested mappings and lists, with the keys of each."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, str(number)))
    else:
        yield path, value
