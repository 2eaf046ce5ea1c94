import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs", reason="needs the extra [docs]; `make setup` installs it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def site(folder):
    return {str(p.relative_to(folder)): p.read_text("utf-8") for p in folder.rglob("*.html")}


@pytest.mark.slow
def test_formulas_are_drawn_and_nothing_is_loaded_from_elsewhere(site):
    for name in ("formulas.html", "zh/formulas.html"):
        assert site[name].count("<math") > 20
    for name, page in site.items():
        assert not re.findall(r'class="arithmatex"|\\begin|\\text\{', page), name
        loaded = re.findall(
            r'<(?:script|img|link rel="(?:stylesheet|icon)")[^>]*?(https?:[^"]+)', page
        )
        assert not loaded, name


@pytest.mark.slow
def test_links_out_of_the_site_are_text(site):
    for name, page in site.items():
        targets = re.findall(r'href="([^"#:]+)"', page)
        outside = [t for t in targets if t.startswith("../" * (name.count("/") + 1))]
        assert not outside, name


@pytest.mark.slow
def test_each_page_has_its_language_and_links_to_its_translation(site):
    for name, page in site.items():
        if name == "404.html":
            continue
        language, other = ("zh", "en") if name.startswith("zh/") else ("en", "zh")
        there = name.removeprefix("zh/") if other == "en" else f"zh/{name}"
        assert f'<html lang="{language}"' in page, name
        selector = re.findall(r'<a href="([^"]+)" hreflang="(\w+)"', page)
        leads = {lang: posixpath.join(posixpath.dirname(name), href) for href, lang in selector}
        leads = {lang: posixpath.normpath(target) for lang, target in leads.items()}
        assert leads == {language: name, other: there if there in site else "zh/index.html"}


@pytest.mark.slow
def test_a_chinese_word_is_indexed_at_every_position(folder):
    entries = json.loads((folder / "search" / "search_index.json").read_text("utf-8"))["docs"]
    word = "检查点"
    holding = [e for e in entries if word in e["title"] + e["text"]]
    assert len(holding) > 5
    for entry in holding:
        begins = [w for w in entry["chinese"].split() if w.startswith(word)]
        assert begins and word not in begins, entry["location"]
