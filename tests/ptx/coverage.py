"""The cases of `make soak`, and how some of them run by themselves:

python -m tests.ptx.coverage 17           # the case of that number, with its error if it fails
python -m tests.ptx.coverage 0 400 OUT    # cases 0 to 399, one JSON line each, but those in OUT
"""

import dataclasses
import functools
import itertools
import json
import os
import random
import sys
import time

import triton

from tests.ptx import cases
from triton_gru.plan.devices import DEVICES, for_triton
from triton_gru.plan.plan import Plan, Problem
from triton_gru.plan.planner import all_plans

# T, B, H and directions. B below, at and above a tile of 16 rows. H alone in its padding (1), below
# and at a multiple of 16, in one piece of K and in several whose last is whole, a half or a
# quarter; `test_kernels.py` checks that none is missing.
SHAPES = [
    (4, 3, 1), (3, 16, 1, 2), (5, 3, 17), (1, 1, 33), (4, 17, 18), (3, 3, 65), (3, 16, 32),
    (4, 20, 48, 2), (3, 3, 128), (4, 1, 130), (3, 3, 100, 2), (3, 16, 160), (2, 3, 256),
    (2, 20, 300), (2, 16, 320), (2, 3, 330), (2, 1, 384), (2, 1, 650),
]  # fmt: skip
ARCHS = (80, 86, 89, 90, 100)
ARCHS_A_GROUP = 2  # of them each scan of groups is compiled for, in turn
LAUNCHES = ("single", "sentinel", "counter")
# What is asked of a group's plan besides: (what it must have, what is set).
PLANS = [
    ({}, {}),
    ({"by_block": True}, {}),
    ({"block_n": 16, "warps": 4}, {"in_registers": 1}),
    ({}, {"stage_all": False}),
    ({"block_n": 16, "warps": 8}, {}),
    ({"warps": 4}, {}),
    ({}, {"groups_a_launch": 1}),
]
FIRST_CHOICES = (*range(128, 1025, 64), 650)  # sizes whose first choices are run
ORDERS = 20  # seeds that a group kernel runs with; a single program has no others to wait for


@dataclasses.dataclass
class Case:
    """One case.

    Attributes:
        function: `cases.Scan` or `cases.run_step`.
        arguments, options: what it takes.
        seeds: orders of programs and warps it runs with; every fourth has the warps apart.
    """

    function: object
    arguments: tuple
    options: dict
    seeds: int = 1

    def verdict(self):
        """(None or why the case fails, largest error as a share of what is allowed, runs)."""
        largest, runs = 0.0, 0
        try:
            for outcome in self.outcomes():
                runs += 1
                largest = max(largest, max(outcome.errors.values()) / outcome.tolerance)
                if outcome.wrong():
                    return f"run {runs}: above {outcome.tolerance}: {outcome.wrong()}", None, runs
        except Exception as error:  # whatever it is, the case is named with it
            return f"run {runs + 1}: {type(error).__name__}: {error}", None, runs + 1
        return None, largest, runs

    def outcomes(self):
        if self.function is cases.run_step:
            yield cases.run_step(*self.arguments, **self.options, seed=0)
            return
        scan = cases.Scan(*self.arguments, **self.options)
        first = self.options["data"]
        for seed in range(first, first + self.seeds):
            yield scan.run(seed=seed, apart=seed % 4 == 3)


