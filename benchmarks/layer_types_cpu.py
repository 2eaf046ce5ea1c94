"""A training step of each layer type against the GRU's, at equal units and equal parameters.

    python -m benchmarks.layer_types_cpu

Times are CPU times of the process, one thread, with the layer types in turn, so that other
processes affect them least; a ratio is the median over the rounds of the ratio within a round.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from lightning_module.data.chunks import Chunk
from lightning_module.model import LAYER_TYPES, SentencePredictor

VOCABULARY, EMBEDDING, STEPS, BATCH_SIZE = 82, 64, 64, 32
# Equal to the GRU's at 256 within 0.3 %, as in conf/experiment/compare.yaml.
UNITS = {"gru": 256, "gru_reset_before": 256, "lstm": 219, "rnn": 449}


def seconds_a_step(layer_type: str, hidden_size: int, repeats: int) -> tuple[float, int]:
    """CPU seconds of forward, backward and optimizer, and the number of parameters."""
    torch.manual_seed(0)
    model = SentencePredictor(
        VOCABULARY, {"name": layer_type}, embedding_size=EMBEDDING, hidden_size=hidden_size
    )
    model.log = lambda *_, **__: None  # there is no trainer
    optimizer = partial(torch.optim.AdamW, fused=True)(model.parameters())
    tokens = torch.randint(VOCABULARY, (2, STEPS, BATCH_SIZE))
    chunk = Chunk(tokens[0], tokens[1], torch.ones(BATCH_SIZE, dtype=torch.bool))
    for repeat in range(repeats + 2):
        if repeat == 2:
            begun = time.process_time()
        optimizer.zero_grad()
        model.training_step(chunk, repeat).backward()
        optimizer.step()
    return (time.process_time() - begun) / repeats, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=4, help="steps per round and layer type")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"T {STEPS}, B {BATCH_SIZE}, E {EMBEDDING}, {VOCABULARY} tokens; the GRU's step is 1")
    print("| layer | units | parameters | time per step |\n|---|---|---|---|")
    cases = [
        (layer_type, units)
        for layer_type in LAYER_TYPES
        for units in sorted({256, UNITS[layer_type]})
    ]
    times = {case: [] for case in cases}
    parameters = {}
    for _ in range(arguments.rounds):
        for case in cases:
            seconds, parameters[case] = seconds_a_step(*case, arguments.repeats)
            times[case].append(seconds)
    for case in cases:
        ratios = [t / gru for t, gru in zip(times[case], times["gru", 256], strict=True)]
        print(
            f"| {case[0]} | {case[1]} | {parameters[case]:,} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
