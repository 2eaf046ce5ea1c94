"""One of the processes that `distributed/processes.py` starts; not for users."""

if __name__ == "__main__":  # python -m, before the imports below, see commands.py
    from lightning_module.commands import rank

    rank()
    raise SystemExit

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_module.atomic_files import write_atomically
from lightning_module.distributed import ranks
from lightning_module.distributed.processes import EXPECTED, JOB, outcome_file
from lightning_module.errors import Stopped
from lightning_module.lightning_warnings import quiet
from lightning_module.run_config import from_yaml
from lightning_module.terminal.signals import Interrupted


def _describe(error: BaseException) -> dict[str, Any]:
    kind = type(error).__name__
    plain = isinstance(error, (Stopped, Interrupted, *EXPECTED.values()))
    text = str(error) if plain else "".join(traceback.format_exception(error)).rstrip()
    return {"kind": kind, "text": text, "signal": getattr(error, "signal", None)}


def run(train: Callable[..., dict[str, Any]]) -> None:
    """Calls `train` with the job's arguments and writes its outcome."""
    folder, number = Path(sys.argv[1]), int(os.environ["RANK"])
    logging.basicConfig(
        level=logging.INFO if number == 0 else logging.ERROR,
        format="%(message)s",
        stream=sys.stdout,
    )
    quiet()
    job = json.loads((folder / JOB).read_text())
    checkpoint = Path(job["checkpoint"]) if job["checkpoint"] else None
    try:
        metrics = train(from_yaml(job["config"]), checkpoint, resuming=job["resuming"])
        outcome: dict[str, Any] = {"metrics": metrics}
    except BaseException as error:
        outcome = _describe(error)
    outcome["time"] = time.time()
    write_atomically(outcome_file(folder, number), json.dumps(outcome).encode())
    if "kind" in outcome:
        # Immediately: an orderly shutdown of the connection would wait for the others.
        sys.stdout.flush()
        os._exit(1)
    ranks.leave()
