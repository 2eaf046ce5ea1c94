"""Callbacks of a run: what is shown, saved and reported, and what ends it early."""
