"""Tokens per second and memory of `data=shards` against tokens mapped from files.

    python -m benchmarks.shards [--rounds 40] [--steps 10] [--chunks 200]

The same tokens are mapped from a file, and in shards: in a folder, in memory:// and on an S3 server
(moto's, which needs the extra `test`) on this machine, with 0, 20 and 100 ms added to each of its
answers. The server has two processes of its own and takes processor time that a server elsewhere
would not take.

All are measured side by side in one run, in turns of `--steps` steps: the loader alone, and in
training steps of a small model. A ratio is that of the speeds within a round, against mapped files;
the table has the median and the quartiles. Processor time is that of this process with the threads
that read, per chunk of 64 rows of 128 tokens. A row needs a block every 1,024 chunks, so a hundred
chunks need six blocks. `first` is the time from the beginning of a pass to its first chunk, with
nothing in memory.

Memory is measured in a process of its own for each: how much of its own (RssAnon) a pass adds.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import torch
import torch.nn.functional as F

from lightning_module.data.chunks import StreamChunks
from lightning_module.data.loading import ChunkLoader, ShardLoader
from lightning_module.data.shards.index import INDEX, SPLITS, TOKENIZER, Index
from lightning_module.data.shards.tables import ShardCache
from lightning_module.data.shards.writing import write_shards
from lightning_module.data.token_cache import read_split, write_split
from lightning_module.data.tokenizers import SHARDS, Tokenizer, TokenizerSettings
from triton_gru import GRU

ROWS, SEQ_LEN, DOCUMENT = 64, 128, 20_000
SHARD = 2**22  # small: moto's server copies the whole file at each read of a part of it
LATENCIES = (0, 20, 100)  # ms
BUCKET = "benchmark"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz     ,.\n"


class Document:
    """Random text; an attribute `continues` as that of a corpus's documents."""

    continues = False

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length

    def pieces(self) -> Iterator[str]:
        letters = np.array(list(CHARACTERS))
        drawn = np.random.default_rng(self.seed).integers(len(letters), size=self.length)
        yield "".join(letters[drawn])


def write(folder: Path, tokens: int) -> None:
    """The same documents as files that are mapped, and as shards."""
    settings = TokenizerSettings("char")
    tokenizer = Tokenizer.train(settings, [CHARACTERS])
    mapped, shards = folder / "mapped", folder / "shards"
    listed, about = {}, {}
    for where in (mapped, shards):
        where.mkdir(parents=True)
        tokenizer.save(where / TOKENIZER)
    for split, seed in zip(SPLITS, (0, 10**6), strict=True):
        count = tokens // DOCUMENT if split == "train" else 10
        documents = [Document(seed + n, DOCUMENT) for n in range(count)]
        about[split] = write_split(mapped, split, iter(documents), tokenizer)
        listed[split] = write_shards(
            fsspec.filesystem("file"), str(shards), split, documents, tokenizer, size=SHARD
        )
    (mapped / "about.json").write_text(json.dumps(about))
    index = Index("random text", settings, tokenizer.fingerprint, "uint16", listed)
    (shards / INDEX).write_bytes(index.to_json())


