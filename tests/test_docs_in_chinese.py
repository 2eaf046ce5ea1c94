"""docs/zh says what docs/ says: the same pages, sections, commands, links, code and figures."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGLISH_ONLY = {"api.md", "compatibility.md"}  # made from docstrings and from tests
PAGES = sorted({p.name for p in (ROOT / "docs").glob("*.md")} - ENGLISH_ONLY)

LANGUAGE_LINK = re.compile(r"^\[(?:English|中文)\]\(.*\)$", re.MULTILINE)
COMMENT = re.compile(r"(?:^|\s+)# .*")
LINK = re.compile(r"\]\(([^)]*)\)")
HEADING = re.compile(r"^(#+) ", re.MULTILINE)
FACT = re.compile(r"`[^`]+`|\\\(.*?\\\)|\$\$.*?\$\$|\d+(?:[.,]\d+)*", re.DOTALL)


def code_and_prose(page):
    """The lines of code without their comments, and everything else."""
    code, prose, fenced = [], [], False
    for line in LANGUAGE_LINK.sub("", page).splitlines():
        fence = line.startswith("```")
        if fence or fenced or line.startswith("    "):
            code.append(COMMENT.sub("", line))
        else:
            prose.append(line)
        fenced ^= fence
    return code, "\n".join(prose)


def links(prose):
    """Where links lead, without the folders in which the two languages differ."""
    return Counter(re.sub(r"^(\.\./|zh/)*", "", target) for target in LINK.findall(prose))


def sections(prose):
    """Each heading's level and words, and the code, formulas and numbers below it.

    Rows of tables have theirs in one order, sentences in that of their language.
    """
    first, *rest = HEADING.split(LINK.sub("]", prose))
    assert not first.strip(), "a page begins with its heading"
    for level, text in zip(rest[::2], rest[1::2], strict=True):
        rows = [FACT.findall(line) for line in text.splitlines() if line.startswith("|")]
        yield level, text.split("\n")[0], rows, Counter(FACT.findall(text))


@pytest.mark.parametrize("name", PAGES)
def test_a_chinese_page_matches_the_english_one(name):
    english, chinese = (
        code_and_prose((ROOT / "docs" / folder / name).read_text("utf-8")) for folder in ("", "zh")
    )
    assert chinese[0] == english[0], "lines of code"
    assert links(chinese[1]) == links(english[1])
    there, here = list(sections(english[1])), list(sections(chinese[1]))
    assert [level for level, *_ in here] == [level for level, *_ in there]
    for (_, title, rows, facts), (_, title_zh, rows_zh, facts_zh) in zip(there, here, strict=True):
        assert facts == facts_zh, (
            f"docs/{name}, {title!r}, alone has {dict(facts - facts_zh)}; "
            f"docs/zh/{name}, {title_zh!r}, alone has {dict(facts_zh - facts)}"
        )
        assert rows == rows_zh, f"rows of tables in {title!r}"


def test_the_navigation_is_the_same_in_both_languages():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:")[1]
    english = [n for n in re.findall(r"- (\w+\.md)$", nav, re.MULTILINE) if n not in ENGLISH_ONLY]
    chinese = re.findall(r"- zh/(\w+\.md)$", nav, re.MULTILINE)
    assert chinese == english
    assert sorted(english) == PAGES
    assert sorted(p.name for p in (ROOT / "docs" / "zh").glob("*.md")) == PAGES
