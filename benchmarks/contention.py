"""How much slower training becomes beside a process that keeps one processor busy.

    python -m benchmarks.contention --rounds 5

Trains the quickstart's model for a few seconds at a time, alone and beside the busy process, with
each setting of how waiting OpenMP threads wait. All cases run in turn, so that other load on the
machine affects all of them. Prints tokens per second (the median of the rounds) and their ratios
to OpenMP's own behaviour alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from lightning_module.commands import WAITING

# For libgomp, part of torch's wheels for Linux; see `WAITING` for the default of the commands.
SETTINGS: dict[str, dict[str, str]] = {
    "OpenMP's own": {},
    "the commands'": WAITING,
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spins 1000": {"GOMP_SPINCOUNT": "1000"},
    "spins 10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = "while True: pass"
TRAINING = """
import json, sys, time
import torch
from lightning_module.model import SentencePredictor

seconds = float(sys.argv[1])
torch.manual_seed(0)
model = SentencePredictor(65, layer_type={"name": "gru"}, embedding_size=64, hidden_size=256)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
tokens = torch.randint(65, (65, 32))

def step():
    logits, _ = model(tokens[:-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

for _ in range(3):
    step()
begun, count = time.perf_counter(), 0
while time.perf_counter() < begun + seconds:
    step()
    count += 1
print(count * 64 * 32 / (time.perf_counter() - begun))
"""


def tokens_per_second(setting: dict[str, str], busy: bool, seconds: float) -> float:
    """The speed of a training in its own process."""
    spins = ("OMP_", "GOMP_", "KMP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(spins)} | setting
    neighbour = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        done = subprocess.run(
            [sys.executable, "-c", TRAINING, str(seconds)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each training")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--json", action="store_true", help="print every figure as JSON instead")
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "beside": []} for name in arguments.settings
    }
    for _ in range(arguments.rounds):
        for name in arguments.settings:
            for where in ("alone", "beside"):
                speed = tokens_per_second(SETTINGS[name], where == "beside", arguments.seconds)
                found[name][where].append(speed)
    if arguments.json:
        print(json.dumps({"processors": os.cpu_count(), "tokens_per_second": found}, indent=1))
        return
    first = found[arguments.settings[0]]["alone"]
    print(f"{'':<16}{'alone':>10}{'beside':>10}{'alone / first':>16}{'alone / beside':>16}")
    for name, speeds in found.items():
        alone, beside = (statistics.median(speeds[where]) for where in ("alone", "beside"))
        # Round by round, so that a slow round affects both.
        cost = statistics.median(a / b for a, b in zip(speeds["alone"], first, strict=True))
        slower = statistics.median(
            a / b for a, b in zip(speeds["alone"], speeds["beside"], strict=True)
        )
        print(f"{name:<16}{alone:>10,.0f}{beside:>10,.0f}{cost:>16.3f}{slower:>16.2f}")


if __name__ == "__main__":
    main()
