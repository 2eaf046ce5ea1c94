"""Quoting of command lines for Hydra's grammar.

That grammar has numbers, lists and functions, and its words may not contain Chinese characters,
quotes or brackets. So `To be, or not` is a list of two, `2024_01_02` the number 20240102 and
`三国.txt` an error, unless they are quoted, and a shell removes quotes. They are added here: around
the whole value if a setting is text (see `settings/table.py`), around single words otherwise. Fresh
runs, resumed runs and the jobs of a sweep all read the result of `quoted` with Hydra's parser.
"""

import re
import sys
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString

from lightning_module.settings.former_names import present_key
from lightning_module.settings.table import Kind, kind_of_text

_QUOTED = r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")"""
_INTERPOLATION = r"\$\{[^}]*\}"
# Words that Hydra reads as text.
_PLAIN = re.compile(r"(?!(?:true|false|null|inf|nan)$)[a-z_/][\w./-]*", re.ASCII | re.IGNORECASE)
_SETTING = re.compile(r"(?:[+\w][^=]*=|~).*", re.DOTALL)
_MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
# Hydra's functions whose result is swept over.
_SWEEP_FUNCTION = re.compile(r"(?:choice|shuffle|sort|tag|range|interval|glob)\(.*\)", re.DOTALL)
# Characters that no word of Hydra's grammar contains.
_FOREIGN = re.compile(r"[^\w/\-\\+.$%*@?|:=()\[\]{}, \t]|[^\x00-\x7f]", re.ASCII)
_WHOLE = re.compile(rf"{_QUOTED}(?=\s*(?:[,\]]|$))")
_UNDIVIDED = re.compile(_INTERPOLATION)
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")


def quoted(argument: str, multirun: bool = True) -> str:
    """One argument `key=value` with quotes where Hydra needs them.

    Args:
        argument: as typed, or a result of this function, which is then unchanged.
        multirun: whether commas outside of brackets separate values to sweep over. The few paths
            that no sweep varies (`run_dir`) are one text in any case.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or not value:
        return argument
    name = key.lstrip("+~")
    key = key.removesuffix(name) + present_key(name)
    kind = kind_of_text(name)
    if kind is None:
        return f"{key}={_quote_words(value)}"
    if not (multirun and kind.swept):
        return f"{key}={_quote_value(value, kind)}"
    if _SWEEP_FUNCTION.fullmatch(value):
        return f"{key}={_quote_words(value)}"
    return f"{key}={','.join(_quote_value(part, kind) for part in _split(value))}"


def quote_arguments() -> None:
    """Applies `quoted` to the arguments of this process, before Hydra reads them."""
    multirun = not _MULTIRUN.isdisjoint(sys.argv[1:])
    arguments = [quoted(argument, multirun) for argument in sys.argv[1:]]
    # argparse accepts no flags, such as -m, between settings.
    sys.argv[1:] = sorted(arguments, key=lambda a: bool(_SETTING.fullmatch(a)))


def parse(arguments: Iterable[str]) -> list[Override]:
    """Hydra's reading of arguments as typed for a single run, or as `quoted` returns them.

    Raises:
        HydraException: one of them is not a `key=value` of its grammar.
    """
    return OverridesParser.create().parse_overrides([quoted(a, multirun=False) for a in arguments])


def take_argument(key: str) -> str | None:
    """The value of `key=value` as typed, removed from Hydra's arguments; None if not given."""
    given = [a for a in sys.argv[1:] if a.startswith(f"{key}=")]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in given]
    return given[-1].partition("=")[2] if given else None


def take_changes() -> list[str]:
    """With `resume=`, removes the other settings from Hydra's arguments, as changes of the run.

    Hydra would set them in the config of a new run, which may have other keys.
    """
    arguments = sys.argv[1:]
    resumes = any(a.startswith("resume=") and a != "resume=null" for a in arguments)
    if not resumes or not _MULTIRUN.isdisjoint(arguments):
        return []
    others = re.compile(r"resume=|\+*hydra[./]")
    changes = [a for a in arguments if _SETTING.fullmatch(a) and not others.match(a)]
    sys.argv[1:] = [a for a in arguments if a not in changes]
    return changes


def _quote_value(value: str, kind: Kind) -> str:
    """A value of a setting that is text, or a list of texts."""
    if kind.null and value == "null":
        return value
    if kind.many and value.startswith("[") and value.endswith("]"):
        items = _split(value[1:-1]) if value[1:-1].strip() else []
        return f"[{','.join(_quote(item.strip()) for item in items)}]"
    return _quote(value)


def _quote(text: str) -> str:
    quote = text[:1]
    if _PLAIN.fullmatch(text) or (quote in ("'", '"') and len(text) > 1 and text.endswith(quote)):
        return text  # Hydra reports the error in 'the cat's'
    return QuotedString(text, Quote.single).with_quotes()


def _quote_words(value: str) -> str:
    """A value with quotes around each word that Hydra cannot read."""

    def quote_word(found: re.Match) -> str:
        parts = re.fullmatch(r"(\s*)(.*?)(\s*)", found[0], re.DOTALL)
        assert parts is not None  # the pattern matches every text
        before, word, after = parts.groups()
        if word.startswith(("'", '"')) or not _FOREIGN.search(re.sub(_INTERPOLATION, "", word)):
            return found[0]
        return before + _quote(_ESCAPED.sub(r"\1", word)) + after

    separators = r",\[\](){}" + ":" * value.startswith("{")
    word = rf"(?:{_INTERPOLATION}|\\.|[^{separators}])+"
    return re.sub(rf"\s*{_QUOTED}\s*(?=[{separators}]|$)|{word}", quote_word, value)


def _split(text: str) -> list[str]:
    """A text divided at its commas, except those within quotes, `${}` or brackets."""
    for nested in (True, False):  # an unclosed bracket is an ordinary character
        parts, depth, position = [""], 0, 0
        while position < len(text):
            begins = not parts[-1].strip("[ \t")  # a quote within a word is an apostrophe
            found = (_WHOLE.match(text, position) if begins else None) or _UNDIVIDED.match(
                text, position
            )
            piece = found[0] if found else text[position]
            position += len(piece)
            if nested:
                depth += {"[": 1, "]": -1}.get(piece, 0)
            if piece == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += piece
        if depth == 0:
            break
    return parts
