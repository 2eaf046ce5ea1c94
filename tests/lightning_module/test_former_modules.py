"""Scripts and pickles of earlier versions import modules by the names they had."""

import importlib
import sys

import pytest

from lightning_module.former_modules import MODULES


@pytest.mark.parametrize("former", MODULES)
def test_a_former_name_gives_the_present_module(former, monkeypatch):
    monkeypatch.delitem(sys.modules, f"lightning_module.{former}", raising=False)
    present = f"lightning_module.{MODULES[former]}"
    with pytest.warns(FutureWarning, match=rf"\.{former} is called {present} now"):
        found = importlib.import_module(f"lightning_module.{former}")
    assert found is importlib.import_module(present)
    assert found.__name__ == found.__spec__.name == present


def test_the_data_module_is_found_where_it_was():
    from lightning_module import SentenceDataModule, data

    assert data.SentenceDataModule is SentenceDataModule
    with pytest.raises(AttributeError, match="nothing"):
        data.nothing  # noqa: B018


def test_an_unknown_module_is_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"lightning_module\.nothing"):
        importlib.import_module("lightning_module.nothing")
