"""The version, which pyproject.toml and the commands' --version read from this file."""

__version__ = "0.1.0"
