"""Data sets of the Hugging Face hub, or of its cache on this machine (extra `hf`)."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightning_module.data.corpora.corpus import Apply, Corpus, Document, Part, digest
from lightning_module.errors import DataError

HUB_TIMEOUT = 5  # seconds


def hf(
    name: str,
    config: str | None = None,
    text_column: str = "text",
    train_split: str = "train",
    val_split: str = "validation",
    revision: str | None = None,
) -> Corpus:
    """A data set of the Hugging Face hub, one document per row (extra `hf`).

    Args:
        name: The data set, as in `datasets.load_dataset`; also a folder on this machine.
        config: Its configuration, if it has several.
        text_column: The column with the text.
        train_split: Training rows; slices such as `train[:90%]` are allowed.
        val_split: Rows for validation.
        revision: Branch, tag or commit of the data set. Give a commit if changes of the data set
            must be noticed: tokens are cached under these arguments.

    Raises:
        DataError: On reading: `datasets` is not installed, the hub does not answer within
            `HUB_TIMEOUT`, or the data set has no such configuration, split or column.
    """

    def documents(split: str, part: tuple[int, int] | None = None) -> Iterator[Document]:
        rows = _load_split(name, config, split, revision, streaming=part is not None)
        if part is not None:
            rows = rows.shard(*part)
        # Of a stream they may be unknown before its first row.
        columns: Any = rows.column_names or next(iter(rows), {}).keys()
        if columns and text_column not in columns:
            raise DataError(
                f"{name} has no column {text_column!r}; set data.text_column to one of: "
                f"{', '.join(columns)}."
            )
        for index, row in enumerate(rows):
            text = row[text_column]
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(
                    f"Row {index} of {split} of {name} has no text in column {text_column!r} but a "
                    f"{type(text).__name__}: set data.text_column to another one."
                )
            yield Document(f"{split} {index}", text)

    def parts(apply: Apply) -> tuple[list[Part], list[Part]]:
        return tuple(map(parts_of, (train_split, val_split)))  # type: ignore[return-value]

    def parts_of(split: str) -> list[Part]:
        if "[" in split:  # a slice, which a stream does not have
            return [Part(partial(documents, split))]
        files = _load_split(name, config, split, revision, streaming=True).num_shards
        return [Part(partial(documents, split, (files, n))) for n in range(files)]

    return Corpus(
        name="hf-" + re.sub(r"\W+", "-", name).strip("-"),
        fingerprint=digest("hf 1", name, config, text_column, train_split, val_split, revision),
        description=f"{name}{f' ({config})' if config else ''} of the Hugging Face hub, "
        f"{train_split} to train, {val_split} for validation",
        train=lambda: documents(train_split),
        val=lambda: documents(val_split),
        parts=parts,
    )


def _load_split(
    name: str, config: str | None, split: str, revision: str | None, streaming: bool = False
):
    offline = any(
        os.environ.get(variable, "0").upper() in ("1", "TRUE", "YES", "ON")
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data=hf needs the package datasets: pip install 'triton-gru[hf]' "
            "(or train on files: data=text_files 'data.paths=[my.txt]')."
        ) from error
    if not offline and not Path(name).exists():
        # Tested first, because the hub's own client retries for minutes.
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(hub, timeout=HUB_TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except (OSError, ValueError) as error:
            raise DataError(
                f"The Hugging Face hub {hub} cannot be reached "
                f"({getattr(error, 'reason', error)}). If {name} was downloaded to this machine "
                "before, set HF_HUB_OFFLINE=1; else train on files: "
                "data=text_files 'data.paths=[my.txt]'."
            ) from error
    try:
        options = {"streaming": True} if streaming else {}
        return datasets.load_dataset(name, config, split=split, revision=revision, **options)
    except Exception as error:  # the client raises many kinds
        raise DataError(
            f"Cannot load split {split!r} of {name} (configuration {config}): {error}\n"
            "See data.name, data.config, data.train_split and data.val_split; a split can be a "
            "slice: data.train_split='train[:90%]' data.val_split='train[90%:]'."
        ) from error
