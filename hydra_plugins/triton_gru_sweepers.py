"""The sweepers of `triton-gru-train -m`: a grid, and a search with Optuna.

They lie here because Hydra takes plugins from the namespace `hydra_plugins` alone. What a job is,
and how it runs, is in lightning_module/sweep_jobs.py; these two decide which jobs there are.

Both keep to the same rules:
- A sweep has a name, `hydra.sweeper.study`, hence a directory, `multirun/NAME`. The same command
  with the same name goes on with it: what is complete stays, what was interrupted resumes from its
  checkpoint in its own directory. sweep.json in it holds what is searched; other settings under
  the same name are refused, because their results would not compare.
- Every setting is composed once before the first job starts, so that an unknown key stops nothing
  but the command.
- A job that diverges or dies is recorded as failed and the sweep goes on. In the end the grid exits
  with 1 if any job failed, because each of them was asked for by name; a search does if all did,
  because to find where training fails is part of searching. A grid tries failed jobs again when it
  is gone on with; a search does not, its sampler has already learnt from them.

Why not hydra-optuna-sweeper (1.3.0, the newest): it requires Optuna below 3, and the distribution
classes it imports are gone from Optuna 5. When it is gone on with it numbers jobs from 0, into the
directories of the jobs before, and runs all trials anew.
"""

import contextlib
import difflib
import fcntl
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

SWEEP = "sweep.json"
STUDY = "study.db"


class SweepError(Exception):
    """A sweep that cannot begin as asked for; the message says why and what to do."""


class _NamedSweeper(Sweeper):
    """What the grid and the search have in common.

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
        self.hydra_context, self.config = hydra_context, config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.directory = Path(config.hydra.sweep.dir)

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs and write the report; leaves with SystemExit where that is not 0."""
        from lightning_module.sweep_report import report

        try:
            overrides = self._overrides(arguments)
            self._compose_each(overrides)
            with self._directory_of(overrides):
                self._run(overrides)
            jobs = report(self.directory)
        except SweepError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            print(
                "\nThe sweep was stopped. To go on with it, run the same command again with "
                f"hydra.sweeper.study={self.study}",
                file=sys.stderr,
            )
            raise SystemExit(130) from None
        if self._exit_code([job.state == "complete" for job in jobs]):
            raise SystemExit(1)

    def _run(self, overrides: list[Override]) -> None:
        raise NotImplementedError

    def _exit_code(self, complete: list[bool]) -> int:
        raise NotImplementedError

    def _describe(self, override: Override) -> dict[str, Any]:
        """A swept parameter as sweep.json holds it."""
        raise NotImplementedError

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
        if self.direction not in ("minimize", "maximize"):
            raise SweepError(
                f"hydra.sweeper.direction must be minimize or maximize; got {self.direction}"
            )
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        configured = [f"{key}={value}" for key, value in self.params.items()]
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
        """Compose each value of each setting once.

        Raises:
            SweepError: an unknown key or group; names the nearest that exists.
        """
        first = {o.get_key_element(): self._samples(o)[0] for o in overrides}
        for override in overrides:
            key = override.get_key_element()
            for value in self._samples(override):
                try:
                    self.validate_batch_is_legal(
                        [[f"{k}={v}" for k, v in {**first, key: value}.items()]]
                    )
                except HydraException as error:
                    raise SweepError(_with_nearest_key(str(error), self.config)) from None

    @staticmethod
    def _samples(override: Override) -> list[str]:
        """Values of an override, at least one of each kind."""
        if not override.is_sweep_override():
            return [override.get_value_element_as_str()]
        if override.is_discrete_sweep():
            return list(override.sweep_string_iterator())
        return [str(override.value().start)]

    @contextlib.contextmanager
    def _directory_of(self, overrides: list[Override]) -> Iterator[None]:
        """The sweep directory, as this process's own and made for these settings."""
        from lightning_module.sweep_jobs import JOBS, own_overrides

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
        if file.is_file():
            _same_or_refused(json.loads(file.read_text("utf-8")), wanted, self.study, other_name)
        elif self.directory.exists() and any(self.directory.iterdir()):
            raise SweepError(f"{self.directory} exists and holds no sweep: {other_name}")
        (self.directory / JOBS).mkdir(parents=True, exist_ok=True)
        with (self.directory / JOBS / "sweep.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SweepError(
                    f"another process runs the sweep {self.study} in {self.directory}: wait, or "
                    f"{other_name}"
                ) from None
            file.write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n", "utf-8")
            yield

    # -- running ---------------------------------------------------------------------------------

    def _launch(self, jobs: dict[int, Sequence[str]]) -> dict[int, Any]:
        """Run jobs, given as number to overrides, and return their records."""
        from lightning_module.sweep_jobs import FAILED, Job

        records = {}
        # A launcher numbers its jobs one after the other.
        for _, run in itertools.groupby(enumerate(sorted(jobs)), lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in run]
            try:
                returns: Sequence[JobReturn] = self.launcher.launch(
                    [jobs[number] for number in numbers], initial_job_idx=numbers[0]
                )
            except Exception as error:  # every launcher has its own
                raise SweepError(
                    f"what launches the jobs failed ({type(error).__name__}: {error}). To go on "
                    f"with the sweep, run the same command with hydra.sweeper.study={self.study}"
                ) from error
            for number, returned in zip(numbers, returns, strict=True):
                if returned.status == JobStatus.COMPLETED:
                    records[number] = returned.return_value
                else:  # not the training, but what starts and records it
                    reason = f"{returned._return_value}"
                    records[number] = Job(number, list(jobs[number]), "", FAILED, reason=reason)
        return records


