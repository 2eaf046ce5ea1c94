"""What `make types` says of mypy's output."""

from tests import type_errors

OUTPUT = """\
package/good.py:3: note: not an error
package/unchecked.py:5: error: Name "x" is not defined  [name-defined]
package/typed/__init__.py:7: error: Missing  [attr-defined]
"""


def test_errors_of_checked_modules_alone_are_shown(monkeypatch):
    monkeypatch.setattr(type_errors, "MOST_UNCHECKED", 1)
    wrong = type_errors.complaints(OUTPUT, ["package.unchecked"])
    assert wrong == ["package/typed/__init__.py:7: error: Missing  [attr-defined]"]
    assert not type_errors.complaints("", [])


def test_the_list_of_unchecked_modules_only_shrinks(monkeypatch):
    monkeypatch.setattr(type_errors, "MOST_UNCHECKED", 2)
    listed = ["package.unchecked", "package.typed", "package.good"]
    clean, long = type_errors.complaints(OUTPUT, listed)
    assert clean.startswith("package.good has no type errors")
    assert long == "3 modules are unchecked, 2 may be"
