"""Takes the place of Triton's CUDA driver: kernels compile to PTX for a named architecture, no GPU.

Triton's own launch path runs: it specialises the real arguments, compiles, caches, checks the
shared memory, and then calls the launcher of the active driver with the values of the kernel's
arguments. ptxas does not run; the "cubin" is the PTX.
"""

import contextlib
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from triton_gru.plan.devices import DEVICES


class _Utils:
    """What Triton asks a driver about a device."""

    @staticmethod
    def get_device_properties(arch):
        return {"max_shared_mem": DEVICES[arch].shared_bytes, "multiprocessor_count": 1}

    @staticmethod
    def load_binary(name, ptx, shared, arch):
        """(module, function, registers, spills, threads a program may have)."""
        return object(), ptx.decode(), 0, 0, 1024


class Driver(DriverBase):
    """A device of one architecture; `launch(metadata, ptx, grid, arguments)` takes its launches.

    `metadata` is Triton's, `arguments` by name what the kernel receives at run time.
    """

    def __init__(self, arch, launch):
        self.arch, self.launch, self.utils = arch, launch, _Utils()
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls):
        return False  # Triton is not to choose it by itself

    def map_python_to_cpp_type(self, type_):
        return type_

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    # Triton keeps what it compiled by device: each architecture is one.
    def get_current_device(self):
        return self.arch

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def get_device_interface(self):
        raise NotImplementedError


class Launcher:
    """Made by Triton for a compiled kernel, called for each launch."""

    def __init__(self, source, metadata):
        self.metadata = metadata
        folded = {key[0] if isinstance(key, tuple) else key for key in source.constants}
        self._runtime = [
            (n, name) for n, name in enumerate(source.fn.arg_names) if not {n, name} & folded
        ]

    def __call__(self, x, y, z, stream, ptx, packed, metadata, enter_hook, exit_hook, *values):
        arguments = {name: values[n] for n, name in self._runtime}
        # Triton keeps launchers as long as the process lives: ask for the driver of this launch.
        driver.active.launch(self.metadata, ptx, (x, y, z), arguments)


@contextlib.contextmanager
def compiling_for(arch: int, launch, cache_dir: str):
    """Every kernel launched within goes to `launch(metadata, ptx, grid, arguments)`.

    `cache_dir` must serve this alone: the entries there hold no cubin.
    """
    before, cache_before = driver._active, triton.knobs.cache.dir
    make_cubin = CUDABackend.make_cubin
    CUDABackend.make_cubin = lambda self, ptx, metadata, options, capability: ptx.encode()
    triton.knobs.cache.dir = cache_dir
    driver.set_active(Driver(arch, launch))
    try:
        yield
    finally:
        driver._active = before
        triton.knobs.cache.dir = cache_before
        CUDABackend.make_cubin = make_cubin


def kernel_name(ptx: str) -> str:
    return re.search(r"\.visible \.entry (\w+)", ptx).group(1)
