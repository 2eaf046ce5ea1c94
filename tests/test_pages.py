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


def test_both_readmes_match():
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


# Files as pages name them: by path anywhere, or by name alone in backticks.
PATH = re.compile(
    r"(?<![\w/.-])((?:tests|benchmarks|triton_gru|lightning_module|conf|docs|examples)/"
    r"[\w./*-]*?(?:\.(?:py|c|sh|md|yaml|png)\b|/(?![\w.*-])))"
)
NAME = re.compile(r"`(\w+\.(?:py|c|sh))`")
MODULE = re.compile(r"python3? -m ((?:tests|benchmarks|lightning_module)[\w.]*)")


def test_the_patterns_find_what_pages_name():
    text = (
        "`tests/a.py` `b.py` pytest tests/c*.py, conf/data/; python -m tests.d not x.py nor a/docs/"
    )
    assert PATH.findall(text) == ["tests/a.py", "tests/c*.py", "conf/data/"]
    assert NAME.findall(text) == ["b.py"]
    assert MODULE.findall(text) == ["tests.d"]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_named_files_exist(page):
    """The changelog tells of files by the names that they had."""
    text = page.read_text("utf-8")
    folders = [ROOT / f for f in ("tests", "benchmarks", "triton_gru", "lightning_module", "docs")]
    missing = [path for path in PATH.findall(text) if not list(ROOT.glob(path.rstrip("/")))]
    missing += [n for n in NAME.findall(text) if not any(list(f.rglob(n)) for f in folders)]
    for module in MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            missing.append(module)
    assert not missing
