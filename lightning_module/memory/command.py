"""The command `triton-gru-memory`: how far back GRU, LSTM and RNN remember, measured.

Every pair of task and layer type is a study (`memory/study.py`) in its own process with one thread,
so that the figures depend neither on the number of processes nor on their order.
"""

import json
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_module.checkpoints import write_atomically
from lightning_module.errors import DataError, UsageError
from lightning_module.lightning_warnings import quiet
from lightning_module.memory.plots import GRADIENT, NAMES, SUCCESS, draw_gradients, draw_success
from lightning_module.memory.study import Study, read_text, remember
from lightning_module.terminal.signals import Interrupted, exit_code, handled_by, without_ctrl_c

RESULTS = "memory.json"
TEXT = "text"


def measure(config: DictConfig) -> None:
    """Runs all studies of `config` and writes their results to its run directory.

    After each delay the results so far are in `memory.json`; the figures are drawn at the end, also
    after Ctrl-C or SIGTERM.

    Raises:
        UsageError: a setting is out of range, or the run directory is in use.
        DataError: the text cannot be used.
        SystemExit: a signal ended it before all studies ended.
    """
    studies = _studies(config)
    run_dir = Path(os.path.expanduser(config.run_dir))
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UsageError(f"run_dir {run_dir} exists and is not empty; choose another")
    data: Any = OmegaConf.to_container(
        OmegaConf.create({"data": config.data, "tokenizer": config.tokenizer}), resolve=True
    )
    if any(study.task == TEXT for study in studies):
        _data(data).prepare_data()
    run_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {task: {} for task in config.tasks}
    begun = time.monotonic()

    def save(finished: bool) -> None:
        record = {
            "finished": finished,
            "seconds": time.monotonic() - begun,
            "torch": torch.__version__,
            "settings": OmegaConf.to_container(config, resolve=True),
            "results": results,
        }
        text = json.dumps(record, indent=1, ensure_ascii=False)
        write_atomically(run_dir / RESULTS, (text + "\n").encode())

    with _stop_at_signals() as (stop, received):
        for study, found in _run(studies, data, config.workers, stop):
            results[study.task][study.layer_type] = found
            save(False)
    finished = not stop.is_set()
    if not finished:
        print("interrupted; what was measured so far is kept", file=sys.stderr)
    # In the order of the config, not in the order in which they finished.
    for task, by_type in results.items():
        results[task] = {
            layer_type: by_type[layer_type]
            for layer_type in config.layer_types
            if layer_type in by_type
        }
    save(finished)
    shown = {task: by_type for task, by_type in results.items() if by_type}
    if shown:
        draw_success(shown, run_dir / SUCCESS)
        draw_gradients(shown, run_dir / GRADIENT)
        print(f"{RESULTS}, {SUCCESS} and {GRADIENT} are in {run_dir}")
    if not finished:
        raise SystemExit(exit_code(received[0]))


def _studies(config: DictConfig) -> list[Study]:
    """All pairs of task and layer type, the longest first."""
    if len(config.delays) != len(config.steps):
        raise UsageError(
            f"steps must give one number for each of the delays; got {len(config.steps)} for "
            f"{len(config.delays)}"
        )
    steps = dict(zip(config.delays, config.steps, strict=True))
    settings = (
        "text_steps",
        "hidden_size",
        "embedding_size",
        "batch_size",
        "learning_rate",
        "seed",
    )
    return [
        Study(task, layer_type, steps, **{name: config[name] for name in settings})
        for task in sorted(set(config.tasks), key=("adding", "copy", TEXT).index)
        for layer_type in config.layer_types
    ]


def _run(
    studies: list[Study], data: dict[str, Any], workers: int | None, stop: threading.Event
) -> Iterator[tuple[Study, dict[str, Any]]]:
    """Yields the results of a study so far, whenever there are new ones, until `stop` is set."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    workers = workers or len(os.sched_getaffinity(0))
    executor = ProcessPoolExecutor(
        min(workers, len(studies)), mp_context=context, initializer=_begin, initargs=(messages,)
    )
    console = Console(highlight=False)
    columns = (
        TextColumn("{task.fields[name]:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bars = [
                progress.add_task(
                    "", total=1.0, name=f"{s.task}, {NAMES[s.layer_type]}", start=False
                )
                for s in studies
            ]
            with without_ctrl_c():  # a terminal sends it to the new processes too
                running = [executor.submit(_study, i, s, data) for i, s in enumerate(studies)]
            for number, kind, content in _messages(messages, running, stop):
                study, bar = studies[number], bars[number]
                if kind == "found":
                    yield study, content
                    continue
                done, doing = content
                if not progress.tasks[number].started:
                    progress.start_task(bar)
                progress.update(bar, completed=done, description=doing)
                if kind == "line":
                    progress.stop_task(bar)
                    console.print(
                        f"{study.task}, {NAMES[study.layer_type]}: {doing}", soft_wrap=True
                    )
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()  # Lightning handles SIGTERM only after a step


def _messages(
    messages: Any, running: list[Future], stop: threading.Event
) -> Iterator[tuple[int, str, Any]]:
    """The messages of the studies, until all are done; raises what one of them raised."""
    while not stop.is_set():
        all_done = all(future.done() for future in running)
        try:
            while not stop.is_set():
                yield messages.get(timeout=0.2)
        except queue.Empty:
            pass
        for future in running:
            if future.done():
                try:
                    future.result()
                except BrokenProcessPool as error:
                    raise UsageError(
                        "a process died, possibly out of memory: try workers=1"
                    ) from error
        if all_done:
            return


_messages_to_parent: Any = None


def _begin(messages: Any) -> None:
    """Initializes a process: one thread, quiet logging."""
    global _messages_to_parent
    _messages_to_parent = messages
    torch.set_num_threads(1)
    quiet()


def _study(number: int, study: Study, data: dict[str, Any]) -> None:
    """One study, in a process of its own."""

    def report(done: float, doing: str) -> None:
        _messages_to_parent.put((number, "line" if done >= 1 else "report", (done, doing)))

    def keep(found: dict[str, Any]) -> None:
        _messages_to_parent.put((number, "found", found))

    begun = time.process_time()  # independent of other processes on the machine
    if study.task == TEXT:
        module = _data(data)
        module.setup("fit")
        outcome = read_text(study, module, report, keep)
    else:
        outcome = remember(study, report, keep)
    report(1.0, f"{outcome}; {time.process_time() - begun:.0f} s of CPU time")


def _data(data: dict[str, Any]) -> Any:
    config = OmegaConf.create(data)
    return instantiate(config.data, tokenizer=instantiate(config.tokenizer))


@contextmanager
def _stop_at_signals() -> Iterator[tuple[threading.Event, list[int]]]:
    """An event that Ctrl-C and SIGTERM set, and the received signals; a second one ends at once."""
    stop = threading.Event()
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if stop.is_set():
            raise Interrupted(number)
        stop.set()

    with handled_by(receive):
        yield stop, received


def run(config: DictConfig) -> None:
    """Runs `triton-gru-memory`; raises SystemExit on an error."""
    try:
        measure(config)
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