def serve(port: int, milliseconds: float) -> None:
    """Moto's S3 server, which answers that much later."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = DomainDispatcherApplication(create_backend_app)

    def late(environment, start_response):
        time.sleep(milliseconds / 1e3)
        return app(environment, start_response)

    run_simple("127.0.0.1", port, late, threaded=True)


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """The URL of the shards in each place, by its name."""
    memory = fsspec.filesystem("memory")
    urls = {"folder": str(folder / "shards"), "memory://": "memory://shards"}
    files = {file.name: file.read_bytes() for file in (folder / "shards").iterdir()}
    for name, content in files.items():
        memory.pipe_file(f"/shards/{name}", content)
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    started = []
    try:
        for number, latency in enumerate(LATENCIES):
            port = 5601 + number
            command = [sys.executable, "-m", "benchmarks.shards", "--serve", str(port)]
            started.append(subprocess.Popen([*command, str(latency)], stderr=subprocess.DEVNULL))
            name = f"S3, {latency} ms"
            filesystem = s3(f"http://127.0.0.1:{port}")
            for _ in range(200):
                try:
                    filesystem.mkdir(BUCKET)
                    break
                except Exception:  # it does not listen yet
                    time.sleep(0.1)
            for file, content in files.items():
                filesystem.pipe_file(f"{BUCKET}/{file}", content)
            urls[name] = f"s3://{BUCKET}#{port}"
        yield urls
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.wait()


def s3(endpoint: str) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(
        "s3", endpoint_url=endpoint, skip_instance_cache=True, config_kwargs={"retries": {}}
    )


def opened(name: str, url: str, folder: Path) -> ChunkLoader:
    """A loader of the training text."""
    if name == "mapped":
        tokens = read_split(folder / "mapped", "train", 0)
        return ChunkLoader(StreamChunks(tokens, ROWS, SEQ_LEN))
    url, _, port = url.partition("#")
    if port:  # the endpoint is fsspec's configuration, as that of a user
        fsspec.config.conf["s3"] = {
            "endpoint_url": f"http://127.0.0.1:{port}",
            "skip_instance_cache": True,
        }
    cache = ShardCache(url, TokenizerSettings(SHARDS), SEQ_LEN)
    cache.make()
    return ShardLoader(StreamChunks(cache.open()[1], ROWS, SEQ_LEN))


class Model(torch.nn.Module):
    """The smallest that is of use: the less a step takes, the more the loader counts."""

    def __init__(self, vocab_size: int, size: int = 64) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, size)
        self.core = GRU(size, size)
        self.output = torch.nn.Linear(size, vocab_size)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        self.state: torch.Tensor | None = None

    def step(self, chunk) -> None:
        state = self.state
        if state is not None:
            state = state.where(~chunk.fresh[None, :, None], 0.0)
        hidden, state = self.core(self.embedding(chunk.inputs), state)
        self.state = state.detach()
        loss = F.cross_entropy(self.output(hidden).flatten(0, 1), chunk.targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def compare(
    loaders: dict[str, ChunkLoader], turn: int, rounds: int, use: Callable[[object], None]
) -> dict[str, dict[str, np.ndarray]]:
    """Seconds and seconds of processor time of each loader's turn in each round."""
    passes, found = {}, {name: {"first": []} for name in loaders}
    for name, loader in loaders.items():
        passes[name] = itertools.chain.from_iterable(itertools.repeat(loader))  # without end
        begun = time.perf_counter()
        use(next(passes[name]))
        found[name]["first"] = time.perf_counter() - begun
    for name in loaders:
        found[name] |= {"wall": np.zeros(rounds), "cpu": np.zeros(rounds)}
    names = list(loaders)
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(turn):
                use(next(passes[name]))
            found[name]["wall"][round_] = time.perf_counter() - wall
            found[name]["cpu"][round_] = time.process_time() - cpu
    return found


def show(title: str, found: dict[str, dict[str, np.ndarray]], turn: int) -> None:
    print(f"\n{title}\n")
    print("| tokens from | tokens/s | of mapped: median (quartiles) | CPU per chunk | first |")
    print("|---|---|---|---|---|")
    for name, times in found.items():
        ratio = found["mapped"]["wall"] / times["wall"]
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        speed = turn * ROWS * SEQ_LEN / np.median(times["wall"])
        print(
            f"| {name} | {speed:,.0f} | {middle:.3f} ({low:.3f}, {high:.3f}) | "
            f"{np.median(times['cpu']) / turn * 1e3:.2f} ms | "
            f"{times['first'] * 1e3:.0f} ms |"
        )


def own_memory() -> float:
    """MB that this process has for itself."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) / 1024


def memory_of(name: str, url: str, folder: Path, chunks: int) -> None:
    """Prints the memory that passing over chunks adds, in a process that does nothing else."""
    loader = opened(name, url, folder)
    before, most = own_memory(), 0.0
    for number, _ in enumerate(loader):
        if number % 50 == 0:
            most = max(most, own_memory())
        if number == chunks:
            break
    print(f"{most - before:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10, help="training steps per turn")
    parser.add_argument("--chunks", type=int, default=200, help="chunks per turn, loader alone")
    parser.add_argument("--tokens", type=int, default=24_000_000)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(int(arguments.serve[0]), float(arguments.serve[1]))
        return
    if arguments.memory_of:
        name, url, folder, chunks = arguments.memory_of
        memory_of(name, url, Path(folder), int(chunks))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["TRITON_GRU_CACHE"] = str(folder / "cache")
        write(folder, arguments.tokens)
        with servers(folder) as urls:
            urls = {"mapped": "", **urls}

            def loaders() -> dict[str, ChunkLoader]:
                return {name: opened(name, url, folder) for name, url in urls.items()}

            found = compare(loaders(), arguments.chunks, arguments.rounds, lambda chunk: None)
            show("The loader alone", found, arguments.chunks)
            model = Model(len(CHARACTERS))
            for _, chunk in zip(range(20), opened("mapped", "", folder), strict=False):
                model.step(chunk)  # the engine is built, the allocator has grown
            found = compare(loaders(), arguments.steps, arguments.rounds, model.step)
            show("In training steps of a GRU of 64 units", found, arguments.steps)
            print("\n| tokens from | memory that a pass adds |\n|---|---|")
            for name, url in urls.items():
                if name == "memory://":  # that of this process
                    continue
                command = [sys.executable, "-m", "benchmarks.shards", "--memory-of"]
                said = subprocess.run(
                    [*command, name, url, str(folder), str(arguments.chunks * arguments.rounds)],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                print(f"| {name} | {said.stdout.split()[-1]} MB |")


if __name__ == "__main__":
    main()
