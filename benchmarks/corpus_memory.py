"""Resident memory and start-up time of `triton-gru-train` against the size of the corpus.

    python -m benchmarks.corpus_memory FOLDER --gigabytes 0.25 1 2
    python -m benchmarks.corpus_memory FOLDER --gigabytes 10 --tokens-only

Writes generated text of each size to FOLDER and runs the real command on it: the first run makes
the tokens, the second finds them, and three more measure the time until training starts, of which
the shortest counts. `--tokens-only` writes a file of tokens of that size instead of making it from
text; the training reads it as any other.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lightning_module.data.checksums import write_checksums


def write_text(path: Path, size: int) -> None:
    """Lines of random words; each megabyte is different."""
    random = np.random.default_rng(0)
    alphabet = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ,.", np.uint8)
    with path.open("wb") as file:
        for _ in range(size // 2**20):
            block = alphabet[random.integers(len(alphabet), size=2**20)].copy()
            block[79::80] = ord("\n")
            file.write(block.tobytes())


def write_tokens(folder: Path, size: int) -> None:
    """Replaces the tokens of a cache by tokens of `size` bytes."""
    about = json.loads((folder / "about.json").read_text())
    random = np.random.default_rng(0)
    with (folder / "train.tokens").open("wb") as file:
        for _ in range(size // 2**24):
            file.write(random.integers(2, 30, size=2**23, dtype=np.uint16).tobytes())
        length = file.tell() // 2
    np.array([0, length], np.int64).tofile(folder / "train.begins")
    about["train"] |= {"length": length, "tokens": length - 1, "characters": length - 1}
    (folder / "about.json").write_text(json.dumps(about))
    write_checksums(folder)


def run(cache: Path, text: Path, run_dir: Path, *more: str) -> dict[str, float]:
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_module.train", "data=text_files",
         f"data.paths=[{text}]", "data.val_fraction=0.01", f"run_dir={run_dir}",
         "data.batch_size=64", "data.seq_len=128", "model.hidden_size=32",
         "model.embedding_size=16", "trainer.max_epochs=-1", "trainer.limit_val_batches=2",
         "trainer.accelerator=cpu", *more],
        env={**os.environ, "TRITON_GRU_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    started, peak = None, {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    while process.poll() is None:
        if started is None and (run_dir / "config.yaml").exists():
            started = time.monotonic() - begun
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]))
        time.sleep(0.05)
    if process.wait():
        raise SystemExit("the run failed")
    gigabytes = {name: kilobytes / 2**20 for name, kilobytes in peak.items()}
    return {"to_first_step": started, "seconds": time.monotonic() - begun, **gigabytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.25, 1, 2])
    parser.add_argument("--tokens-only", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    for size in arguments.gigabytes:
        folder = arguments.folder / f"{size}"
        folder.mkdir(parents=True)
        text = folder / "made.txt"
        cache, steps = folder / "cache", f"trainer.max_steps={arguments.steps}"
        write_text(text, 2**24 if arguments.tokens_only else int(size * 2**30))
        making = run(cache, text, folder / "first", "trainer.max_steps=1")
        if arguments.tokens_only:
            (tokens,) = (cache / "tokens").iterdir()
            write_tokens(tokens, int(size * 2**30))
        training = run(cache, text, folder / "second", steps)
        starts = [
            run(cache, text, folder / f"start{n}", "trainer.max_steps=1")["to_first_step"]
            for n in range(3)
        ]
        training["to_first_step"] = min(starts)
        for what, found in (("making tokens", making), ("training", training)):
            if not (arguments.tokens_only and what == "making tokens"):
                print(
                    f"{size:6.2f} GiB of {'tokens' if arguments.tokens_only else 'text'}, "
                    f"{what}: {found['to_first_step']:.1f} s to the first step, at most "
                    f"{found['VmRSS']:.2f} GiB resident ({found['RssAnon']:.2f} of its own, "
                    f"{found['RssFile']:.2f} mapped)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
