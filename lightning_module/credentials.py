"""Credentials that must not reach messages or files: in URLs, and in the errors of stores.

It imports no torch and no fsspec: a command can refuse its arguments at once.
"""

import os
import re
import sys
from typing import Any

# Names of query parameters that let in whoever has the URL.
_SECRET = re.compile(
    r"\?(.*&)?[^=&]*(sig|signature|token|key|secret|password|credential)[^=&]*=", re.I
)
# Of a URL, or of a part of a chain of them (simplecache::https://...). A user name alone is an
# account (abfs, ssh), but a token over http.
_USER = re.compile(r"(\w*)://([^/?#]*)@")
# Names of variables and settings with credentials.
_NAMES = re.compile(r"key|token|secret|passw|credential|sas|signature|connection_string", re.I)


def without_secrets(url: str) -> str:
    """A URL without user name, password and signature; the same if it has none that are secret."""

    def bare(found: re.Match) -> str:
        secret = ":" in found[2] or found[1].lower() in ("http", "https")
        return f"{found[1]}://" if secret else found[0]

    url = _USER.sub(bare, url)
    return url[: url.index("?")] if _SECRET.search(url) else url


def refusal(url: str) -> str | None:
    """Why a URL with credentials is refused; None if it has none."""
    shown = without_secrets(url)
    if shown == url:
        return None
    return (
        f"{shown} was given with a password or a signature, which would be written into "
        "config.yaml and messages. Give the URL without it, and the credentials to fsspec: in the "
        "environment (AWS_ACCESS_KEY_ID and such) or in ~/.config/fsspec/conf.json."
    )


def without_credentials(error: BaseException) -> str:
    """The text of an error of a store in one line, without what may be secret in it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    named: dict[str, Any] = {**os.environ}
    if "fsspec.config" in sys.modules:
        named |= _leaves(sys.modules["fsspec.config"].conf)
    for name, value in named.items():
        if _NAMES.search(name) and len(str(value)) >= 4:
            text = text.replace(str(value), "***")
    text = re.sub(r"(://)[^/\s@]+@", r"\1***@", text)
    text = re.sub(r"\?[^\s'\")>,]+", "?***", text)  # signatures and tokens of URLs
    return text if len(text) <= 300 else text[:300] + "..."


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _leaves(item, f"{name} {key}")
    return found
