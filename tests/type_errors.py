"""Checks the types of both packages: python -m tests.type_errors, or make types

mypy sees every module. Those of `ignore_errors` in pyproject.toml may have errors, as they are not
typed throughout yet; all others may not. A module of that list without errors has to leave it, and
the list may not be longer than `MOST_UNCHECKED`: lower it with every module that leaves.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_UNCHECKED = 2
ERROR = re.compile(r"(.+\.py):\d+: error: .+")


def complaints(output: str, unchecked: list[str]) -> list[str]:
    """What is wrong, from mypy's output for all modules."""
    errors = defaultdict(list)
    for line in output.splitlines():
        if found := ERROR.match(line):
            module = found[1].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            errors[module].append(line)
    wrong = [line for module in errors if module not in unchecked for line in errors[module]]
    wrong += [
        f"{module} has no type errors (any more): take it out of the list in pyproject.toml, and "
        "lower MOST_UNCHECKED"
        for module in unchecked
        if module not in errors
    ]
    if len(unchecked) > MOST_UNCHECKED:
        wrong.append(f"{len(unchecked)} modules are unchecked, {MOST_UNCHECKED} may be")
    return wrong


def main() -> None:
    """Runs mypy on all modules; exits with 1 and what is wrong."""
    try:
        import tomllib
    except ImportError:  # Python 3.10, for which mypy brings it
        import tomli as tomllib
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    unchecked = [m for o in settings["overrides"] if o.get("ignore_errors") for m in o["module"]]
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as config:
        config.write("[mypy]\nignore_missing_imports = True\n")
        config.flush()
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", config.name, "--no-error-summary"]
            + [f"--package={package}" for package in settings["packages"]],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    if wrong := complaints(done.stdout, unchecked):
        sys.exit("\n".join(wrong))
    print(f"No type errors; {len(unchecked)} modules are not checked yet.")


if __name__ == "__main__":
    main()
