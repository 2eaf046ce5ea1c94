"""The sweepers of `triton-gru-train -m`: a grid, and a search with Optuna.

They lie here because Hydra takes plugins from the namespace `hydra_plugins` alone. What a job is,
and how it runs, is in lightning_module/sweeps/jobs.py. These decide which jobs there are: grid.py
takes all combinations, search.py what Optuna draws, and common.py is what holds for both.

Both keep to the same rules:
- A sweep has a name, `hydra.sweeper.study`, hence a directory, `multirun/NAME`. The same command
  with the same name resumes it: what is complete stays, what was interrupted resumes from its
  checkpoint in its own directory. sweep.json in it holds what is searched; other settings under
  the same name are refused, because their results would not compare.
- Every setting is composed once before the first job starts, so that an unknown key stops nothing
  but the command.
- A job that diverges or dies is recorded as failed and the sweep goes on. In the end the grid exits
  with 1 if any job failed, because each of them was asked for by name; a search does if all did,
  because to find where training fails is part of searching. A grid tries failed jobs again when it
  is resumed; a search does not, its sampler has already learned from them.

Why not hydra-optuna-sweeper (1.3.0, the newest): it requires Optuna below 3, and the distribution
classes it imports are gone from Optuna 5. When it is resumed it numbers jobs from 0, into the
directories of the jobs before, and runs all trials again.
"""
