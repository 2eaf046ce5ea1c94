"""Learning rate schedules: factors on the peak rate, as functions of the progress of the run.

The progress comes from `training_progress.py`, so a schedule needs no number of steps.
`conf/scheduler/` names them; to add one, write such a function and a file there.
"""

import math


def cosine(used: float, *, warmup: float, final_lr: float) -> float:
    """A linear rise, then half a cosine (Loshchilov and Hutter 2017).

    Args:
        used: progress of the run, 0 to 1.
        warmup: progress until which the rate rises from 0.
        final_lr: factor at the end.
    """
    falling = final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * used))
    return _rise(used, warmup) * falling


def constant(used: float, *, warmup: float) -> float:
    """A linear rise until progress `warmup`, then the peak rate."""
    return _rise(used, warmup)


def _rise(used: float, warmup: float) -> float:
    return min(1.0, used / warmup) if warmup > 0 else 1.0
