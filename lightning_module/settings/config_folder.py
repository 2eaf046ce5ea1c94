"""The folder of the configs: at the top of a checkout, inside the package in a wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# pyproject.toml puts them into the wheel.
CONFIGS = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())
