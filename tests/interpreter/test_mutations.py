"""Kernels broken on purpose, one line each: the comparison with float64 must notice every one.

Each mutant is the package `triton_gru.kernels` with one text replaced, imported under another name.
"""

import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch

from tests.interpreter import harness
from tests.scan_cases import assert_close, make_case
from tests.tolerances import INTERPRETER_TOLERANCE
from triton_gru import kernels
from triton_gru.kernels import backward, forward
from triton_gru.plan.plan import COUNTER, SENTINEL

SOURCE = Path(kernels.__file__).parent
SEEDS = 10  # a mutant that survives so many interleavings has survived
_names = (f"mutant_{i}" for i in itertools.count())

# name: (file, text, its replacement, launch, what the problem must have)
MUTANTS = {
    "wait removed, sentinel": (
        "exchange.py",
        "while (missing != 0) & (left > 0):",
        "while (missing != 0) & (left < 0):",
        SENTINEL,
        {},
    ),
    "wait removed, counter": (
        "exchange.py",
        "while (seen < target) & (left > 0):",
        "while (seen < target) & (left < 0):",
        COUNTER,
        {},
    ),
    "wait looks at the first chunk only": (
        "exchange.py",
        "for i in tl.static_range(1, BLOCKS * K_BLOCKS):",
        "for i in tl.static_range(1, 1):",
        SENTINEL,
        {},
    ),
    "wait does not look at a narrow last chunk": (
        "exchange.py",
        "missing = missing | tl.reshape(last, [size], can_reorder=True)",
        "missing = missing | tl.reshape(last * 0, [size], can_reorder=True)",
        SENTINEL,
        {"H": 130},
    ),
    "narrow last chunk taken for a wide one": (
        "tile.py",
        "TAIL if i == K_BLOCKS - 1 else BLOCK_K, SPLIT_K",
        "BLOCK_K, SPLIT_K",
        SENTINEL,
        {"H": 130},
    ),
    "signal removed, sentinel": (
        "exchange.py",
        "tl.store(pointers, value, mask=mask)",
        "tl.store(pointers, value, mask=mask & (value != value))",
        SENTINEL,
        {},
    ),
    "signal removed, counter": (
        "exchange.py",
        'tl.atomic_add(counter, 1, sem="release", scope="gpu")',
        'tl.atomic_add(counter, 0, sem="release", scope="gpu")',
        COUNTER,
        {},
    ),
    "signal before the stores are out": (
        "exchange.py",
        'tl.atomic_add(counter, 1, sem="release", scope="gpu")',
        'tl.atomic_add(counter, 1, sem="relaxed", scope="gpu")',
        COUNTER,
        {},
    ),
    "state read one step too early, sentinel": (
        "forward.py",
        "base = states + before * slot",
        "base = states + tl.maximum(before - 1, 0) * slot",
        SENTINEL,
        {},
    ),
    "state read one step too early, counter": (
        "forward.py",
        "target = GROUP * step * (1 if RESET_AFTER else 2)",
        "target = GROUP * (step - 1) * (1 if RESET_AFTER else 2)",
        COUNTER,
        {},
    ),
    "gradients read one step too early": (
        "backward.py",
        "target = GROUP * (done + 1)",
        "target = GROUP * done",
        COUNTER,
        {},
    ),
    "r and z swapped, forward": (
        "forward.py",
        "h_r = total(acc_r,",
        "h_r = total(acc_z,",
        SENTINEL,
        {},
    ),
    "r and z swapped, backward": (
        "backward.py",
        "acc = product_own(zero, da_r, w_r",
        "acc = product_own(zero, da_z, w_r",
        "single",
        {},
    ),
    "reset dropped for the owner": (
        "forward.py",
        "h = tl.where(reset, 0.0, h)",
        "h = tl.where(reset, h, h)",
        SENTINEL,
        {"resets": True},
    ),
    "reset dropped for the others": (
        "forward.py",
        "from_rows = from_rows & (tile_reset == 0)",
        "from_rows = from_rows & (tile_reset == tile_reset)",
        SENTINEL,
        {"resets": True},
    ),
    "reset dropped in the backward": (
        "backward.py",
        "new = tl.where(reset, 0.0, new)",
        "new = tl.where(reset, new, new)",
        SENTINEL,
        {"resets": True},
    ),
    "end of a row ignored": (
        "forward.py",
        "h = tl.where(time < length, new, h) if HAS_LENGTHS else new",
        "h = new",
        SENTINEL,
        {"lengths": True},
    ),
    "u not waited for": (
        "forward.py",
        "counter, GROUP * (2 * step + 1), tl.where",
        "counter, GROUP * (2 * step), tl.where",
        COUNTER,
        {"reset_after": False},
    ),
    "own state taken from the exchange": (
        "gates.py",
        "return (1.0 - z) * n + z * h",
        "return (1.0 - z) * n + z * h.to(tl.float16).to(tl.float32)",
        SENTINEL,
        {},
    ),
    "a state that is NaN published as a number": (
        "exchange.py",
        "value = tl.where(value == value, value, nan)",
        "value = tl.where(value == value, value, 0.0)",
        SENTINEL,
        {"not_finite": True},
    ),
    "a gradient that is NaN published as a number": (
        "backward.py",
        "publish(out + own_out + padded, da_z, stored, PROTOCOL)",
        "publish(out + own_out + padded, tl.where(da_z == da_z, da_z, 0.0), stored, PROTOCOL)",
        "single",
        {"not_finite": True},
    ),
    "columns beyond H not held at 0, forward": (
        "forward.py",
        "new = tl.where(real, blend(z, n, h), 0.0)",
        "new = blend(z, n, h)",
        SENTINEL,
        {"not_finite": True, "H": 18, "reset_after": False},
    ),
    "columns beyond H not held at 0, backward": (
        "backward.py",
        "new = tl.where(real, before + total(acc, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION), 0.0)",
        "new = before + total(acc, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION)",
        "single",
        {"not_finite": True, "H": 1},
    ),
}


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    """Puts a mutant's kernels in the place of ours."""

    def load(file: str, text: str, replacement: str) -> None:
        name = next(_names)
        package = tmp_path / name
        package.mkdir()
        for path in SOURCE.glob("*.py"):
            source = path.read_text()
            if path.name == file:
                assert text in source, f"{file} holds no {text!r} any more"
                source = source.replace(text, replacement)
            (package / path.name).write_text(source.replace("triton_gru.kernels", name))
        monkeypatch.syspath_prepend(tmp_path)
        for direction, user in (("forward", forward), ("backward", backward)):
            module = importlib.import_module(f"{name}.{direction}")
            kernel = f"scan_{direction}_kernel"
            monkeypatch.setattr(user, kernel, getattr(module, kernel))

    yield load
    for module in [m for m in sys.modules if m.startswith("mutant_")]:
        del sys.modules[module]


def run(launch: str, seed: int, **problem) -> None:
    # Two programs at 20 columns; at 130 the last chunk of the vector is narrower than the others.
    case = make_case(3, 3, **({"H": 20, "reset_after": True} | problem), seed=seed)
    with harness.interleaving(seed):
        assert_close(case, launch, INTERPRETER_TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", MUTANTS)
def test_is_noticed(name, mutant):
    file, text, replacement, launch, problem = MUTANTS[name]
    mutant(file, text, replacement)
    for seed in range(SEEDS):
        try:
            run(launch, seed, **problem)
        except AssertionError:  # a wrong value, a deadlock or an access out of bounds
            return
    raise AssertionError(f"{name}: survived {SEEDS} interleavings")


@pytest.mark.parametrize("launch", ["single", SENTINEL, COUNTER])
def test_the_same_without_a_mutation_passes(launch, mutant):
    mutant("gates.py", "return (1.0 - z) * n + z * h", "return z * h + (1.0 - z) * n")
    for seed in range(SEEDS):
        run(launch, seed)
