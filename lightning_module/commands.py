"""The entry points of the commands, and what they do before torch is imported.

`triton-gru-train` and `python -m lightning_module.train` both begin here. Importing torch and
Lightning takes about four seconds of CPU time. So --help and --version are answered, and arguments
read and checked, before that; a test checks that torch is not imported by then.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_module.credentials import refusal
from lightning_module.settings.config_folder import CONFIGS
from lightning_module.terminal.signals import SIGNALS, Interrupted, exit_code, handled_by, interrupt
from lightning_module.terminal.standard_streams import (
    UNWRITABLE,
    LastingOutput,
    open_standard_streams,
    stop_printing,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

# The modules that each extra of pyproject.toml installs.
EXTRAS = {
    "train": (
        *("lightning", "hydra", "omegaconf", "torchmetrics", "tokenizers", "rich", "matplotlib"),
        *("tensorboard", "numpy", "filelock", "fsspec"),
    ),
    "hf": ("datasets",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "sweep": ("optuna", "sklearn", "joblib"),
    "slurm": ("submitit",),
    "ray": ("ray",),
    "shards": ("fsspec", "s3fs", "pyarrow", "cloudpickle"),
}

# How an OpenMP thread waits for the others: asleep, without spinning. By default it spins for
# milliseconds; beside another process that computes, the spinning threads then occupy the processor
# that the thread they wait for needs. libgomp (in torch's wheels for Linux) reads the first
# variable, LLVM's and Intel's OpenMP (macOS, conda) the second. Figures: python -m
# benchmarks.contention
WAITING = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
# If one of these is set, the user's choice applies.
_WAITING_OF_THE_USER = (*WAITING, "OMP_WAIT_POLICY", "KMP_LIBRARY")

# Settings whose URLs are opened with fsspec, which finds its credentials itself.
_URLS = ("data.url", "data.paths", "data.val_paths", "out")

# A function that runs a config; imported after the arguments were read.
Run = Callable[["DictConfig"], Any]


def train() -> None:
    """Entry point of `triton-gru-train`."""
    with _command("triton-gru-train"):
        from lightning_module.settings.overrides import quote_arguments, take_changes
        from lightning_module.sweeps.jobs import end_with_sweep, refuse_missing_launcher

        end_with_sweep()
        changes = take_changes()
        quote_arguments()
        refuse_missing_launcher()
        with _lasting_output():
            _compose_and_run("train", lambda: _train(changes))


def _train(changes: list[str]) -> Run:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from lightning_module.sweeps.jobs import run_job

        return lambda config: run_job()
    from lightning_module.train import run

    return lambda config: run(config, changes)


def predict() -> None:
    """Entry point of `triton-gru-predict`."""
    with _command("triton-gru-predict"):
        from lightning_module.settings.overrides import quote_arguments, take_argument

        prompt = take_argument("prompt")
        # Hydra does not allow flags of a program; this one stands for a setting.
        sys.argv = ["format=web" if argument == "--serve" else argument for argument in sys.argv]
        quote_arguments()

        def load() -> Run:
            from lightning_module.predict import run

            return lambda config: run(config, prompt)

        _compose_and_run("predict", load)


def inspect() -> None:
    """Entry point of `triton-gru-inspect`."""
    with _command("triton-gru-inspect"):
        from lightning_module.settings.overrides import quote_arguments, take_argument

        text = take_argument("text")
        quote_arguments()

        def load() -> Run:
            from lightning_module.inspect.command import run

            return lambda config: run(config, text)

        _compose_and_run("inspect", load)


def memory() -> None:
    """Entry point of `triton-gru-memory`."""
    with _command("triton-gru-memory"):
        from lightning_module.settings.overrides import quote_arguments

        quote_arguments()

        def load() -> Run:
            from lightning_module.memory.command import run

            return run

        _compose_and_run("memory", load)


def prepare() -> None:
    """Entry point of `triton-gru-prepare`."""
    with _command("triton-gru-prepare"):
        from lightning_module.settings.overrides import quote_arguments

        quote_arguments()

        def load() -> Run:
            from lightning_module.prepare import run

            return run

        _compose_and_run("prepare", load)


def evaluate() -> None:
    """Entry point of `triton-gru-eval`."""
    with _command("triton-gru-eval"):
        from lightning_module.settings.overrides import quote_arguments

        quote_arguments()

        def load() -> Run:
            from lightning_module.evaluate import run

            return run

        _compose_and_run("eval", load)


def sweep_report() -> None:
    """Entry point of `triton-gru-sweep-report`."""
    with _command("triton-gru-sweep-report"):
        import argparse

        parser = argparse.ArgumentParser(
            prog="triton-gru-sweep-report",
            description="Show the jobs of a sweep, the best one's command line, and what mattered.",
        )
        parser.add_argument("directory", type=Path, help="of the sweep, such as multirun/quick")
        directory = parser.parse_args().directory
        from lightning_module.sweeps.report import run

        with handled_by(interrupt):
            run(directory)


def rank() -> None:
    """Entry point of the processes that `distributed/processes.py` starts."""
    _let_waiting_threads_sleep()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    with handled_by(lambda number, frame: os._exit(exit_code(number))):
        with _nothing_collected():
            from lightning_module.distributed.worker import run
            from lightning_module.train import train
        with handled_by(interrupt), _lasting_output():
            run(train)


def _end_with_launcher() -> None:
    # Standard input is a pipe from the process that started this one, and is closed when that ends.
    # (Read as a file descriptor: a thread in sys.stdin.read would hold a lock that the exit needs.)
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def version() -> str:
    """The version of this project, from triton_gru/version.py, whose package imports torch."""
    import runpy

    spec = find_spec("triton_gru")
    assert spec is not None and spec.origin is not None, "triton_gru is not installed"
    package = Path(spec.origin).parent
    return runpy.run_path(str(package / "version.py"))["__version__"]


@contextmanager
def _command(program: str) -> Iterator[None]:
    """The common part of all commands, around their body."""
    sys.argv = [program, *sys.argv[1:]]  # python -m sets a file name
    open_standard_streams()
    _let_waiting_threads_sleep()
    try:
        with handled_by(_exit_at_once), _errors_in_one_line():
            try:
                if "--version" in sys.argv[1:]:
                    print(f"{program} {version()}")
                    raise SystemExit(0)
                _refuse_credentials()
                yield
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # a full disk may fail only here
    except SystemExit as ended:
        if any(ended.code == exit_code(number) for number in SIGNALS):
            for number in SIGNALS:  # a further Ctrl-C must not change the exit code
                signal.signal(number, signal.SIG_IGN)
        raise


def _refuse_credentials() -> None:
    """Refuses URLs with credentials before a sweep, or the ranks of a run, write their settings."""
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in _URLS and (reason := refusal(value.strip("\"'"))):
            _refuse(reason)


def _compose_and_run(config_name: str, load: Callable[[], Run]) -> None:
    """Have Hydra read the arguments, then `load` and call the function that does the work."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    from lightning_module.errors import SettingsError
    from lightning_module.settings.hydra_errors import in_one_line
    from lightning_module.settings.table import check

    # For each group that --help lists, Hydra copies its sources and everything registered here,
    # although nothing changes it: 0.4 s of CPU time of 1.4.
    store = ConfigStore.instance()
    vars(store)["__deepcopy__"] = lambda memo: store
    composed = False

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def task(config: DictConfig) -> Any:
        nonlocal composed
        composed = True
        try:
            check(config, config_name)
        except SettingsError as error:
            _refuse(error)
        with _errors_in_one_line():  # before Hydra adds its own lines
            with _nothing_collected():
                run = load()
            with handled_by(interrupt):
                return run(config)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors in place of printing them
    try:
        task()
    except Exception as error:
        if composed or (isinstance(error, OSError) and not isinstance(error, HydraException)):
            raise
        _refuse(in_one_line(error, config_name, CONFIGS))


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage collection during imports, whose objects stay alive.

    Repeated collections over the growing number of objects took 1 s of the 7.5 s of CPU time of
    importing torch and Lightning.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _refuse(error: object) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(1) from None


