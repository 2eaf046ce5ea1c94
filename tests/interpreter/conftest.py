"""Collects nothing here unless the process is one for the interpreter (see __init__.py)."""

import os

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from tests.interpreter import harness

    harness.install()
else:
    collect_ignore_glob = ["test_*.py"]
