"""PyTorch's own samples and error samples for nn.GRU and nn.GRUCell, run with GRU and GRUCell."""

import functools
import re

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

from tests.tolerances import assert_close
from triton_gru import GRU, GRUCell

OURS = {nn.GRU: GRU, nn.GRUCell: GRUCell}
INFOS = [info for info in module_db if info.module_cls in OURS]
DTYPES = [torch.float32, torch.float64]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

each = [
    pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__),
    pytest.mark.parametrize("dtype", DTYPES),
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("training", [True, False]),
    pytest.mark.parametrize("backend", ["auto", "torch", "reference"]),
]


def for_each(test):
    return functools.reduce(lambda test, mark: mark(test), each, test)


def test_both_modules_have_samples():
    assert {info.module_cls for info in INFOS} == set(OURS)
    assert all(set(DTYPES) <= set(info.dtypes) for info in INFOS)


@for_each
@pytest.mark.compat("input", "PyTorch's own samples of nn.GRU and nn.GRUCell", "works")
def test_samples(info, dtype, device, training, backend):
    samples = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    )
    options = {} if info.module_cls is nn.GRUCell else {"with_packed_sequence": True}
    samples = samples + info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=False, training=training, **options
    )
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **kwargs).to(device, dtype).train(training)
        ours = OURS[info.module_cls](*args, **kwargs, backend=backend).to(device, dtype)
        ours.train(training).load_state_dict(theirs.state_dict())
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        actual, expected = ours(*args, **kwargs), theirs(*args, **kwargs)
        if isinstance(actual, tuple) and not isinstance(actual[0], torch.Tensor):
            actual, expected = (actual[0].data, actual[1]), (expected[0].data, expected[1])
        assert_close(actual, expected)
        if sample.reference_fn is not None and isinstance(args[0], torch.Tensor):
            assert_close(actual, sample.reference_fn(ours, *args, **kwargs))


@for_each
@pytest.mark.compat("input", "PyTorch's own error samples", "works", "the same exceptions")
def test_error_samples(info, dtype, device, training, backend):
    samples = info.module_error_inputs_func(
        info, device=device, dtype=dtype, requires_grad=False, training=training
    )
    assert samples
    for sample in samples:
        module_input = sample.module_error_input
        args, kwargs = module_input.constructor_input.args, module_input.constructor_input.kwargs

        def build(args=args, kwargs=kwargs):
            return OURS[info.module_cls](*args, **kwargs, backend=backend)

        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                build()
            continue
        module = build().to(device, dtype).train(training)
        args, kwargs = module_input.forward_input.args, module_input.forward_input.kwargs
        with pytest.raises(sample.error_type) as caught:
            module(*args, **kwargs)
        assert caught.type is sample.error_type
        assert re.search(sample.error_regex, str(caught.value))
