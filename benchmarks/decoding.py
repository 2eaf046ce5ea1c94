"""Decoding with GRU.step against running the prefix again: `python -m benchmarks.decoding`.

A SentencePredictor takes the likeliest token, `--tokens` times, for several rows at once: with
`SentencePredictor.step`, and by running the whole prefix again for every token, as a model without
a state must. Both must give the same tokens. Prints microseconds per token of all rows, and the
median of the ratios of repeats that ran one after another.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_module.model import SentencePredictor

VOCABULARY = 84
# (rows, hidden_size, layers)
SHAPES = [(1, 256, 1), (16, 256, 1), (1, 256, 2)]


def by_steps(model: SentencePredictor, tokens: Tensor, count: int) -> Tensor:
    generated, state = [tokens], None
    for _ in range(count):
        logits, state = model.step(generated[-1], state)
        generated.append(logits.argmax(-1))
    return torch.stack(generated)


def by_prefixes(model: SentencePredictor, tokens: Tensor, count: int) -> Tensor:
    generated = tokens.unsqueeze(0)
    for _ in range(count):
        logits, _ = model(generated)
        generated = torch.cat([generated, logits[-1:].argmax(-1)])
    return generated


def seconds(clock: Callable, decode: Callable, *arguments) -> tuple[float, Tensor]:
    start = clock()
    generated = decode(*arguments)
    return clock() - start, generated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="to generate (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="of each shape (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure CPU time, for a machine with other load",
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.tokens} tokens, float32")
    for rows, hidden_size, layers in SHAPES:
        model = SentencePredictor(VOCABULARY, hidden_size=hidden_size, num_layers=layers).eval()
        tokens = torch.randint(VOCABULARY, (rows,))
        steps, ratios = [], []
        with torch.inference_mode():
            for _ in range(options.repeats):
                one, generated = seconds(clock, by_steps, model, tokens, options.tokens)
                whole, again = seconds(clock, by_prefixes, model, tokens, options.tokens)
                if not torch.equal(generated, again):
                    raise RuntimeError("step and prefix give different tokens")
                steps.append(one / options.tokens)
                ratios.append(whole / one)
        print(
            f"rows {rows}, hidden_size {hidden_size}, layers {layers}: "
            f"{statistics.median(steps) * 1e6:.0f} us per step, "
            f"the prefix again takes {statistics.median(ratios):.1f} times as long "
            f"({min(ratios):.1f}-{max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()
