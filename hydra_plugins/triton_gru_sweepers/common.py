"""The common part of the grid and the search: names, directories, checks."""

import contextlib
import itertools
import json
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# lightning_module is imported where it is used: Hydra imports its plugins in every program, and
# torch takes seconds.


class SweepError(Exception):
    """A sweep that cannot begin as requested; the message says why and what to do."""


class NamedSweeper(Sweeper):
    """The common part of the grid and the search.

    Args:
        study: the sweep's name.
        objective: the metric of summary.json by which jobs are compared.
        direction: "minimize" or "maximize".
        params: sweeps, as on the command line: `{"optimizer.lr": "0.001,0.01"}`.
    """

    def __init__(self, study: str, objective: str, direction: str, params: DictConfig) -> None:
        self.study, self.objective, self.direction = str(study), objective, direction
        self.params = dict(params or {})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.directory = Path(config.hydra.sweep.dir)

    def sweep(self, arguments: list[str]) -> None:
        """Runs all jobs and writes the report; raises SystemExit unless the exit code is 0."""
        from lightning_module.errors import DamagedFile
        from lightning_module.sweeps.report import report
        from lightning_module.terminal.signals import (
            SIGNALS,
            Interrupted,
            exit_code,
            handled_by,
            interrupt,
        )

        try:
            overrides = self._overrides(arguments)
            self._compose_each(overrides)
            with handled_by(interrupt):
                with self._directory_of(overrides):
                    self._run(overrides)
                jobs = report(self.directory)
        except (SweepError, DamagedFile) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        except (Interrupted, SystemExit) as ended:
            # The exit code of a job that ran in this process, or of a signal.
            code = exit_code(ended.signal) if isinstance(ended, Interrupted) else ended.code
            if code not in map(exit_code, SIGNALS):
                raise
            print(
                "\nThe sweep was stopped. To go on with it, run the same command again with "
                f"hydra.sweeper.study={self.study}",
                file=sys.stderr,
            )
            raise SystemExit(code) from None
        if self._exit_code([job.state == "complete" for job in jobs]):
            raise SystemExit(1)

    @abstractmethod
    def _run(self, overrides: list[Override]) -> None:
        """Runs all jobs."""

    @abstractmethod
    def _exit_code(self, complete: list[bool]) -> int:
        """The exit code of the command, from which jobs are complete."""

    @abstractmethod
    def _describe(self, override: Override) -> dict[str, Any]:
        """A swept parameter as in sweep.json."""

    # -- before the first job --------------------------------------------------------------------

    def _overrides(self, arguments: list[str]) -> list[Override]:
        """The settings of this sweep by key; those of the command line replace configured ones."""
        if (
            "TORCHELASTIC_RUN_ID" in os.environ
            or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        ):
            raise SweepError(
                "this process is one of those that torchrun or srun started, and each would run "
                "the whole sweep. Start the sweep once, without them: each job starts its ranks "
                "(strategy=ddp trainer.devices=...), or launcher=submitit_slurm sends it to nodes"
            )
        from lightning_module.settings.overrides import quoted

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        configured = [quoted(f"{key}={value}") for key, value in self.params.items()]
        overrides = {
            o.get_key_element(): o for o in parser.parse_overrides([*configured, *arguments])
        }
        if "resume" in overrides:
            raise SweepError(
                "resume= goes on with a single run. A sweep goes on when its own command is run "
                "again with the same hydra.sweeper.study"
            )
        return list(overrides.values())

    def _compose_each(self, overrides: list[Override]) -> None:
        """Composes each value of each setting once.

        Raises:
            SweepError: an unknown key or group (the message names the nearest one), or a value of
                the wrong type or out of range.
        """
        from lightning_module.errors import SettingsError
        from lightning_module.settings.config_folder import CONFIGS
        from lightning_module.settings.hydra_errors import in_one_line
        from lightning_module.settings.table import check

        first = {o.get_key_element(): self._samples(o)[0] for o in overrides}
        for override in overrides:
            key = override.get_key_element()
            for value in self._samples(override):
                settings = [f"{k}={v}" for k, v in {**first, key: value}.items()]
                try:
                    check(self.hydra_context.config_loader.load_sweep_config(self.config, settings))
                except SettingsError as error:
                    raise SweepError(error) from None
                except (HydraException, ValueError) as error:
                    raise SweepError(in_one_line(error, "train", CONFIGS)) from None

    @staticmethod
    def _samples(override: Override) -> list[str]:
        """Values of an override as they are typed, at least one of each kind."""
        from lightning_module.settings.overrides import quoted

        if not override.is_sweep_override():
            return [override.get_value_element_as_str()]
        if override.is_discrete_sweep():
            key = override.get_key_element()
            settings = [f"{key}={value}" for value in override.sweep_string_iterator()]
            # Hydra loses the quotes of choice('one','two').
            return [quoted(s, multirun=False).partition("=")[2] for s in settings]
        return [str(override.value().start)]

    @contextlib.contextmanager
    def _directory_of(self, overrides: list[Override]) -> Iterator[None]:
        """Holds the sweep directory, which must be new or made for these settings."""
        import fcntl  # Unix only; a single run does not need it

        from lightning_module.atomic_files import write_atomically
        from lightning_module.sweeps.jobs import (
            JOBS,
            SWEEP,
            SWEEP_PROCESS,
            own_overrides,
            read_description,
        )

        wanted = {
            "sweeper": type(self).__name__,
            "objective": self.objective,
            "direction": self.direction,
            "parameters": {
                o.get_key_element(): self._describe(o) for o in overrides if o.is_sweep_override()
            },
            "fixed": sorted(
                own_overrides(
                    [
                        f"{o.get_key_element()}={o.get_value_element_as_str()}"
                        for o in overrides
                        if not o.is_sweep_override()
                    ]
                )
            ),
        }
        file = self.directory / SWEEP
        other_name = "give this sweep a name of its own: hydra.sweeper.study=..."
        if file.exists():
            _same_or_refused(read_description(self.directory), wanted, self.study, other_name)
        elif self.directory.exists() and any(self.directory.iterdir()):
            raise SweepError(f"{self.directory} exists and holds no sweep: {other_name}")
        (self.directory / JOBS).mkdir(parents=True, exist_ok=True)
        with (self.directory / JOBS / "sweep.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SweepError(
                    f"another process runs the sweep {self.study} in {self.directory}: wait, or "
                    f"{other_name}"
                ) from None
            except OSError:
                pass  # a file system without locks; each run has its own lock
            os.environ[SWEEP_PROCESS] = str(os.getpid())
            text = json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"
            write_atomically(file, text.encode())
            yield

    # -- running ---------------------------------------------------------------------------------

    def _launch(self, jobs: dict[int, Sequence[str]]) -> dict[int, Any]:
        """Runs jobs, given as number to overrides, and returns their records.

        Raises:
            SweepError: the launcher failed.
        """
        records = {}
        # A launcher numbers its jobs consecutively.
        for _, run in itertools.groupby(enumerate(sorted(jobs)), lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in run]
            try:
                returns = self.launcher.launch(
                    [jobs[number] for number in numbers], initial_job_idx=numbers[0]
                )
                records |= {n: r.return_value for n, r in zip(numbers, returns, strict=True)}
            except Exception as error:  # not of a training: of the launcher, or of a full disk
                raise SweepError(
                    f"what starts and records the jobs failed ({type(error).__name__}: {error}). "
                    "To go on with the sweep, run the same command with "
                    f"hydra.sweeper.study={self.study}"
                ) from error
        return records


