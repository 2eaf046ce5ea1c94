"""Callbacks of a run: progress, checkpoints, reports, early ends."""
