"""Tokens per second of `triton-gru-prepare`, by the number of workers.

    python -m benchmarks.tokenising FOLDER --megabytes 200 --workers 1 2

Writes the plays of Shakespeare again and again, as files of 5 MB, to FOLDER, and makes shards of
them there. `at work` is the time from the first task to the last, the start of the workers
included; before it the characters are counted and the tokenizer is trained on a million of them.
"""

import argparse
import logging
import os
import shutil
import time
from pathlib import Path

from lightning_module.data.corpora import shakespeare, text_files
from lightning_module.data.shards import preparing
from lightning_module.data.shards.executors import Local
from lightning_module.data.tokenizers import TokenizerSettings

SHARD = 2**24  # bytes: several tasks a worker
TOKENIZERS = (TokenizerSettings("char"), TokenizerSettings("bpe", 16000))


def write_text(folder: Path, megabytes: int) -> list[str]:
    text = "\n".join("".join(document.pieces()) for document in shakespeare().train()).encode()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{n:04}.txt" for n in range(max(1, megabytes * 10**6 // len(text)))]
    for path in paths:
        path.write_bytes(text)
    return list(map(str, paths))


def measure(paths: list[str], settings: TokenizerSettings, workers: int, out: Path) -> str:
    shutil.rmtree(out, ignore_errors=True)
    began = []
    round_of_workers = preparing._round
    preparing._round = lambda *arguments: (
        began.append(time.monotonic()) or round_of_workers(*arguments)
    )
    begun = time.monotonic()
    made = preparing.prepare(
        text_files(paths, 0.01), settings, str(out), Local(workers), 10**6, SHARD
    )
    ended = time.monotonic()
    preparing._round = round_of_workers
    shards = [shard for split in made.splits.values() for shard in split]
    tokens, characters = (sum(getattr(s, f) for s in shards) for f in ("length", "characters"))
    working = ended - began[0]
    return (
        f"{settings.kind:<5} {workers:>7} {characters / 1e6:>8.0f} {tokens / 1e6:>8.1f} "
        f"{began[0] - begun:>9.1f} {working:>9.1f} {tokens / working / 1e6:>9.2f} "
        f"{characters / working / 1e6:>9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    paths = write_text(arguments.folder / "text", arguments.megabytes)
    print(f"{os.cpu_count()} CPUs, {arguments.megabytes} MB of text")
    print("      workers   M char  M token  before s at work s M token/s  M char/s")
    for settings in TOKENIZERS:
        for workers in arguments.workers:
            print(measure(paths, settings, workers, arguments.folder / "shards"), flush=True)


if __name__ == "__main__":
    main()
