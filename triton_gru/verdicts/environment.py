"""The device and the versions for which a verdict is valid."""

import ctypes
import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]
# What decides how a call is computed: the kernels and their launches, and the choice among them.
SOURCES = ("kernels", "plan")


def environment(device: torch.device) -> str:
    """Name of a device with its limits, versions, a hash of the kernels' sources and tuned plans.

    It has the multiprocessors that a launch may fill (TRITON_GRU_SM_BUDGET, NCCL) and those of the
    device: a part of a card (MIG) is another device.
    """
    from triton_gru.plan import selection, tuned

    limits = selection.device_limits(device)
    whole = selection.whole_device(device).multiprocessors
    found = ", ".join((*_packages(), *_libraries(device)))
    plans = tuned.fingerprint(limits)
    return (
        f"{device_name(device)} sm_{limits.capability} x{limits.multiprocessors} of {whole} | "
        f"{found} | kernels {source_hash()}" + (f" plans {plans}" if plans else "")
    )


def device_name(device: torch.device) -> str:
    """The device's name; for the interpreter one that no GPU has."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


@functools.cache
def _packages() -> tuple[str, ...]:
    # Not importlib's version of torch, which is the same for builds for different CUDA versions.
    found = [f"torch {torch.__version__}"]
    try:
        found.append(f"triton {version('triton')}")
    except PackageNotFoundError:
        found.append("triton none")
    return tuple(found)


@functools.cache
def _libraries(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ()
    return f"cuDNN {torch.backends.cudnn.version()}", f"driver {driver_version()}"


@functools.cache
def driver_version() -> str:
    """As nvidia-smi prints it; "unknown" if its library is not found."""
    for name in ("libnvidia-ml.so.1", "nvml.dll"):
        try:
            nvml = ctypes.CDLL(name)
            text = ctypes.create_string_buffer(80)
            if nvml.nvmlInit_v2() == 0:
                known = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == 0
                nvml.nvmlShutdown()
                if known:
                    return text.value.decode()
        except (OSError, AttributeError):
            continue
    return "unknown"


@functools.cache
def source_hash() -> str:
    """A hash of the kernels and the planner, independent of line ends."""
    found = hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (PACKAGE / folder).glob("*.py")):
        found.update(path.name.encode())
        found.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return found.hexdigest()[:12]
