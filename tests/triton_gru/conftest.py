import pytest


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    """The backends that run without a GPU; "triton" in tests/interpreter, in its place."""
    return request.param
