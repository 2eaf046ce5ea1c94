"""Measures one shape class in its own process, so that its faults do not affect this one.

The process is `python -m triton_gru.class_check`. Its result is an `Outcome`: verdicts to store,
which include faults, hangs and wrong numbers; or the reason why nothing was measured, which is not
stored.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from triton_gru.verdicts.shapes import ShapeClass, Verdict

# Seconds for one class, most of them compiling: eight kernels, some ten seconds each at worst.
DEADLINE = 180.0
# Printed when torch is imported and the device works: later failures are those of the kernels.
BEGUN = "the kernels begin"
MODES = ("inference", "training")

COMMAND = (sys.executable or "python3", "-m", "triton_gru.class_check")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one class.

    Attributes:
        verdicts: One for each of `MODES`, or none.
        obstacle: The reason why there are none, as the end of a sentence.
    """

    verdicts: dict[str, Verdict]
    obstacle: str = ""

    @property
    def failure(self) -> str | None:
        """The fault of the kernels, or None."""
        return next((v.failure for v in self.verdicts.values() if v.failure), None)


def measure(
    shape: ShapeClass,
    device: torch.device,
    *,
    deadline: float = DEADLINE,
    command: Sequence[str] = COMMAND,
) -> Outcome:
    """Checks and times one class; takes up to `deadline` seconds."""
    from triton_gru.plan import selection

    obstacle = selection.obstacle(
        device=device,
        dtype=shape.torch_dtype,
        batch_size=shape.batch or 1,
        hidden_size=shape.hidden,
        reset_after=shape.reset_after,
        directions=shape.directions,
    )
    if obstacle is not None:
        return Outcome({}, obstacle)
    budget = selection.device_limits(device).multiprocessors
    request = json.dumps({**dataclasses.asdict(shape), "device": str(device)})
    try:
        code, output, errors = _run([*command, request], budget, deadline)
    except OSError as error:
        return Outcome({}, f"a process for it could not be started ({error})")
    return _read(code, output, errors, deadline)


def _run(command: list[str], budget: int, deadline: float) -> tuple[int | None, str, str]:
    """Exit status (None: it was killed at the deadline), output and errors of a process."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",  # do not import from the current directory
        "TRITON_GRU_SM_BUDGET": str(budget),
    }
    # Into files: a pipe would have to be read while waiting, and a compiler that the process
    # started may keep it open after the process has ended.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
        return code, _text(output), _text(errors)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _kill(process: subprocess.Popen) -> None:
    """Kills a process and its children; does not wait for one that is blocked in a driver."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def _read(code: int | None, output: str, errors: str, deadline: float) -> Outcome:
    """The outcome, from the last line that the process printed."""
    lines = output.split("\n")
    last = (errors.strip().splitlines() or ["nothing was printed"])[-1][:300]
    if BEGUN not in lines:
        ended = f"gave no sign for {deadline:g} s" if code is None else f"ended with {code}: {last}"
        return Outcome({}, f"the process for it {ended}")
    if code is None:
        return _failed(f"no result within {deadline:g} s; the process was killed")
    if code != 0:
        return _failed(f"the process ended with {_status(code)}: {last}")
    try:
        found: Any = json.loads(lines[-2])
        if "obstacle" in found:
            return Outcome({}, str(found["obstacle"]))
        return Outcome({mode: Verdict.read(found[mode]) for mode in MODES})
    except (ValueError, TypeError, KeyError, IndexError):
        return _failed(f"the process ended without a result: {last}")


def _failed(failure: str) -> Outcome:
    return Outcome(dict.fromkeys(MODES, Verdict.today(failure)))


def _status(code: int) -> str:
    if code >= 0:
        return str(code)
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
