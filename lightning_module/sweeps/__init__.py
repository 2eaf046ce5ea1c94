"""Sweeps: the job of a sweep, and the report on all of them."""
