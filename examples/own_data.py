"""Train a sentence predictor on data in another form than text files, here JSON Lines.

    python examples/own_data.py reviews.jsonl   # one {"text": ...} in each line
    python examples/own_data.py                 # on random sentences

A corpus is a function that returns a `Corpus`: how to iterate over the documents for training and
validation, and a fingerprint that changes when the text does. Text files need no function:
`triton-gru-train data=text_files 'data.paths=[...]'`.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lightning as L
import torch

from lightning_module import SentenceDataModule, SentencePredictor
from lightning_module.data.corpora import Corpus, Document
from lightning_module.data.tokenizers import TokenizerSettings
from lightning_module.generation import continue_prompt


def json_lines(path: str) -> Corpus:
    """Each line of a file is a document; every tenth is for validation."""

    def documents(validation: bool) -> Iterator[Document]:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file):
                if (number % 10 == 9) == validation:
                    yield Document(f"line {number + 1}", json.loads(line)["text"])

    stat = Path(path).stat()
    return Corpus(
        name="json_lines",
        fingerprint=f"json_lines {path} {stat.st_size} {stat.st_mtime_ns}",
        description=f"the lines of {path}, every tenth for validation",
        train=lambda: documents(validation=False),
        val=lambda: documents(validation=True),
    )


def made_up(path: str) -> None:
    """Writes 2000 documents of one sentence each."""
    choose = random.Random(0).choice
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(2000):
            who, what = choose(["The cat", "A dog", "My horse"]), choose(["the moon", "a bird"])
            text = f"{who} {choose(['sees', 'hears', 'likes'])} {what}.\n"
            print(json.dumps({"text": text}), file=file)


def train(path: str) -> None:
    """Trains for 200 steps and samples a sentence."""
    L.seed_everything(0)
    data = SentenceDataModule(
        json_lines, TokenizerSettings("char"), batch_size=16, seq_len=64, path=path
    )
    data.prepare_data()
    data.setup()
    model = SentencePredictor(
        data.vocab_size,
        hidden_size=64,
        chars_per_token=data.chars_per_token,
        optimizer=partial(torch.optim.AdamW, lr=0.01),
    )
    trainer = L.Trainer(
        max_steps=200,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=data)
    (scores,) = trainer.validate(model, datamodule=data, verbose=False)
    print(f"validation: {scores['val_bits_per_char']:.3f} bits per character")
    (sentence,) = continue_prompt(
        model.eval(),
        data.tokenizer,
        "",  # the beginning of a document
        num_sentences=1,
        temperature=0.5,
        top_p=1.0,
        max_tokens=80,
    )
    print(sentence)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            made_up(f"{folder}/sentences.jsonl")
            train(f"{folder}/sentences.jsonl")
