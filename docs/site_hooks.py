"""What mkdocs does to the pages beside Markdown.

Formulas become MathML, which browsers draw without a script, so that the site loads nothing from
elsewhere. Links out of docs/, which work where the repository is browsed, become plain text here.
A page under docs/zh speaks Chinese all over, and each page leads to itself in the other language.
Chinese words are found although no space divides them.
"""

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# A font's prime is high and small already; as an exponent it would be a speck.
_PRIME = '<mo lspace="0" rspace="0">&#x02032;</mo>'
_PRIMES = [
    (re.compile(r"<msup>(<mi>\w</mi>)<mi>&#x02032;</mi></msup>"), rf"<mrow>\1{_PRIME}</mrow>"),
    (
        re.compile(r"<msubsup>((?:<mi>\w</mi>){2})<mi>&#x02032;</mi></msubsup>"),
        rf"<mrow><msub>\1</msub>{_PRIME}</mrow>",
    ),
]
# A line of Markdown that ends in Chinese goes on in the next one without a space.
_LINE_END = re.compile(
    r"(<pre.*?</pre>)|(?<=[，。；：、？！）」])\n *|(?<=[一-鿿])\n *(?=[一-鿿（「])", re.DOTALL
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside docs/ become their text and the file's path."""
    folder = posixpath.dirname(page.file.src_uri)

    def resolved(match: re.Match) -> str:
        text, target, _ = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return _LINK.sub(resolved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, and lines of Chinese become one."""

    def drawn(match: re.Match) -> str:
        tag, kind, formula = match.groups()
        display = "block" if kind == "[" else "inline"
        # The converter knows no environment `aligned`, which is what TeX wants inside $$.
        formula = html.unescape(formula).strip().replace("{aligned}", "{align*}")
        mathml = convert(formula.replace(r"\_", "_"), display=display)
        for set_above, set_beside in _PRIMES:
            mathml = set_above.sub(set_beside, mathml)
        return f'<{tag} class="formula">{mathml}</{tag}>'

    return _FORMULA.sub(drawn, _LINE_END.sub(lambda match: match[1] or "", content))


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> None:
    """The theme takes the page's language, and its selector leads to the page in the other one."""
    urls = {each.file.src_uri: each.url for each in nav.pages}
    source = page.file.src_uri
    config.theme["language"] = "zh" if source.startswith("zh/") else "en"
    for alternate in config.extra["alternate"]:
        folder = "" if alternate["lang"] == "en" else "zh/"
        home = urls[folder + "index.md"]
        alternate["link"] = urls.get(folder + source.removeprefix("zh/"), home)
        if alternate["lang"] == config.theme["language"]:
            config.extra["homepage"] = home


def on_post_build(config: Any) -> None:
    """The search finds what words begin with, so Chinese text is indexed from each character on.

    Where a query begins with an indexed word the theme drops the rest of it. The underscore keeps
    the pieces from being such words.
    """
    path = Path(config.site_dir, "search", "search_index.json")
    index = json.loads(path.read_text("utf-8"))
    for entry in index["docs"]:
        runs = re.findall(r"[一-鿿]+", f"{entry['title']} {entry['text']}")
        entry["chinese"] = " ".join(f"{run[i:]}_" for run in runs for i in range(len(run)))
    path.write_text(json.dumps(index, ensure_ascii=False), "utf-8")
