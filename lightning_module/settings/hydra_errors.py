"""Errors of Hydra and OmegaConf about a command line, in one line with the nearest valid name."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from lightning_module.settings.table import SETTINGS


def in_one_line(error: Exception, command: str, configs: Path) -> str:
    """An error in one line.

    Args:
        error: of Hydra or OmegaConf, in composing a config.
        command: a key of `SETTINGS`.
        configs: the folder of the configs.
    """
    message = str(error).strip()
    if isinstance(error, OverrideParseException):
        return _not_read(error)
    if isinstance(error, MissingConfigException):
        return _no_such_choice(message)
    unknown = re.match(r"Could not (?:override|delete(?: from config)?)[^']*'([^']*)'", message)
    if unknown:
        return no_setting(unknown[1], command, configs)
    if ambiguous := re.match(r"Ambiguous value for argument '([^=]*)=(.*)'", message):
        key, value = ambiguous.groups()
        return (
            f"{key}={value} is several values: for a list use brackets, {key}=[{value}]; "
            "to train with each of them add -m"
        )
    if message.startswith("Config group override must be a string or a list"):
        empty = [a for a in sys.argv[1:] if a.endswith("=null") and (configs / a[:-5]).is_dir()]
        if empty:
            group = empty[0][:-5]
            names = ", ".join(sorted(path.stem for path in (configs / group).glob("*.yaml")))
            return (
                f"{empty[0]}: {group} is a group of settings and cannot be left out; choose one "
                f"of {names}"
            )
    if isinstance(error, HydraException) and error.__cause__ is not None:
        cause = str(error.__cause__).splitlines()[0]
        message = f"{message.splitlines()[0]}: {cause}" if message else cause
    return " ".join(message.split())


def no_setting(key: str, command: str, configs: Path, known: Iterable[str] = ()) -> str:
    """The message that there is no such setting or group, with the valid ones.

    Args:
        key: as typed.
        command: a key of `SETTINGS`.
        configs: the folder of the configs.
        known: the valid settings; by default those of all choices of all groups.
    """
    groups = {p.parent.relative_to(configs).as_posix() for p in configs.glob("*/**/*.yaml")}
    known = {*SETTINGS[command], *groups, *known}
    elsewhere = _choices_with(key, configs)
    if elsewhere:
        return f"there is no setting {key} here: it is one of {' and '.join(elsewhere)}"
    nearest = difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.6)
    if nearest:
        return f"there is no setting {key}; did you mean {' or '.join(nearest)}?"
    command = f"triton-gru-{command} --help"
    return f"there is no setting {key}; {command} lists them, and +{key}=... adds one"


def _choices_with(key: str, configs: Path) -> list[str]:
    """The choices of a group that have a setting: data=text_files for data.paths."""
    found = []
    for path in sorted(configs.glob("*/**/*.yaml")):
        group = path.parent.relative_to(configs).as_posix()
        text = path.read_text("utf-8")
        stated = re.match(r"# @package (\S+)", text)
        package = stated[1] if stated else group.replace("/", ".")
        node = {} if package == "_global_" else yaml.safe_load(text)
        for name in key.removeprefix(f"{package}.").split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is not None and key.startswith(f"{package}."):
            found.append(f"{group}={path.stem}")
    return found


def _no_such_choice(message: str) -> str:
    missing = re.search(r"[Cc]ould not find '([^']*)'", message)
    if missing is None:
        return " ".join(message.split())
    group, _, name = missing[1].rpartition("/")
    options = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
    nearest = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean {group}={nearest[0]}? " if nearest else ""
    there = f"; {hint}There are {', '.join(options)}" if options else ""
    return f"there is no {group}={name}{there}" if group else f"there is no config {name}{there}"


def _not_read(error: OverrideParseException) -> str:
    typed = error.override
    if "=" not in typed and not typed.startswith("~"):
        return f"{typed!r} is not a setting: settings are KEY=VALUE, groups GROUP=NAME"
    reason = str(error).partition("\nSee https")[0]
    reason = " ".join(reason.removeprefix(f"Error parsing override '{typed}'").split())
    quotes = "; put a text with a quote into quotes of the other kind" * ("'" in typed)
    return f"{typed} cannot be read: {reason}{quotes}"
