"""Sweeps: a job of a sweep, and the report on all of them."""
