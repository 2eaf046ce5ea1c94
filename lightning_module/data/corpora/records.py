"""JSON lines and Parquet files: each record has a document in one of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lightning_module.data.corpora.corpus import Apply, Corpus, Document, Part, digest
from lightning_module.data.corpora.files import File, Range, check_share, find_files
from lightning_module.data.corpora.text import open_binary, readable
from lightning_module.errors import DataError

PARQUET = ".parquet"
_ROWS = 1024  # of a Parquet file that are in memory at once


def records(
    paths: str | Iterable[str],
    text_column: str = "text",
    val_paths: str | Iterable[str] | None = None,
    val_fraction: float = 0.01,
) -> Corpus:
    """JSON lines or Parquet files, a document per record.

    Args:
        paths: Files, globs and URLs, as for `text_files`. Names that end in `.parquet` are Parquet,
            all others are JSON lines, which may be compressed (`.jsonl.gz`).
        text_column: The field with the text. Records without text are left out.
        val_paths: Files for validation. None: the last records of `paths`.
        val_fraction: Share of the records, from the end, for validation, if `val_paths` is None.

    Raises:
        DataError: As `text_files`; when the records are read: one is not JSON, or has no such
            field.
    """
    check_share(val_fraction)
    files = find_files(paths)
    val_files = None if val_paths is None else find_files(val_paths)

    def parts(apply: Apply) -> tuple[list[Part], list[Part]]:
        chunks = _chunks(files)
        if val_files is not None:
            whole = (0, None)
            return tuple(  # type: ignore[return-value]
                [
                    Part(partial(_documents, chunk, text_column, *whole), chunk.size)
                    for chunk in part
                ]
                for part in (chunks, _chunks(val_files))
            )
        counts = apply(_count, chunks)
        border = int(sum(counts) * (1 - val_fraction))
        train: list[Part] = []
        val: list[Part] = []
        begin = 0
        for chunk, count in zip(chunks, counts, strict=True):
            here = min(max(border - begin, 0), count)
            begin += count
            for split, first, end in ((train, 0, here), (val, here, count)):
                if first < end:
                    read = partial(_documents, chunk, text_column, first, end)
                    split.append(Part(read, chunk.size * (end - first) // count))
        return train, val

    def documents(validation: bool) -> Iterator[Document]:
        for part in parts(_one_by_one)[validation]:
            yield from part.read()

    share = (
        f"the last {val_fraction:.3g} of them" if val_files is None else f"{len(val_files)} more"
    )
    return Corpus(
        name="records",
        fingerprint=digest(
            "records 1",
            [file.identity for file in files],
            val_files and [file.identity for file in val_files],
            text_column,
            val_fraction,
        ),
        description=f"{len(files)} file{'s' * (len(files) > 1)} of records, {share} for validation",
        train=lambda: documents(validation=False),
        val=lambda: documents(validation=True),
        parts=parts,
    )


class _RowGroup(NamedTuple):
    path: Path | str
    number: int
    rows: int
    size: int


def _one_by_one(function: Any, items: Any) -> list[Any]:
    return [function(item) for item in items]


def _chunks(files: list[File]) -> list[_RowGroup | Range]:
    chunks: list[_RowGroup | Range] = []
    for file in files:
        if str(file.path).endswith(PARQUET):
            with readable(file.path), open_binary(file.path) as binary:
                about = _parquet(binary, file.path).metadata
            groups = [about.row_group(n) for n in range(about.num_row_groups)]
            chunks += [
                _RowGroup(file.path, n, group.num_rows, group.total_byte_size)
                for n, group in enumerate(groups)
                if group.num_rows
            ]
        else:
            chunks += file.ranges()
    return chunks


def _count(chunk: _RowGroup | Range) -> int:
    return chunk.rows if isinstance(chunk, _RowGroup) else sum(1 for _ in _lines(chunk))


def _documents(
    chunk: _RowGroup | Range, text_column: str, first: int, end: int | None
) -> Iterator[Document]:
    rows = (
        _rows(chunk, text_column) if isinstance(chunk, _RowGroup) else _fields(chunk, text_column)
    )
    try:
        for text in islice(rows, first, end):
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(
                    f"A record of {chunk.path} has no text in {text_column!r} but a "
                    f"{type(text).__name__}: set data.text_column to another field."
                )
            text.encode()  # raises for half of a surrogate pair, which JSON can write
            yield Document(str(chunk.path), text)
    except UnicodeError as error:
        raise DataError(
            f"A record of {chunk.path} has text in {text_column!r} that is not Unicode: {error}."
        ) from error


def _lines(part: Range) -> Iterator[str]:
    last = ""
    for piece in part.text():
        *whole, last = (last + piece).split("\n")
        yield from (line for line in whole if line.strip())
    if last.strip():
        yield last


def _fields(chunk: Range, name: str) -> Iterator[Any]:
    for line in _lines(chunk):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{chunk.path} has a line that is not JSON: {error}: "
                            f"{line[:80]!r}") from error  # fmt: skip
        if not isinstance(record, dict) or name not in record:
            known = ", ".join(map(repr, record)) if isinstance(record, dict) else repr(record)[:80]
            raise DataError(
                f"A record of {chunk.path} has no field {name!r} but {known}: set data.text_column."
            )
        yield record[name]


def _rows(chunk: _RowGroup, name: str) -> Iterator[Any]:
    with readable(chunk.path), open_binary(chunk.path) as binary:
        file = _parquet(binary, chunk.path)
        if name not in file.schema_arrow.names:
            raise DataError(
                f"{chunk.path} has no column {name!r}; set data.text_column to one of: "
                f"{', '.join(file.schema_arrow.names)}."
            )
        batches = file.iter_batches(_ROWS, row_groups=[chunk.number], columns=[name])
        for batch in batches:
            yield from batch.column(0).to_pylist()


def _parquet(binary: Any, path: Path | str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install 'triton-gru[shards]'") from error
    try:
        return parquet.ParquetFile(binary)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file, or damaged: {error}") from error