class GridSweeper(_NamedSweeper):
    """Every combination of the listed values, as Hydra's own basic sweeper."""

    def _run(self, overrides: list[Override]) -> None:
        from lightning_module.sweep_jobs import COMPLETE, read_job

        settings = [[f"{o.get_key_element()}={v}" for v in self._samples(o)] for o in overrides]
        jobs = dict(enumerate(itertools.product(*settings)))
        for number in list(jobs):
            record = read_job(self.directory, number)
            if record is not None and record.state == COMPLETE:
                del jobs[number]
        self._launch(jobs)

    def _exit_code(self, complete: list[bool]) -> int:
        return 0 if all(complete) else 1

    def _describe(self, override: Override) -> dict[str, Any]:
        if not override.is_discrete_sweep():
            raise SweepError(
                f"{override.input_line}: a grid needs values, as in "
                f"{override.get_key_element()}=1,2,3; to search an interval add sweep=optuna"
            )
        return {"choices": self._samples(override)}


class OptunaSweeper(_NamedSweeper):
    """A search: each trial's parameters are chosen by what the trials before it gave.

    Trial n is drawn by a sampler made anew from `seed` + n. So what it tries depends on the seed
    and the results known by then, and not on whether the sweep was interrupted; a sampler that is
    seeded once would, gone on with, try its first points again.

    Args:
        study: see `_NamedSweeper`, as are objective, direction and params.
        objective: see there.
        direction: see there.
        params: see there; also `interval(a,b)` and `tag(log,interval(a,b))`.
        n_trials: in all, those of interrupted commands included.
        n_jobs: trials that run at the same time, where the launcher runs several.
        sampler: "tpe" or "random".
        startup_trials: drawn at random before tpe begins to choose.
        seed: of the sampler.
    """

    def __init__(
        self,
        study: str,
        objective: str,
        direction: str,
        params: DictConfig,
        n_trials: int,
        n_jobs: int,
        sampler: str,
        startup_trials: int,
        seed: int,
    ) -> None:
        super().__init__(study, objective, direction, params)
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.sampler, self.startup_trials, self.seed = sampler, startup_trials, seed

    def _run(self, overrides: list[Override]) -> None:
        import optuna
        from optuna.trial import Trial, TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {o.get_key_element(): _distribution(o) for o in overrides if o.is_sweep_override()}
        fixed = [
            f"{o.get_key_element()}={o.get_value_element_as_str()}"
            for o in overrides
            if not o.is_sweep_override()
        ]
        study = optuna.create_study(
            storage=f"sqlite:///{(self.directory / STUDY).absolute()}",
            study_name=self.study,
            direction=self.direction,
            load_if_exists=True,
        )
        interrupted = []
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            if set(trial.params) == set(space):
                interrupted.append(Trial(study, trial._trial_id))
            else:  # killed while its parameters were drawn
                study.tell(trial.number, state=TrialState.FAIL)
        while True:
            told = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
            size = min(self.n_jobs, max(self.n_trials - told, len(interrupted)))
            if size == 0:
                return
            batch, interrupted = interrupted[:size], interrupted[size:]
            while len(batch) < size:
                study.sampler = self._sampler_of(len(study.get_trials(deepcopy=False)))
                batch.append(study.ask(space))
            records = self._launch(
                {t.number: [*fixed, *(f"{k}={t.params[k]}" for k in space)] for t in batch}
            )
            for trial in batch:
                record = records[trial.number]
                if record.reason:
                    trial.set_user_attr("failed", record.reason)
                study.tell(trial, record.told(self.direction))

    def _overrides(self, arguments: list[str]) -> list[Override]:
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise SweepError("sweep=optuna needs Optuna: pip install 'triton-gru[sweep]'") from None
        overrides = super()._overrides(arguments)
        for name in ("n_trials", "n_jobs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SweepError(
                    f"hydra.sweeper.{name} must be a whole number of at least 1; got {value}"
                )
        if self.sampler not in ("tpe", "random"):
            raise SweepError(f"hydra.sweeper.sampler must be tpe or random; got {self.sampler}")
        if not any(o.is_sweep_override() for o in overrides):
            raise SweepError(
                "there is nothing to search: give ranges or choices, such as "
                "'optimizer.lr=tag(log,interval(0.001,0.03))' model.hidden_size=128,256"
            )
        return overrides

    def _sampler_of(self, number: int) -> Any:
        """The sampler that draws one trial."""
        import optuna

        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=self.seed + number)
        return optuna.samplers.TPESampler(
            seed=self.seed + number,
            n_startup_trials=self.startup_trials,
            constant_liar=self.n_jobs > 1,  # trials that run together shall not be the same
        )

    def _exit_code(self, complete: list[bool]) -> int:
        return 0 if any(complete) else 1

    def _describe(self, override: Override) -> dict[str, Any]:
        from optuna.distributions import distribution_to_json

        return json.loads(distribution_to_json(_distribution(override)))["attributes"]