def scans():
    """Every shape, precision, launch and variant; the rest as a seeded generator picks."""
    every = itertools.product(SHAPES, cases.PRECISIONS, LAUNCHES, (True, False))
    for n, (shape, precision, launch, reset_after) in enumerate(every):
        for k in range(len(ARCHS) if launch == "single" else ARCHS_A_GROUP):
            arch = ARCHS[(2 * n + k) % len(ARCHS)]
            r = random.Random(1000 * n + arch)
            wanted, force = r.choice(PLANS) if launch != "single" else ({}, {})
            if "in_registers" in force and precision == "ieee":
                wanted, force = {}, {}
            options = {
                "lengths": r.random() < 0.5,
                "resets": r.random() < 0.5,
                "bias": r.random() < 0.8,
                "save_gates": r.random() < 0.3,
                "pieces": r.choice((None, None, None, 2)),
                "not_finite": r.random() < 0.2,
                "data": r.randrange(1000),
                "wanted": wanted,
                "force": force,
            }
            arguments = shape, precision, launch, arch, reset_after
            if cases.Scan(*arguments, **options).plans is None:
                options |= {"wanted": {}, "force": {}}
                if cases.Scan(*arguments, **options).plans is None:
                    continue  # as a single program of 256 columns
            yield Case(cases.Scan, arguments, options, 1 if launch == "single" else ORDERS)


def kind(plan: Plan) -> tuple:
    """What plans have in common that differ in the numbers of programs and pieces alone."""
    return (
        *(plan.direction, plan.kernel, plan.protocol, plan.by_block, plan.block_m, plan.block_n),
        *(plan.warps, plan.split_k, plan.stage_all, plan.block_k),
        *(min(plan.k_blocks, 2), plan.tail, plan.in_registers),
    )


def first_choices():
    """One of each kind of pair of plans that the planner takes for 128 to 1024 columns."""
    found = {}
    devices = {arch: for_triton(DEVICES[arch], triton.__version__) for arch in ARCHS}
    sizes = sorted(FIRST_CHOICES)
    for H, B, arch, precision, reset_after in itertools.product(
        sizes, (1, 3, 16, 20), ARCHS, cases.PRECISIONS, (True, False)
    ):
        dtype = "float32" if precision in ("tf32", "ieee") else "bfloat16"
        problem = Problem(B, H, dtype, reset_after, tensor_cores=precision != "ieee")
        plans = [
            all_plans(dataclasses.replace(problem, direction=d), devices[arch])
            for d in ("forward", "backward")
        ]
        if all(plans):
            width = "16 bit" if dtype == "bfloat16" else precision
            key = (width, reset_after, *(kind(p[0]) for p in plans))
            # Of the smallest size that has the kind; 16-bit dtypes share their plans.
            same = found.setdefault(key, [])
            if not same or same[0][0] == H:
                same.append((H, B, arch, precision, plans[0][0].group > 1))
    for n, ((_, reset_after, *_), same) in enumerate(found.items()):
        H, B, arch, precision, group = same[n % len(same)]
        options = {"data": n, "lengths": n % 3 == 0, "resets": n % 4 == 1}
        arguments = (2, B, H), precision, "best", arch, reset_after
        yield Case(cases.Scan, arguments, options, ORDERS if group else 1)


def steps():
    shapes = itertools.product((1, 3, 16, 20), (1, 17, 48, 130))
    every = itertools.product(shapes, cases.PRECISIONS, (True, False))
    for n, ((B, H), precision, reset_after) in enumerate(every):
        options = {"bias": n % 3 > 0, "data": n}
        yield Case(cases.run_step, (B, H, precision, ARCHS[n % 5], reset_after), options)


@functools.cache
def listed() -> list[Case]:
    """All cases, shuffled once and for all: the first of them are a fair sample."""
    out = [*scans(), *first_choices(), *steps()]
    random.Random(5).shuffle(out)
    return out


def main(first, last, path=None):
    done = set()
    if path and os.path.exists(path):
        with open(path) as file:
            done = {json.loads(line)["case"] for line in file}
    for n, case in enumerate(listed()[int(first) : int(last)], int(first)):
        if n in done:
            continue
        started = time.process_time()
        why, largest, runs = case.verdict()
        row = {
            "case": n, "arguments": case.arguments, "options": case.options, "runs": runs,
            "fails": why, "largest": largest,
            "seconds": round(time.process_time() - started, 2),
        }  # fmt: skip
        if path:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
        else:
            print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main(*(sys.argv[1:] if len(sys.argv) > 2 else (sys.argv[1], int(sys.argv[1]) + 1)))
