"""What users type on the command line, made fit for Hydra's grammar.

Hydra reads values in a grammar of its own, in which `To be, or not` is a list of two and no word
may hold a Chinese character unless it is quoted. A shell takes quotes away, so they are set here.
"""

import re
import sys

# What a user means as it stands, to its end.
VERBATIM = ("prompt",)

_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_WORD = r"""[^\s,=:()\[\]{}'"]+"""
_PART = re.compile(f"{_QUOTED}|{_WORD}")


def quoted(argument: str) -> str:
    """One argument `key=value` with quotes where Hydra needs them.

    The whole value of a key in `VERBATIM` is quoted; elsewhere every word with a character beyond
    ASCII that is not quoted yet.
    """
    key, equals, value = argument.partition("=")
    if not equals or value in ("", "null"):
        return argument
    if key in VERBATIM:
        return f"{key}={_quote(value)}"
    return f"{key}={_PART.sub(lambda part: _quote_beyond_ascii(part[0]), value)}"


def quote_arguments() -> None:
    """Apply `quoted` to the arguments of this process, before Hydra reads them."""
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]


def _quote_beyond_ascii(part: str) -> str:
    return part if part.isascii() or part[0] in "'\"" else _quote(part)


def _quote(text: str) -> str:
    # In Hydra's grammar a backslash is one as long as no quote follows it.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
