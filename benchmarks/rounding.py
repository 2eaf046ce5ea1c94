"""How much the two exchanges of the backward round: dh, or the gradients of the gates.

    python -m benchmarks.rounding

Runs both kernels in the emulator of `tests/ptx` (from the repository's root, no GPU), from the
exact y, and prints as a Markdown table the relative error (Euclidean norm) against float64: of the
gradient by gates_x, and of the worst gradient.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # read by triton as it is imported

from tests.ptx.cases import DTYPES, Scan, plan_of
from tests.scan_cases import errors
from triton_gru.plan.plan import GLUON, SENTINEL

SHAPES = (32, 8, 128), (24, 8, 256)


def largest(precision: str, reset_after: bool, launch: str) -> tuple[float, float]:
    """By gates_x, and of all gradients, the larger one of SHAPES."""
    found = []
    for shape in SHAPES:
        scan = Scan(shape, precision, GLUON, 90, reset_after)
        scan.plans[1] = plan_of(shape, "backward", launch, 90, precision, reset_after, {})
        results, exact = scan.backward_results(weak=False), dict(scan.exact)
        del exact["y"]
        whole = {name: error for name, (error, _) in errors(results, exact).items()}
        found.append((whole["gates_x"], max(whole.values())))
    return max(one for one, _ in found), max(worst for _, worst in found)


def main() -> None:
    print("| dtype, reset_after | gates' gradients exchanged | dh exchanged |\n|---|---|---|")
    for precision in ("bf16", "fp16"):
        for reset_after in (True, False):
            cells = [
                f"{one:.1e}, {worst:.1e}"
                for one, worst in (largest(precision, reset_after, x) for x in (SENTINEL, GLUON))
            ]
            name = str(DTYPES[precision]).removeprefix("torch.")
            print(f"| {name}, {reset_after} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
