"""Limits of tokens per second on many GPUs: arithmetic, nothing here is a measurement.

    python -m benchmarks.scaling --gpus 8 64 512

Data parallel training of embedding, GRU layers and output layer. One optimizer step of a rank is

    scan        seq_len x layers x (forward + backward lower bound), from triton_gru/plan/costs.py
    products    everything outside the scan: input projections, output layer, all weight gradients
    optimizer   parameters x 28 bytes over the memory (AdamW: p, m, v read and written, g read)
    all-reduce  the part that does not overlap with the backward

and all-reduce of S bytes over m nodes of g GPUs, hierarchical as NCCL's:

    2 (g-1)/g S / nvlink  +  2 (m-1)/m (S/g) / network  +  2 (log2 g near + log2 m far)

The output layer's gradient is ready before any scan runs backward, a layer's before the next lower
layer's scan: these overlap with the rest of the backward. The lowest layer's and the embedding's
overlap with nothing. docs/scaling.md discusses the result.
"""

import argparse
import dataclasses
import math

from triton_gru.plan.devices import DEVICES
from triton_gru.plan.plan import Problem
from triton_gru.plan.planner import best_plan

# AdamW in float32: the gradient read; parameter and two moments read and written.
OPTIMIZER_BYTES = 7 * 4
GRADIENT_BYTES = 4  # bf16-mixed keeps parameters, and so their gradients, in float32


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes as in conf/model; see SentencePredictor."""

    vocab: int
    embedding: int
    hidden: int
    layers: int

    def inputs(self, layer: int) -> int:
        """Features of a layer's input."""
        return self.embedding if layer == 0 else self.hidden

    def layer_parameters(self, layer: int) -> int:
        """W_ih, W_hh and both biases."""
        return 3 * self.hidden * (self.inputs(layer) + self.hidden + 2)

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, if not tied."""
        return self.vocab * self.embedding

    @property
    def output_parameters(self) -> int:
        """Of the output layer."""
        return self.vocab * (self.hidden + 1)

    @property
    def parameters(self) -> int:
        """All of them."""
        layers = sum(map(self.layer_parameters, range(self.layers)))
        return self.embedding_parameters + layers + self.output_parameters

    @property
    def last_gradients(self) -> int:
        """Parameters whose gradients are ready only when the backward ends."""
        return self.embedding_parameters + self.layer_parameters(0)

    def product_flops(self, layer: int) -> tuple[int, int]:
        """Forward and backward flops per token outside the scan.

        Forward: x W_ih^T. Backward: its two gradients, dW_hh, and h W_hh^T again, from which the
        gates are recomputed.
        """
        forward = 2 * 3 * self.hidden * self.inputs(layer)
        return forward, 2 * forward + 2 * (2 * 3 * self.hidden * self.hidden)

    @property
    def output_flops(self) -> int:
        """Forward and backward flops per token of the output layer."""
        return 3 * 2 * self.hidden * self.vocab


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines; every figure is an option of the command line.

    Attributes:
        device: of triton_gru/plan/devices.py, by compute capability.
        per_node: GPUs connected by NVLink.
        nvlink: bytes per second and GPU, one way. 450e9: NVLink 4, the vendor's figure.
        network: bytes per second and GPU between nodes. 50e9: one 400 Gb/s port per GPU.
        near: seconds per message within a node.
        far: seconds per message between nodes.
        flops: dense 16-bit products per second. 989e12: H100 and H200, the vendor's figure.
        reached: share of flops and of memory that large products and the optimizer reach.
        memory: bytes per second. 4.8e12: H200, the vendor's figure.
    """

    device: int = 90
    per_node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    near: float = 3e-6
    far: float = 10e-6
    flops: float = 989e12
    reached: float = 0.6
    memory: float = 4.8e12

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds to sum `size` bytes over the GPUs and distribute the sum to each."""
        group = min(gpus, self.per_node)
        nodes = -(-gpus // self.per_node)
        within = 2 * (group - 1) / group * size / self.nvlink
        between = 2 * (nodes - 1) / nodes * (size / group) / self.network
        return within + between + 2 * (math.log2(group) * self.near + math.log2(nodes) * self.far)


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step on a number of GPUs; times in seconds."""

    gpus: int
    batch_size: int
    tokens: int
    scan: float
    products: float
    optimizer: float
    all_reduce: float
    exposed: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.scan + self.products + self.optimizer + self.exposed

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """The largest part of the step."""
        parts = {
            "scan": self.scan,
            "products": self.products,
            "optimizer": self.optimizer,
            "all-reduce": self.exposed,
        }
        return max(parts, key=parts.get)


def scan_lower_bounds(model: Model, cluster: Cluster, batch_size: int) -> tuple[float, float]:
    """Lower bounds in seconds of one step of one layer's scan, forward and backward.

    Raises:
        triton_gru.plan.planner.DoesNotFit: hidden_size or batch_size is too large for the kernels.
    """
    device = DEVICES[cluster.device]
    problem = Problem(batch_size, model.hidden, "bfloat16", reset_after=True)
    return tuple(
        best_plan(dataclasses.replace(problem, direction=direction), device).lower_bound_us * 1e-6
        for direction in ("forward", "backward")
    )


