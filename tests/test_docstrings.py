"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import triton_gru


def modules_with_examples():
    """Modules of both packages with a >>> in their source; what cannot be imported is left out."""
    packages = [triton_gru]
    try:
        import lightning_module

        packages.append(lightning_module)
    except ImportError:
        pass
    for package in packages:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = found.module_finder.find_spec(found.name).loader.get_source(found.name)
            if ">>> " in source:
                yield found.name


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_of(name):
    module = pytest.importorskip(name, exc_type=ImportError)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", sorted({*triton_gru.__all__} - {"__version__", "tune"}))
def test_each_public_name_has_an_example(name):
    """But `tune`, which needs a GPU."""
    assert ">>> " in getattr(triton_gru, name).__doc__


def test_public_names_of_the_training_package_have_an_example():
    package = pytest.importorskip("lightning_module")
    pytest.importorskip("lightning")
    for name in package.__all__:
        public = getattr(importlib.import_module("lightning_module"), name)
        assert ">>> " in public.__doc__, name
