"""Where shards are: a folder on this machine, or any URL that fsspec can open."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from lightning_module.errors import DataError

# Names of query parameters that let in whoever has the URL.
_SECRET = re.compile(r"[?&][^=&]*(sig|signature|token|key|secret|password|credential)[^=&]*=", re.I)


def open_store(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path there.

    Credentials are fsspec's: in the environment, or in its configuration files
    (https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration). A URL that
    contains some is refused, as `config.yaml` and messages would show them.

    Raises:
        DataError: It has credentials, or is of a kind that cannot be opened here.
    """
    shown = without_secrets(url)
    if shown != url:
        raise DataError(
            f"{shown} was given with a password or a signature, which would be written into "
            "config.yaml and messages. Give the URL without it, and the credentials to fsspec: in "
            "the environment (AWS_ACCESS_KEY_ID and such) or in ~/.config/fsspec/conf.json."
        )
    try:
        return url_to_fs(os.path.expanduser(url))
    except ImportError as error:
        raise DataError(
            f"{url} needs a package: {error} (s3:// comes with pip install 'triton-gru[shards]')"
        ) from error
    except ValueError as error:
        raise DataError(f"{url} cannot be opened: {error}") from error


def without_secrets(url: str) -> str:
    """A URL without user name, password and signature."""
    parts = urlsplit(url)
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        url = url.replace(parts.netloc, host, 1)
    found = _SECRET.search(url)
    return url[: url.index("?")] if found else url


def is_of_store(error: BaseException) -> bool:
    """Whether the system or a library of a store raised it: botocore, aiohttp, google and others.

    They have no common class; errors of this project, of Python's own and of the libraries that
    compute are faults of another kind.
    """
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in (
        *("builtins", "lightning_module", "triton_gru", "concurrent", "multiprocessing", "pickle"),
        *("_pickle", "cloudpickle", "numpy", "torch", "tokenizers", "ray", "submitit"),
    )
