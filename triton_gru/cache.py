"""Where this project keeps files between runs."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$TRITON_GRU_CACHE, or ~/.cache/triton_gru. It need not exist."""
    return Path(os.environ.get("TRITON_GRU_CACHE") or "~/.cache/triton_gru").expanduser()