def _distribution(override: Override) -> Any:
    """What Optuna draws a swept parameter from."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind = IntDistribution if whole else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        if isinstance(value, RangeSweep) and not value.shuffle:
            values = list(override.sweep_iterator())
            kind = IntDistribution if isinstance(values[0], int) else FloatDistribution
            return kind(min(values), max(values), step=abs(value.step))
        # In Hydra's own spelling, quotes included, which is how they reach the job.
        return CategoricalDistribution(
            [str(v) for v in override.sweep_iterator(transformer=Transformer.encode)]
        )
    except (ValueError, TypeError, IndexError) as error:
        raise SweepError(f"{override.input_line} cannot be searched: {error}") from None


def _same_or_refused(before: dict, wanted: dict, study: str, fix: str) -> None:
    """Refuse to go on with a sweep that searched something else."""
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
                f"{_difference(before[what], wanted[what])}. Go on with it as it was, or {fix}"
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


def _with_nearest_key(message: str, config: DictConfig) -> str:
    """Hydra's message on a setting or, on an unknown key, the one that was probably meant."""
    unknown = re.match(r"Could not override '([^']*)'", message)
    if unknown is None:
        return message
    key = unknown[1]
    known: list[str] = []

    def walk(node: DictConfig, path: str) -> None:
        for name in node:
            known.append(f"{path}{name}")
            child = node._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                walk(child, f"{path}{name}.")

    walk(OmegaConf.masked_copy(config, [k for k in config if k != "hydra"]), "")
    nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see triton-gru-train --help"
    return f"there is no setting {key} to sweep over or set; {hint}"
