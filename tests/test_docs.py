import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs", reason="needs the extra [docs]; `make setup` installs it")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
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
