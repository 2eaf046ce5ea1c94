"""Kinds of settings: a number in a range, one of a few words, text, a path, a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightning_module.errors import SettingsError


@dataclass(frozen=True)
class Kind:
    """The valid values of a setting.

    Attributes:
        expected: description, after "must be".
        holds: whether a value, other than null, is valid.
        null: whether null is valid.
        text: whether it is always text: `2024` is then not a number.
        many: whether it is a list of texts.
        swept: whether commas between texts separate values to sweep over.
    """

    expected: str
    holds: Callable[[Any], bool]
    null: bool = False
    text: bool = False
    many: bool = False
    swept: bool = True

    def read(self, key: str, value: Any) -> Any:
        """The value as the program uses it.

        Raises:
            SettingsError: it is of another type or out of range.
        """
        if value is None and self.null:
            return None
        if self.many and isinstance(value, str) and value:
            value = [value]
        if isinstance(value, float) and value.is_integer() and not self.holds(value):
            value = int(value)  # 1e4
        if value is None or not self.holds(value):
            raise SettingsError(f"{key} must be {self.expected}; got {shown(value)}")
        return value


def _bounds(least: float, most: float) -> str:
    return f"from {least} to {most}" if most < math.inf else f"of at least {least}"


def shown(value: Any) -> str:
    """A value as it is typed, at most one line."""
    if isinstance(value, str):
        text = repr(value)
    else:
        text = (
            json.dumps(value, ensure_ascii=False, default=str)
            .replace("NaN", "nan")
            .replace("Infinity", "inf")
        )
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text):,} characters)"


def whole(least: int, most: float = math.inf) -> Kind:
    """A whole number."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Kind("a whole number " + _bounds(least, most), holds)


def number(
    least: float, most: float = math.inf, *, above: float | None = None, below: float | None = None
) -> Kind:
    """A finite number from `least` to `most`; `above` and `below` are exclusive bounds."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and least <= value <= most
            and (above is None or value > above)
            and (below is None or value < below)
        )

    if above is not None and below is not None:
        return Kind(f"a number between {above} and {below}", holds)
    if above is not None:
        return Kind(f"a number above {above}", holds)
    if below is not None:
        return Kind(f"a number of at least {least} and below {below}", holds)
    return Kind("a number " + _bounds(least, most), holds)


def choice(*values: Any) -> Kind:
    """One of a few values."""
    words = [value if isinstance(value, str) else shown(value) for value in values]
    expected = f"{', '.join(words[:-1])} or {words[-1]}"
    # True == 1, but true is no number.
    return Kind(expected, lambda value: any(value == v and type(value) is type(v) for v in values))


def either(one: Kind, other: Kind) -> Kind:
    """One of two kinds."""
    return Kind(
        f"{one.expected}, or {other.expected}",
        lambda value: one.holds(value) or other.holds(value),
    )


def maybe(kind: Kind) -> Kind:
    """A kind, or null."""
    return replace(kind, expected=f"{kind.expected}, or null", null=True)


def pair(kind: Kind) -> Kind:
    """A list of two."""
    return Kind(
        f"a list of two, each {kind.expected}",
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(kind.holds, value)),
    )


def numbers(kind: Kind) -> Kind:
    """A list of numbers."""
    return Kind(
        f"a list, each {kind.expected}",
        lambda value: isinstance(value, list) and bool(value) and all(map(kind.holds, value)),
    )


def some_of(*values: str) -> Kind:
    """A list of some of a few words."""
    return Kind(
        f"a list of some of {', '.join(values)}",
        lambda value: isinstance(value, list) and bool(value) and all(v in values for v in value),
    )


def _is_path(value: Any) -> bool:
    """Whether a file system can have it: names of 255 bytes, 4095 in all, no NUL."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    encoded = os.fsencode(value)
    return len(encoded) < 4096 and max(map(len, encoded.split(b"/"))) <= 255


def _is_time(value: Any) -> bool:
    parts = re.fullmatch(r"(\d{1,5}):(\d\d):(\d\d):(\d\d)", str(value))
    return isinstance(value, str) and parts is not None and any(map(int, parts.groups()))


FLAG = choice(True, False)
TEXT = Kind("text", lambda value: isinstance(value, str), text=True)
NAME = Kind("text", lambda value: isinstance(value, str) and bool(value), text=True)
PATH = Kind("a path, its names at most 255 bytes long", _is_path, text=True)
ONE_PATH = replace(PATH, swept=False)
TEXTS = Kind(
    "a list of texts, as in [one,two]",
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    text=True,
    many=True,
)
PATHS = Kind(
    "a list of files and globs, as in [a.txt,b/*.txt], their names at most 255 bytes long",
    lambda value: isinstance(value, list) and all(map(_is_path, value)),
    text=True,
    many=True,
)
# One with credentials is refused by `open_store`, before anything is written.
URL = replace(NAME, expected="a folder or a URL", swept=False)
TIME = Kind("a time as days:hours:minutes:seconds, as in 00:00:10:00 for ten minutes", _is_time)
DROPOUT = number(0, below=1)
SHARE = number(0, 1)
SIZE = whole(1)
SHARE_OR_COUNT = either(
    Kind("a share from 0.0 to 1.0", lambda v: isinstance(v, float) and 0 <= v <= 1), whole(0)
)
SOME_OR_COUNT = either(
    Kind("a share above 0.0 and up to 1.0", lambda v: isinstance(v, float) and 0 < v <= 1), SIZE
)
WORD = Kind("a word", lambda value: isinstance(value, str | int) and not isinstance(value, bool))
# Valid devices depend on the machine: `ranks.World` checks them.
DEVICES = Kind(
    "auto, a number of devices or a list of them", lambda v: isinstance(v, str | int | list)
)
PRECISIONS = (
    *("16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16", "16", "32", "64", "bf16", 16, 32, 64),
)
