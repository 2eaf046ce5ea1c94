"""scan.c as a library of this machine: built by its C compiler at first use, then kept.

The wheel contains the source, as Triton's contains its launcher's: the library then uses the vector
instructions of this machine, and no binary is shipped for each of them. The build takes about three
seconds. The library is in a directory that only its owner can write to.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from triton_gru.cache import cache_directory, write_atomically

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("scan.c")
HEADERS = ("vectors.h", "products.h", "layer.h", "forward.h", "backward.h")
# No -ffast-math: NaN and infinity must be preserved, and the order of a sum. Multiply-add rounds
# once in every tile, so that a row's bits do not depend on its neighbours.
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
BUILD_SECONDS = 120


class Unavailable(RuntimeError):
    """The library is not available here; the message says why, as the end of a sentence."""


@functools.cache
def obstacle() -> str | None:
    """Why there is no library here, as the end of a sentence, or None. Builds it if need be."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        Unavailable: No compiler, no AVX2 or NEON, or no directory to build in.
    """
    if os.environ.get("TRITON_GRU_CPU") == "0":
        raise Unavailable("TRITON_GRU_CPU=0 turns the CPU engine off")
    if os.name != "posix":
        raise Unavailable(f"the CPU engine is not built on {platform.system()}")
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("the CPU engine needs a C compiler (cc, gcc or the one that CC names)")
    try:
        lib = ctypes.CDLL(str(_built(compiler)))
    except OSError as error:
        raise Unavailable(f"the CPU engine cannot be built or loaded: {error}") from error
    for function in (lib.scan_forward, lib.scan_backward):
        function.argtypes = [ctypes.c_char_p]  # the bytes of a struct Layer
    return lib


def _built(compiler: str) -> Path:
    directory = _private(cache_directory() / "cpu")
    path = directory / f"scan-{_key(compiler)}.so"
    with _locked(directory / "lock"):  # one process builds, the others wait
        if path.exists():
            return path
        log.info("building %s once with %s", path, compiler)
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=BUILD_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise Unavailable(f"{compiler} did not finish within {BUILD_SECONDS} s") from error
            if done.returncode:
                # The message of an #error in the source, if there is one.
                lines = [line for line in done.stderr.splitlines() if "error" in line]
                why = (lines or done.stderr.splitlines() or ["no message"])[0]
                raise Unavailable(f"{compiler} cannot build the CPU engine: {why.strip()}")
            write_atomically(path, made.read_bytes())
    return path


def _private(directory: Path) -> Path:
    """The directory, created; refused if another user could put a library in it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise Unavailable(
            f"{directory} belongs to another user or can be written by others: chmod go-w it, or "
            "set TRITON_GRU_CACHE"
        )
    return directory


def _key(compiler: str) -> str:
    """A hash of everything that the library depends on."""
    found = os.stat(compiler)
    parts = (
        *(SOURCE.with_name(name).read_bytes() for name in (SOURCE.name, *HEADERS)),
        FLAGS,
        os.path.realpath(compiler),
        found.st_size,
        found.st_mtime_ns,
    )
    return hashlib.sha256(repr((*parts, _cpu_features())).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """What -march=native depends on: machines that share a home directory may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
