"""The parts of a corpus: documents for training and validation, and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_module.errors import DataError


class Document(NamedTuple):
    """An independent text: the state of a model is reset at its beginning.

    Attributes:
        name: For messages.
        text: The text, or consecutive pieces of it, which can be read once. A piece ends after a
            newline that no newline follows, as in `tokenizers.pieces`: there a token ends.
        continues: It is a further piece of the document before it, in a `Part` that begins within
            a document.
    """

    name: str
    text: str | Iterable[str]
    continues: bool = False

    def pieces(self) -> Iterable[str]:
        """The text in pieces."""
        return [self.text] if isinstance(self.text, str) else self.text


class Part(NamedTuple):
    """Consecutive text of one split, which a process can tokenise by itself.

    Attributes:
        read: Returns an iterator over its documents; cloudpickle can send it to another process.
        size: Its characters, about; None: unknown.
    """

    read: Callable[[], Iterator[Document]]
    size: int | None = None


# Applies a function to each of a list, perhaps in several processes; results in order.
Apply = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and to validate on.

    Attributes:
        name: Short name, part of a file name.
        fingerprint: Equal only for equal text; computed without reading the text.
        description: One line for users.
        train: Returns an iterator over the training documents, from the start at every call. It
            yields them one by one, so that a corpus may be larger than memory.
        val: The same for the validation documents.
        parts: The parts of the training and of the validation text, which are the same for any
            number of processes; its argument reads what decides on them. None: each split is one.
    """

    name: str
    fingerprint: str
    description: str
    train: Callable[[], Iterator[Document]]
    val: Callable[[], Iterator[Document]]
    parts: Callable[[Apply], tuple[list[Part], list[Part]]] | None = None

    def divided(self, apply: Apply) -> tuple[list[Part], list[Part]]:
        """The `parts` of both splits."""
        return self.parts(apply) if self.parts else ([Part(self.train)], [Part(self.val)])

    def shortened(self, max_chars: int) -> Corpus:
        """The beginning of this corpus, `max_chars` characters in all.

        Both splits are cut to the same share, from their beginnings, so the share of validation
        text stays the same: 1,115,394 characters of a corpus split 90/10 are split 90/10. The last
        document of a split is cut where its characters end.

        Args:
            max_chars: Characters of both splits together; a shorter corpus is unchanged.
        """
        if not isinstance(max_chars, int) or max_chars < 2:
            raise DataError(f"data.max_chars must be at least 2, got {max_chars}.")

        def cut(documents: Callable[[], Iterator[Document]], is_train: bool) -> Iterator[Document]:
            train, val = (
                sum(len(piece) for document in split() for piece in document.pieces())
                for split in (self.train, self.val)
            )
            total = train + val
            keep = min(max_chars, total)
            keep_train = round(keep * train / total) if total else 0
            left = keep_train if is_train else keep - keep_train
            for document in documents():
                if left <= 0:
                    return
                text = list(beginning(document.pieces(), left))
                yield document._replace(text=text)
                left -= sum(map(len, text))

        return replace(
            self,
            fingerprint=digest(self.fingerprint, max_chars),
            description=f"{self.description}; its first {max_chars:,} characters",
            train=lambda: cut(self.train, True),
            val=lambda: cut(self.val, False),
            parts=None,
        )


def beginning(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """The first `characters` of a text in pieces."""
    for piece in pieces:
        yield piece[:characters]
        characters -= len(piece)
        if characters <= 0:
            return


def digest(*parts: object) -> str:
    """A fingerprint of the parts that a corpus depends on."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
