"""The file of measurements: its format, writing, and resuming.

    format       version of this format
    suite        smoke, quick or full
    started      time, in UTC
    environment  device, driver, versions, commit
    in_flight    [kind, id, implementation] being measured, or null; shows what a crash interrupted
    probes       by name: {"status", ...}, see benchmarks.probes
    cells        by id: the cell's fields, and "results" by implementation: {"status", ...}

A status is "ok", "failed", "missing" (not installed), "unsupported" (no such function), "lost" (the
process died or hung on it) or "not run" (the time was over). All but the last are final.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from lightning_module.atomic_files import write_atomically  # imports no torch

FORMAT = 2
ROOT = Path(__file__).parents[1]
NOT_RUN = "not run"


def environment(device, commit: str | None = None) -> dict:
    """The environment on which the times depend, besides the code."""
    import torch

    found = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit or _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown",
        "sources": _sources(),
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ).split("\n")[0],
            "clocks_mhz": _output(
                "nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv"
            ),
        }
    return found


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sources() -> str:
    """A hash of the layer's code: distinguishes states of a tree with the same commit or none."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "triton_gru").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Record:
    """A record in memory and on disk; `save` replaces the file atomically."""

    def __init__(self, path: Path, data: dict):
        self.path, self.data = path, data

    @classmethod
    def new(cls, path: Path, suite: str, cells, probes) -> "Record":
        now = datetime.datetime.now(datetime.timezone.utc)
        data = {
            "format": FORMAT,
            "suite": suite,
            "started": now.isoformat(timespec="seconds"),
            "command": sys.argv,
            "environment": None,
            "in_flight": None,
            "probes": {name: {"status": NOT_RUN} for name in probes},
            "cells": {},
        }
        for cell in cells:
            fields = dataclasses.asdict(cell)
            names = fields.pop("implementations")
            fields["results"] = {name: {"status": NOT_RUN} for name in names}
            data["cells"][cell.id] = fields
        return cls(path, data)

    @classmethod
    def load(cls, path: Path) -> "Record":
        data = json.loads(path.read_text())
        if data.get("format") != FORMAT:
            raise ValueError(
                f"{path} should have format {FORMAT}, got: {data.get('format')}; give another --out"
            )
        return cls(path, data)

    def save(self) -> None:
        write_atomically(self.path, (json.dumps(self.data, indent=1) + "\n").encode())

    def belongs_to(self, environment: dict) -> None:
        """Sets the environment, or refuses to mix two.

        Raises:
            ValueError: The record was measured on another device, software or code.
        """
        mine = self.data["environment"]
        if mine is None:
            self.data["environment"] = environment
            return
        for key in ("device", "torch", "triton", "sources", "interpreter"):
            if mine[key] != environment[key]:
                raise ValueError(
                    f"{self.path} was measured with {key} {mine[key]!r}, and here it is "
                    f"{environment[key]!r}; give another --out"
                )

    def slot(self, kind: str, id: str, implementation: str | None) -> dict:
        """The dict for the result of one measurement, named as in `in_flight`."""
        if kind == "probe":
            return self.data["probes"][id]
        return self.data["cells"][id]["results"][implementation]

    def put(self, kind: str, id: str, implementation: str | None, result: dict) -> None:
        slot = self.slot(kind, id, implementation)
        slot.clear()
        slot.update(result)

    def lose(self, reason: str) -> list | None:
        """Marks the measurement in flight as lost; returns it, or None if there was none."""
        lost, self.data["in_flight"] = self.data["in_flight"], None
        if lost is not None:
            self.put(*lost, {"status": "lost", "reason": reason})
        self.save()
        return lost

    def counts(self) -> dict[str, int]:
        """How many measurements have each status."""
        found: dict[str, int] = {}
        every = [*self.data["probes"].values()]
        for cell in self.data["cells"].values():
            every += cell["results"].values()
        for result in every:
            found[result["status"]] = found.get(result["status"], 0) + 1
        return found
