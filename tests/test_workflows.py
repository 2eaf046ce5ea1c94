"""The files in .github name what exists: make targets, scripts, branches, jobs."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which the extra [docs] brings")

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = [path for path in FILES if path.parent.name == "workflows"]
FORMS = [p for p in FILES if p.parent.name == "ISSUE_TEMPLATE" and p.name != "config.yml"]


def names(paths):
    return [path.name for path in paths]


def test_the_files_are_found():
    assert len(WORKFLOWS) >= 3 and len(FORMS) >= 3


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_each_file_is_a_mapping(path):
    assert isinstance(yaml.safe_load(path.read_text("utf-8")), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=names(WORKFLOWS))
def test_jobs_call_existing_targets(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 180
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            command = step.get("run", "")
            assert set(re.findall(r"\bmake (\w+)", command)) <= set(targets), command
            named = re.findall(r"(?<![\w/.-])(?:\.ci|tests|examples|triton_gru)/[\w./]+", command)
            assert all((ROOT / name).exists() for name in named), command


@pytest.mark.parametrize("path", FORMS, ids=names(FORMS))
def test_forms_have_the_fields_that_github_requires(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    assert form["name"] and form["description"]
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    assert all(element["attributes"]["label"] for element in fields)
    ids = [element["id"] for element in fields]
    assert len(set(ids)) == len(ids)
    assert any(element.get("validations", {}).get("required") for element in fields)
