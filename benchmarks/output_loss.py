"""The fused output loss against the plain one: time and peak memory of forward and backward.

    python -m benchmarks.output_loss [--positions 2048] [--hidden 256]

The basis of `FUSED_LOSS_VOCABULARY` in lightning_module/model.py.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    arguments = parser.parse_args()
    x = torch.randn(arguments.positions, arguments.hidden, requires_grad=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, x {tuple(x.shape)}")
    for vocabulary in (1000, 2000, 4000, 8000, 16000, 32000):
        weight = torch.randn(vocabulary, arguments.hidden, requires_grad=True)
        bias = torch.zeros(vocabulary, requires_grad=True)
        targets = torch.randint(vocabulary, (len(x),))
        losses = {
            "plain": lambda w=weight, b=bias, t=targets: F.cross_entropy(F.linear(x, w, b), t),
            "fused": lambda w=weight, b=bias, t=targets: F.linear_cross_entropy(
                x, w, t, linear_bias=b
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(7):
            for name, loss in losses.items():
                begun = time.perf_counter()
                loss().backward()
                seconds[name].append(time.perf_counter() - begun)
        plain, fused = (statistics.median(s[1:]) for s in seconds.values())
        logits = 4 * len(x) * vocabulary / 2**20
        print(
            f"V {vocabulary:6}: plain {plain * 1e3:7.1f} ms with {logits:5.0f} MiB of logits, "
            f"fused / plain {fused / plain:.2f}"
        )


if __name__ == "__main__":
    main()
