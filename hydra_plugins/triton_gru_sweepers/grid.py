"""`sweep=grid`: every combination of the listed values.

Not Optuna's GridSampler (tried, 5.0): it shuffles the combinations, counts a failed one as visited
(here the same command runs incomplete ones again), ends ask-and-tell with a RuntimeError, and would
make the grid need the extra `sweep`. Its loop would be longer than `_run`.
"""

import itertools
from typing import Any

from hydra.core.override_parser.types import Override

from hydra_plugins.triton_gru_sweepers.common import NamedSweeper, SweepError


class GridSweeper(NamedSweeper):
    """Every combination of the listed values, as Hydra's own basic sweeper."""

    def _run(self, overrides: list[Override]) -> None:
        from lightning_module.sweeps.jobs import COMPLETE, read_job

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