def step(
    model: Model, cluster: Cluster, gpus: int, batch_size: int, seq_len: int, accumulate: int = 1
) -> Step:
    """One optimizer step.

    Args:
        model: its sizes.
        cluster: the machines.
        gpus: ranks.
        batch_size: of one rank.
        seq_len: tokens per chunk.
        accumulate: chunks per step.
    """
    tokens = batch_size * seq_len
    rate = cluster.flops * cluster.reached
    forward, backward = scan_lower_bounds(model, cluster, batch_size)
    behind = 0.0  # seconds of backward that hide gradients: all after the output layer's
    scan = products = 0.0
    for layer in range(model.layers):
        ahead, back = (tokens * flops / rate for flops in model.product_flops(layer))
        scan += seq_len * (forward + backward)
        products += ahead + back
        behind += seq_len * backward + back
    products += tokens * model.output_flops / rate
    all_reduce = cluster.all_reduce(model.parameters * GRADIENT_BYTES, gpus)
    last = cluster.all_reduce(model.last_gradients * GRADIENT_BYTES, gpus)
    exposed = max(last, all_reduce - behind) if gpus > 1 else 0.0
    return Step(
        gpus=gpus,
        batch_size=batch_size,
        tokens=accumulate * tokens * gpus,
        scan=accumulate * scan,
        products=accumulate * products,
        optimizer=model.parameters * OPTIMIZER_BYTES / (cluster.memory * cluster.reached),
        all_reduce=all_reduce if gpus > 1 else 0.0,
        exposed=exposed,
    )


def table(model: Model, cluster: Cluster, steps: list[Step], alone: Step, seq_len: int) -> str:
    """The steps as a table, compared with the same number of GPUs without communication."""
    forward, backward = scan_lower_bounds(model, cluster, steps[0].batch_size)
    lines = [
        "arithmetic, not a measurement: "
        f"{DEVICES[cluster.device].name}, {cluster.per_node} per node,",
        f"{cluster.nvlink / 1e9:.0f} GB/s NVLink, "
        f"{cluster.network / 1e9:.0f} GB/s network per GPU;",
        f"vocabulary {model.vocab}, embedding {model.embedding}, hidden {model.hidden}, "
        f"{model.layers} layers, seq_len {seq_len}:",
        f"{model.parameters / 1e6:.1f} M parameters, "
        f"{model.parameters * GRADIENT_BYTES / 1e6:.0f} MB of gradients;",
        f"one step of a layer's scan at batch size {steps[0].batch_size}: "
        f"{forward * 1e6:.2f} us forward, {backward * 1e6:.2f} us backward",
        "",
        "      batch    milliseconds per step                               per second",
        " GPUs  /GPU    scan products optimizer all-reduce exposed   all  steps  tokens  of linear"
        "  largest",
    ]
    for s in steps:
        ideal = alone.tokens_per_second * s.gpus / alone.gpus
        lines.append(
            f"{s.gpus:>5}{s.batch_size:>6}{s.scan * 1e3:>8.2f}{s.products * 1e3:>9.2f}"
            f"{s.optimizer * 1e3:>10.2f}{s.all_reduce * 1e3:>11.2f}{s.exposed * 1e3:>8.2f}"
            f"{s.seconds * 1e3:>6.2f}{1 / s.seconds:>7.0f}{s.tokens_per_second / 1e6:>6.0f} M"
            f"{s.tokens_per_second / ideal:>11.0%}  {s.limit}"
        )
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Tokens per second on many GPUs, by arithmetic (see docs/scaling.md).",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--batch-size", type=int, default=64, help="of one GPU")
    parser.add_argument(
        "--total-batch-size",
        type=int,
        help="of all GPUs together, divided among them, instead of --batch-size",
    )
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1, help="chunks per optimizer step")
    for name, default in (("vocab", 32000), ("embedding", 512), ("hidden", 1024), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for field in dataclasses.fields(Cluster):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    given = parser.parse_args()
    model = Model(given.vocab, given.embedding, given.hidden, given.layers)
    cluster = Cluster(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Cluster)})
    if cluster.device not in DEVICES:
        parser.error(f"--device must be one of {', '.join(map(str, DEVICES))}")
    numbers = [
        *given.gpus,
        given.batch_size,
        given.seq_len,
        given.accumulate,
        *vars(model).values(),
    ]
    if min(numbers) < 1:
        parser.error("every size must be at least 1")
    if given.total_batch_size and any(given.total_batch_size % gpus for gpus in given.gpus):
        parser.error(
            f"--total-batch-size {given.total_batch_size} must be a multiple of every one of --gpus"
        )
    steps = [
        step(
            model,
            cluster,
            gpus,
            given.total_batch_size // gpus if given.total_batch_size else given.batch_size,
            given.seq_len,
            given.accumulate,
        )
        for gpus in given.gpus
    ]
    alone = step(model, cluster, 1, steps[0].batch_size, given.seq_len, given.accumulate)
    print(table(model, cluster, steps, alone, given.seq_len))


if __name__ == "__main__":
    main()
