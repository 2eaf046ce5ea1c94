"""`sweep=optuna`: a search."""

import json
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from omegaconf import DictConfig

from hydra_plugins.triton_gru_sweepers.common import NamedSweeper, SweepError

STUDY = "study.db"


class OptunaSweeper(NamedSweeper):
    """A search: the parameters of each trial are chosen by the results of earlier trials.

    Trial n is drawn by a new sampler with seed `seed` + n. So its parameters depend on the seed and
    the results so far, and not on interruptions; a sampler that is seeded once would try its first
    points again after a resume.

    Args:
        study: see `NamedSweeper`, as are objective, direction and params.
        objective: see there.
        direction: see there.
        params: see there; also `interval(a,b)` and `tag(log,interval(a,b))`.
        n_trials: total number, including those of interrupted commands.
        n_jobs: trials that run at the same time, if the launcher runs several.
        sampler: "tpe" or "random".
        startup_trials: trials drawn at random before tpe starts.
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
        database = (self.directory / STUDY).absolute()
        database.touch()  # SQLite would create it readable for the group only, with any umask
        study = optuna.create_study(
            storage=f"sqlite:///{database}",
            study_name=self.study,
            direction=self.direction,
            load_if_exists=True,
        )
        interrupted = []
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            if trial.distributions == space:  # the stored search space is that of this command
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
            constant_liar=self.n_jobs > 1,  # trials that run at the same time must differ
        )

    def _exit_code(self, complete: list[bool]) -> int:
        return 0 if any(complete) else 1

    def _describe(self, override: Override) -> dict[str, Any]:
        from optuna.distributions import distribution_to_json

        return json.loads(distribution_to_json(_distribution(override)))["attributes"]


def _distribution(override: Override) -> Any:
    """Optuna's distribution of a swept parameter."""
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
        # In Hydra's spelling, with quotes, as the job receives them.
        return CategoricalDistribution(
            [str(v) for v in override.sweep_iterator(transformer=Transformer.encode)]
        )
    except (ValueError, TypeError, IndexError) as error:
        raise SweepError(f"{override.input_line} cannot be searched: {error}") from None
