"""Former names of settings in runs of earlier versions, and their present names.

Targets are translated when the config of a run is read, before they are compared with the trusted
ones. Keys are translated there too and, with a warning, on the command line and in the user's own
configs.
"""

import re
import sys
from typing import Any

from lightning_module.former_modules import MODULES

# The modules of `_target_`, longest first: two that were divided or became packages, and the rest.
_MODULES = {
    "guards.LastCheckpoint": "callbacks.last_checkpoint.LastCheckpoint",
    "data": "data.datamodule",
    **MODULES,
}
# Up to the class or function: `data.SentenceDataModule`, not `data.datamodule.SentenceDataModule`.
_TARGET = re.compile(rf"lightning_module\.({'|'.join(_MODULES)})(\.[A-Za-z]\w*)?")


KEYS = {
    "data.lanes": "data.batch_size",
    "data.val_lanes": "data.val_batch_size",
    "lanes": "batch_size",  # of triton-gru-memory
    "cores": "layer_types",  # likewise
    "model.core": "model.layer_type",
    "model/core": "model/layer_type",
}


def translate(config: Any) -> Any:
    """The config of a run, from its file, with present names for former ones."""
    config = _with_present_targets(config)
    data = config.get("data") if isinstance(config, dict) else None
    if isinstance(data, dict):
        for former, present in (("lanes", "batch_size"), ("val_lanes", "val_batch_size")):
            if former in data:
                data.setdefault(present, data.pop(former))
    model = config.get("model") if isinstance(config, dict) else None
    if isinstance(model, dict):  # before Hydra built it
        if "core" in model:
            model.setdefault("layer_type", model.pop("core"))
        model.setdefault("_target_", "lightning_module.model.SentencePredictor")
        model.setdefault("_convert_", "all")
    return config


def translate_target(name: Any) -> Any:
    """The present name of a function or class; unchanged if it was never renamed."""
    former = _TARGET.fullmatch(name) if isinstance(name, str) else None
    if former is None:
        return name
    return f"lightning_module.{_MODULES[former[1]]}{former[2] or ''}"


def _with_present_targets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: translate_target(item) if key == "_target_" else _with_present_targets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_present_targets(item) for item in value]
    return value


def present_key(key: str) -> str:
    """The present name of a setting; warns on standard error if the key is a former one."""
    section, dot, name = key.rpartition(".")
    if section in KEYS:  # model.core.name
        return f"{present_key(section)}{dot}{name}"
    present = KEYS.get(key)
    if present is None:
        return key
    print(f"warning: {key} is called {present} now", file=sys.stderr)
    return present
