"""Which kinds of device have an autocast; what it does to a GRU is tested with each feature."""

import re
import warnings

import pytest
import torch

from triton_gru.torch_modes import WITHOUT_AUTOCAST


def test_every_kind_of_device_without_autocast_is_known():
    with pytest.raises(RuntimeError, match="Expected one of") as refused:
        torch.device("nothing")
    kinds = re.search("one of (.*) device type", str(refused.value))[1].split(", ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mkldnn is deprecated
        without = {kind for kind in kinds if not torch.amp.is_autocast_available(kind)}
    assert without == WITHOUT_AUTOCAST
