"""The sweepers of `triton-gru-train -m`: a grid, and a search with Optuna.

They are here because Hydra loads plugins only from the namespace `hydra_plugins`.
lightning_module/sweeps/jobs.py runs a job. These choose the jobs: grid.py all combinations,
search.py those that Optuna draws; common.py is the common part.

Rules of both:
- A sweep has a name, `hydra.sweeper.study`, hence a directory, `multirun/NAME`. The same command
  with the same name resumes it: complete jobs stay, interrupted ones resume from their checkpoint
  in their own directory. Its sweep.json has the search space; other settings under the same name
  are refused, because their results are not comparable.
- Every setting is composed once before the first job starts, so that an unknown key stops
  the command before any job.
- A job that diverges or dies is recorded as failed and the sweep continues. The grid exits with 1
  if any job failed, because each was requested; a search if all did, because finding where training
  fails is part of a search. A resumed grid runs failed jobs again; a search does not, because its
  sampler has already used their results.

Why not hydra-optuna-sweeper (1.3.0, the newest): it requires Optuna below 3, and the distribution
classes it imports were removed in Optuna 5. When resumed it numbers jobs from 0, into the
directories of earlier jobs, and runs all trials again.
"""
