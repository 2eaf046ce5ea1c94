"""The pages of the repository: links lead somewhere, the README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    text = re.sub(r"`[^`]*`", "", page.read_text("utf-8"))  # code has brackets of its own
    for found in LINK.finditer(text):
        target = (found[1] or found[2]).split("#")[0]
        # ../../actions is GitHub's page of the workflows, beside the repository's files.
        if target and not re.match(r"https?:|\.\./\.\./actions/", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readme_is_short_and_begins_with_a_picture(readme):
    lines = (ROOT / readme).read_text("utf-8").splitlines()
    assert len(lines) <= 120
    assert any(line.startswith("<img ") for line in lines[:24])


def test_both_readmes_say_the_same():
    english, chinese = (
        (ROOT / readme).read_text("utf-8") for readme in ("README.md", "README.zh.md")
    )
    code = [re.sub(r"\s*# .*", "", text) for text in (english, chinese)]
    fenced = [re.findall(r"^```.*?^```$", text, re.DOTALL | re.MULTILINE) for text in code]
    assert fenced[0] == fenced[1]
    links = [
        sorted(re.findall(r"\]\((?:docs/)?(?:zh/)?([\w./]+)\)", t)) for t in (english, chinese)
    ]
    assert [link for link in links[0] if link != "README.zh.md"] == [
        link for link in links[1] if link != "README.md"
    ]
    commands = [re.findall(r"`(python -m [^`]+)`", text) for text in (english, chinese)]
    assert commands[0] == commands[1] != []


def test_ratios_of_the_readme_are_those_of_the_page_on_the_layer():
    readme, page = (
        (ROOT / name).read_text("utf-8").split("\n## ") for name in ("README.md", "docs/layer.md")
    )
    (benchmark,) = (section for section in readme if section.startswith("Benchmark"))
    (times,) = (section for section in page if section.startswith("Time on a CPU"))
    ratios = re.findall(r"\b\d\.\d+\b", benchmark)
    assert len(ratios) >= 9
    assert set(ratios) <= set(re.findall(r"\b\d\.\d+\b", times))
