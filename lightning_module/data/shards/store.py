"""Where shards are: a folder on this machine, or any URL that fsspec can open."""

from __future__ import annotations

import logging
import os

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from lightning_module.credentials import refusal
from lightning_module.errors import DataError


def open_store(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path there.

    Credentials are fsspec's: in the environment, or in its configuration files
    (https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration). A URL that
    contains some is refused, as `config.yaml` and messages would show them.

    Raises:
        DataError: It has credentials, or is of a kind that cannot be opened here.
    """
    if reason := refusal(url):
        raise DataError(reason)
    for name in ("botocore", "aiobotocore"):  # which tell where they found credentials
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return url_to_fs(os.path.expanduser(url))
    except ImportError as error:
        raise DataError(
            f"{url} needs a package: {error} (s3:// comes with pip install 'triton-gru[shards]')"
        ) from error
    except ValueError as error:
        raise DataError(f"{url} cannot be opened: {error}") from error


def is_of_store(error: BaseException) -> bool:
    """Whether the system or a library of a store raised it: botocore, aiohttp, google and others.

    They have no common class; errors of this project, of Python's own and of the libraries that
    compute are faults of another kind.
    """
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in (
        *("builtins", "lightning_module", "triton_gru", "concurrent", "multiprocessing", "pickle"),
        *("_pickle", "cloudpickle", "numpy", "torch", "tokenizers", "ray", "submitit"),
    )
