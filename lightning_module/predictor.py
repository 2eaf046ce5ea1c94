"""The former place of `model.py`, which pickles of whole models name."""

from lightning_module.model import LockedDropout, SentencePredictor

__all__ = ["LockedDropout", "SentencePredictor"]
