"""The width of offsets, in what the compiler makes of the kernels."""

import os
import re

import pytest
import torch

from triton_gru.plan.devices import DEVICES
from triton_gru.plan.plan import Problem, step_tiles
from triton_gru.plan.planner import best_plan

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import machine_code
from triton_gru.kernels import step


def test_offsets_of_resets_and_of_a_step_have_64_bits():
    """T * B * D may be 2^31 and more, and so may B * 3H in a step."""
    tiles = step_tiles("bfloat16")
    for phase in (0, 1, 2):
        compiled = machine_code.assemble(
            step.step_kernel,
            machine_code.step_constants(tiles, phase),
            torch.bfloat16,
            90,
            tiles.warps,
            aligned=True,
            stages=tiles.stages,
        )
        text = compiled.asm["ttir"]
        constants = set(re.findall(r"(%\S+) = arith\.constant", text))
        products = re.findall(r"arith\.muli (%\S+), (%\S+) : (?:tensor<\S+xi32>|i32)", text)
        # Only of a program's number with the size of a tile, and of H with 2 and 3.
        assert products and all(constants.intersection(product) for product in products)
    for direction in ("forward", "backward"):
        problem = Problem(16, 300, "float32", True, direction)
        plan = best_plan(problem, DEVICES[90])
        compiled = machine_code.assemble(
            machine_code.scan_kernel(plan),
            machine_code.scan_constants(plan, problem, 90, uneven=True),
            torch.float32,
            90,
            plan.warps,
            aligned=False,
        )
        offsets = re.findall(
            r"tt\.addptr %resets, %\S+ : !tt\.ptr<i32>, (\S+)", compiled.asm["ttir"]
        )
        assert offsets and set(offsets) == {"i64"}