def _same_or_refused(before: dict, wanted: dict, study: str, fix: str) -> None:
    """Raises SweepError if a sweep was made with other settings."""
    for what, text in {
        "sweeper": "by another sweeper",
        "objective": "for another objective",
        "direction": "in another direction",
        "parameters": "in another search space",
        "fixed": "with other settings",
    }.items():
        if before[what] != wanted[what]:
            raise SweepError(
                f"the sweep {study} exists and was made {text}: "
                f"{_difference(before[what], wanted[what])}. Resume with it as it was, or {fix}"
            )


def _difference(before: Any, wanted: Any) -> str:
    if isinstance(before, dict):
        keys = [k for k in {**before, **wanted} if before.get(k) != wanted.get(k)]
        return "; ".join(
            f"{k} was {_in_words(before.get(k))}, is {_in_words(wanted.get(k))}" for k in keys
        )
    if isinstance(before, list):
        gone, new = sorted(set(before) - set(wanted)), sorted(set(wanted) - set(before))
        return f"had {' '.join(gone) or 'nothing'} where there is now {' '.join(new) or 'nothing'}"
    return f"was {before}, is {wanted}"


def _in_words(parameter: dict[str, Any] | None) -> str:
    if parameter is None:
        return "not searched"
    return " ".join(f"{k}={','.join(v) if k == 'choices' else v}" for k, v in parameter.items())
