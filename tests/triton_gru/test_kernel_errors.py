"""What kernels report, without one: words in host memory, and a launch that is refused."""

import types

import pytest
import torch

import triton_gru
from triton_gru import kernel_errors
from triton_gru.kernel_errors import KernelError, KernelTimeout, LaunchRefused

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def words(monkeypatch):
    monkeypatch.setattr(kernel_errors, "_words", {})
    return kernel_errors.error_words(DEVICE)


def test_what_was_reported_is_raised_once(words):
    triton_gru.check()
    words.copy_(torch.tensor([8, 5], dtype=torch.int32))
    with pytest.raises(KernelTimeout, match=r"program 7 of a GRU kernel on cpu .* at step 5,"):
        triton_gru.check()
    triton_gru.check()


def test_check_waits_for_the_gpu_first(words, monkeypatch):
    gpu = torch.device("cuda", 0)
    kernel_errors._words[gpu] = torch.zeros(2, dtype=torch.int32)

    def synchronize(device):
        kernel_errors._words[device][0] = 1  # a kernel that gives up in the meantime

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    kernel_errors.check_errors(gpu)
    with pytest.raises(KernelTimeout, match="on cuda:0"):
        triton_gru.check()


def test_words_for_a_gpu_are_pinned_and_kept(monkeypatch):
    """Made once, in memory that no pool of a CUDA graph owns."""
    made = []

    def zeros(*shape, **options):
        made.append(options)
        return torch.ones(2, dtype=torch.int32).mul_(0)

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(kernel_errors.torch, "zeros", zeros)
    assert kernel_errors.error_words(gpu) is kernel_errors.error_words(gpu)
    assert made == [{"dtype": torch.int32, "device": "cpu", "pin_memory": True}]


@pytest.mark.parametrize(
    ("text", "group", "kind"),
    [
        ("Triton Error [CUDA]: too many blocks in cooperative launch", 48, LaunchRefused),
        ("Triton Error [CUDA]: operation not supported", 48, LaunchRefused),
        ("Triton Error [CUDA]: an illegal memory access was encountered", 48, RuntimeError),
        ("Triton Error [CUDA]: operation not supported", 1, RuntimeError),
    ],
)
def test_a_launch_that_is_refused_is_named(text, group, kind):
    pytest.importorskip("triton")
    from triton_gru.kernels import launch

    plan = types.SimpleNamespace(group=group, groups_a_launch=2)
    with pytest.raises(RuntimeError) as raised, launch.launching(plan, DEVICE):
        raise RuntimeError(text)
    assert type(raised.value) is kind
    assert text in str(raised.value)
    if kind is LaunchRefused:
        assert "96 programs" in str(raised.value) and "TRITON_GRU_SM_BUDGET" in str(raised.value)
        assert isinstance(raised.value, KernelError)
