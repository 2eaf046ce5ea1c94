"""What users type on the command line, made fit for Hydra's grammar.

Hydra reads values in a grammar of its own, in which `To be, or not` is a list of two and no word
may hold a Chinese character or a bracket unless it is quoted. A shell takes quotes away, so they
are set here.
"""

import re
import sys

# Their values are one path, whatever it holds.
PATHS = ("run_dir", "resume", "checkpoint", "runs", "output")

_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_ITEM = re.compile(rf"(?:{_QUOTED}|[^,'\"])+")
# What Hydra takes unquoted and a path may hold.
_PLAIN = re.compile(r"[\w\-./\\+$%*@?|~ ]*", re.ASCII)


def quoted(argument: str) -> str:
    """One argument `key=value` with quotes where Hydra needs them.

    Quoted are a path, the items of a list that are no plain words, and a single value with
    characters beyond ASCII. What holds an interpolation `${...}` stays as it is.
    """
    key, equals, value = argument.partition("=")
    if not equals or value in ("", "null") or "${" in value:
        return argument
    if value.startswith("[") and value.endswith("]") and key not in PATHS:
        if value.isascii() and set(value[1:-1]) & set("[{"):  # lists in lists are no paths
            return argument
        items = (_quote_item(item.strip()) for item in _ITEM.findall(value[1:-1]))
        return f"{key}=[{','.join(items)}]"
    if key in PATHS or not value.isascii():
        return f"{key}={_quote_item(value)}"
    return argument


def quote_arguments() -> None:
    """Apply `quoted` to the arguments of this process, before Hydra reads them."""
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]


def take_argument(key: str) -> str | None:
    """The value of `key=value` exactly as typed, taken out of Hydra's sight; None if not given."""
    given = [a for a in sys.argv[1:] if a.startswith(f"{key}=")]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in given]
    return given[-1].partition("=")[2] if given else None


def _quote_item(text: str) -> str:
    if re.fullmatch(_QUOTED, text) or _PLAIN.fullmatch(text):
        return text
    # In Hydra's grammar a backslash is one as long as no quote follows it.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
