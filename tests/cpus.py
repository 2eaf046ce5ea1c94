"""Runs the numerics tests as CPUs of other kinds would compute: `make cpus`.

ATen, MKL and oneDNN each choose their kernels by what the CPU can do; the order of sums, and with
it the last bits, differ. Environment variables make each take those of a lesser CPU:

    ATEN_CPU_CAPABILITY      default, avx2, and what the machine has
    MKL_ENABLE_INSTRUCTIONS  SSE4_2, AVX2, AVX512  (on AMD, MKL may take its own choice)
    ONEDNN_MAX_CPU_ISA       SSE41, AVX2, AVX512_CORE

ATen's three with each pair of the libraries', on one and on two threads, are 18 runs. An AMD CPU
with AVX-512 is alike to ATen's widest with MKL's narrower ones. What each library says it took is
printed before its tests.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ATEN = ("default", "avx2", "native")
# MKL's and oneDNN's names for the same three.
LIBRARIES = (("SSE4_2", "SSE41"), ("AVX2", "AVX2"), ("AVX512", "AVX512_CORE"))
THREADS = (1, 2)
# The layer, and its kernels under the interpreter, whose oracle and input projection are torch's.
TESTS = (
    "tests/triton_gru",
    *(f"--ignore=tests/triton_gru/{room}" for room in ("kernels", "plan")),  # compute nothing
)
KERNELS = ("tests/interpreter/test_layer.py", "tests/interpreter/test_trace.py")
# What compares two ways to one result, in a minute and a half on two cores.
QUICK = tuple(
    f"tests/triton_gru/{name}.py"
    for name in ("test_equations", "engines/test_varlen", "test_step", "test_cell", "test_trace")
)
QUICK_RUNS = (
    ("default", *LIBRARIES[0], 1),
    ("avx2", *LIBRARIES[1], 2),
    ("native", *LIBRARIES[1], 1),
)
QUICK_ONLY = "not finite_differences and not second_derivatives and not integers"
# Asks each library once, which makes it say what it runs on.
ASK = """
import torch
print("ATen", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), flush=True)
x = torch.randn(64, 64)
x @ x, torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
"""


def environment(aten: str, mkl: str, onednn: str, threads: int) -> dict[str, str]:
    """That of this process, with the variables of one run."""
    variables = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    variables |= {"MKL_ENABLE_INSTRUCTIONS": mkl, "ONEDNN_MAX_CPU_ISA": onednn}
    variables["OMP_NUM_THREADS"] = str(threads)
    return variables if aten == "native" else variables | {"ATEN_CPU_CAPABILITY": aten}


def taken(variables: dict[str, str]) -> str:
    """What the libraries say they run on; raises where ATen does not follow the variables."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK],
        env=variables | {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    (aten,) = (line.split()[1:] for line in lines if line.startswith("ATen "))
    # "native" on a CPU without AVX2 is "default": a machine cannot take what it lacks.
    asked = variables.get("ATEN_CPU_CAPABILITY")
    if (asked == "default" and aten[0] != "DEFAULT") or aten[1] != variables["OMP_NUM_THREADS"]:
        raise SystemExit(f"asked for {asked}, {variables['OMP_NUM_THREADS']} threads; got {aten}")
    mkl = next((line for line in lines if line.startswith("MKL_VERBOSE one")), "none")
    onednn = next((line for line in lines if ",cpu,isa:" in line), "none")
    return (
        f"ATen {aten[0]}, {aten[1]} threads; "
        f"MKL: {mkl.partition('architecture ')[2].partition(' enabled')[0] or mkl}; "
        f"oneDNN: {onednn.partition('isa:')[2] or onednn}"
    )


def run_tests(arguments: list[str], variables: dict[str, str]) -> bool:
    """Whether they pass; what pytest says goes to the terminal."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    pytest += ["-m", "not soak", "-r", "fE", "--no-header"]
    return subprocess.run([*pytest, *arguments], env=variables, cwd=ROOT).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three runs of what differs most")
    quick = parser.parse_args().quick
    runs = QUICK_RUNS if quick else [
        (aten, *libraries, threads)
        for aten, libraries, threads in itertools.product(ATEN, LIBRARIES, THREADS)
    ]  # fmt: skip
    failed = []
    for run in runs:
        variables, start = environment(*run), time.monotonic()
        name = taken(variables)
        print(f"--- {name}", flush=True)
        passed = run_tests([*QUICK, "-k", QUICK_ONLY] if quick else [*TESTS, "-n", "2"], variables)
        if not quick:
            passed &= run_tests([*KERNELS], variables | {"TRITON_INTERPRET": "1"})
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        failed += [] if passed else [name]
    if failed:
        raise SystemExit("\n".join(["Failed as computed by:", *failed]))
    print(f"Passed in {len(runs)} ways to compute.")


if __name__ == "__main__":
    main()
