"""Former names of modules, which scripts and pickles of earlier versions still import.

This finder runs only for a module of this package that no file provides, so other imports are
unaffected. Names in the configs of runs are translated in `settings/former_names.py`, from the same
table.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "averaging": "callbacks.averaging",
    "corpora": "data.corpora",
    "guards": "callbacks.stopping",
    "inspection": "inspect.inspection",
    "metrics_log": "loggers.metrics_csv",
    "overrides": "settings.overrides",
    "predictor": "model",
    "progress": "callbacks.progress",
    "reports": "callbacks.reports",
    "slowdown": "callbacks.slowdown",
    "sweep_report": "sweeps.report",
    "token_cache": "data.token_cache",
    "tokenizers": "data.tokenizers",
    "trackers": "loggers.trackers",
    "use_triton_gru": "callbacks.use_triton_gru",
}


class _FormerModules(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        package, _, name = module.__name__.partition(".")
        present = f"{package}.{MODULES[name]}"
        warnings.warn(f"{module.__name__} is called {present} now", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(present)  # the import returns it


def find_former_modules() -> None:
    """Adds the finder after all others."""
    sys.meta_path.append(_FormerModules())
