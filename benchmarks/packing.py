"""Share of useful tokens in a batch: lines packed into full rows, or padded to the longest.

    python -m benchmarks.packing [tokenizer=char data.batch_size=64 data.seq_len=128]

Takes the settings of `triton-gru-train` and reads all of the training text.
"""

import sys

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lightning_module.data.chunks import StreamChunks, padded_share
from lightning_module.settings.config_folder import CONFIGS


def main() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [*sys.argv[1:], "data.batching=packed"])
    data = instantiate(config.data, tokenizer=instantiate(config.tokenizer))
    data.prepare_data()
    data.setup()
    packed, tokens = data.train, data.train.tokens
    stream = StreamChunks(tokens, data.batch_size, data.seq_len)
    rows = {
        "data.batching=packed": tokens.tokens / (len(packed) * data.batch_size * data.seq_len),
        "data.batching=stream": tokens.tokens / (len(stream) * data.batch_size * data.seq_len),
        "lines padded to the longest": padded_share(tokens, data.ends_line, data.batch_size),
    }
    lines = int(np.sum([packed[k].resets.sum().item() for k in range(len(packed))]))
    print(f"{config.data.corpus._target_}, {config.tokenizer.kind}: {lines:,} lines of")
    print(
        f"{tokens.tokens / lines:.1f} tokens on average, "
        f"in {data.batch_size} rows of {data.seq_len}"
    )
    for name, share in rows.items():
        print(f"{share:8.2%}  {name}")


if __name__ == "__main__":
    main()