@contextmanager
def _lasting_output() -> Iterator[None]:
    """Lets a training continue if its output cannot be written."""
    stream = sys.stdout
    if stream is None:
        yield
        return
    sys.stdout = lasting = LastingOutput(stream)
    try:
        yield
        lasting.flush()
    finally:
        sys.stdout = stream
        if lasting.stream is None:
            stop_printing()


def _let_waiting_threads_sleep() -> None:
    """Sets `WAITING` for this process and its children; OpenMP reads it when torch loads it."""
    if not any(variable in os.environ for variable in _WAITING_OF_THE_USER):
        os.environ.update(WAITING)


def _exit_at_once(number: int, frame: Any) -> None:
    """The signal handler while modules are imported, when there is nothing to save.

    It raises no exception: code that imports optional modules (NumPy's, for one) would take it for
    a failed import.
    """
    os.write(2, f"\n{Interrupted(number)}\n".encode())
    os._exit(exit_code(number))


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turns errors that are not faults of the program into one line and an exit code."""
    try:
        yield
    except Interrupted as interrupted:
        print(f"\n{interrupted}", file=sys.stderr)
        raise SystemExit(exit_code(interrupted.signal)) from None
    except ModuleNotFoundError as error:
        needed = _how_to_install(error)
        if needed is None:
            raise
        _refuse(needed)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        stop_printing()
        if error.errno == errno.EPIPE:  # the reader, such as head, has ended
            raise SystemExit(0) from None
        where = error.filename or "the output"
        print(f"error: {where} cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


def _how_to_install(error: ModuleNotFoundError) -> str | None:
    """The missing package and the command that installs it; None if none is missing."""
    name = (error.name or "").partition(".")[0]
    try:
        if not name or find_spec(name) is not None:
            return None  # a missing module of an installed package
    except (ImportError, ValueError):
        pass
    for extra, modules in EXTRAS.items():
        if name in modules:
            return f"the module {name} is not installed: pip install 'triton-gru[{extra}]'"
    return f"the module {name} is not installed: pip install {name}"
