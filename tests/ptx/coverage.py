"""The cases of `make soak`, and how one of them runs by itself:

python -m tests.ptx.coverage 17          # the case of that number, with its error if it fails
python -m tests.ptx.coverage 0 400 OUT   # cases 0 to 399, one JSON line each
"""

import itertools
import json
import random
import sys
import time

from tests.ptx import cases

# T, B, H and directions: H with tails of every kind, B below, at and above a tile of 16 rows.
SHAPES = [
    (5, 3, 17), (1, 1, 33), (4, 17, 18), (3, 3, 65), (3, 16, 32), (4, 20, 48, 2), (3, 3, 128),
    (4, 1, 130), (3, 3, 100, 2), (3, 16, 160), (2, 3, 256),
]  # fmt: skip
ARCHS = (80, 86, 89, 90, 100)
LAUNCHES = ("single", "sentinel", "counter")
# What is asked of a group's plan besides: (what it must have, what is set).
PLANS = [
    ({}, {}),
    ({"by_block": True}, {}),
    ({"columns": 16, "warps": 4}, {"in_registers": 1}),
    ({}, {"stage_all": False, "merge": False}),
    ({"columns": 16, "warps": 8}, {}),
    ({}, {"groups_a_launch": 1}),
]


def scans():
    """(arguments, options) of `cases.run_scan`."""
    every = itertools.product(SHAPES, ARCHS, cases.PRECISIONS, LAUNCHES, (True, False))
    for n, (shape, arch, precision, launch, reset_after) in enumerate(every):
        r = random.Random(n)
        wanted, force = r.choice(PLANS) if launch != "single" else ({}, {})
        if "in_registers" in force and precision == "ieee":
            wanted, force = {}, {}
        options = {
            "lengths": r.random() < 0.5,
            "resets": r.choice((False, False, True, True)),
            "bias": r.random() < 0.8,
            "save_gates": r.random() < 0.3,
            "pieces": r.choice((None, None, None, 2)),
            "not_finite": r.random() < 0.2,
            "seed": r.randrange(1000),
            "apart": r.random() < 0.15,
            "wanted": wanted,
            "force": force,
        }
        yield (shape, precision, launch, arch, reset_after), options


def first_choices():
    """What the planner takes for the sizes that people train."""
    sizes, every = (128, 256, 384, 512, 650, 768, 1024), (90, 80, 100)
    for n, (H, arch, precision) in enumerate(
        itertools.product(sizes, every, ("bf16", "fp16", "tf32"))
    ):
        shape = (2, (1, 16, 20)[n % 3], H)
        yield (shape, precision, "best", arch, n % 2 == 0), {"seed": n, "lengths": n % 3 == 0}


def steps():
    """(arguments, options) of `cases.run_step`."""
    every = itertools.product((1, 3, 20), (17, 48, 130), cases.PRECISIONS, ARCHS, (True, False))
    for n, arguments in enumerate(every):
        yield arguments, {"bias": n % 3 > 0, "data": n, "seed": n}


def listed() -> list:
    """(function, arguments, options), shuffled once and for all."""
    out = [(cases.run_scan, *case) for case in itertools.chain(scans(), first_choices())]
    out += [(cases.run_step, *case) for case in steps()]
    random.Random(5).shuffle(out)
    return out


def verdict(function, arguments, options):
    """(None or why the case fails, its Outcome or None)."""
    try:
        outcome = function(*arguments, **options)
    except Exception as error:  # whatever it is, the case is named with it
        return f"{type(error).__name__}: {error}", None
    wrong = outcome.wrong() if outcome else {}
    return (f"above {outcome.tolerance}: {wrong}" if wrong else None), outcome


def main(first, last, path=None):
    every = listed()
    for n in range(int(first), min(int(last), len(every))):
        function, arguments, options = every[n]
        started = time.process_time()
        why, outcome = verdict(function, arguments, options)
        row = {
            "case": n, "arguments": arguments, "options": options, "fails": why,
            "planned": outcome is not None or why is not None,
            "largest": max(outcome.errors.values()) / outcome.tolerance if outcome else None,
            "seconds": round(time.process_time() - started, 2),
        }  # fmt: skip
        if path:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
        else:
            print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main(*(sys.argv[1:] if len(sys.argv) > 2 else (sys.argv[1], int(sys.argv[1]) + 1)))
