"""Text to token ids and back: characters, byte pairs or words.

Every kind is a `tokenizers.Tokenizer` of Hugging Face, and `tokenizer.json` is its format. Decoding
returns exactly the encoded text if every token is known.

Two tokens are not text. `<doc>` is at the beginning of each document and is never predicted.
`<unk>` replaces what the training documents do not contain (char, word). In validation text it is
predicted as any other token: with `char` the model has never seen it, so the loss is high; with
`word` it replaces all rare words, so figures per character are too low for a word model, the more
the larger the share of `<unk>` that `datamodule.py` reports.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import tokenizers as huggingface
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from lightning_module.atomic_files import write_atomically
from lightning_module.errors import DataError

DOC = "<doc>"
UNK = "<unk>"
SHARDS = "shards"  # the kind that stands for the tokenizer of data=shards
BYTES = 256
_CODE_POINTS = 0x110000

# Scripts without spaces between words: a character is a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}"
# Maximum length of a run of letters: byte pairs of a run of 100,000 letters, as in files that are
# not prose, would take minutes.
_RUN = "{1,32}"
# A space belongs to the token after it, so that joining tokens restores the text. Newlines are
# separate from everything else: text can be divided after them with the same tokens (`pieces`).
_WHITESPACE = rf"\n{_RUN}|[^\S\n]{_RUN}(?!\S)|[^\S\n]{_RUN}"
_SPLITS = {
    "char": r"[\s\S]",
    "word": (
        rf" ?[{_UNSPACED}]"
        rf"| ?[\p{{L}}\p{{M}}&&[^{_UNSPACED}]]{_RUN}(?:['’][\p{{L}}&&[^{_UNSPACED}]]{_RUN})?"
        rf"| ?\p{{N}}{_RUN}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]|{_WHITESPACE}"
    ),
    "bpe": (
        rf" ?[\p{{L}}\p{{M}}]{_RUN}(?:['’]\p{{L}}{_RUN})?| ?\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]{_RUN}|{_WHITESPACE}"
    ),
}
# A word that occurs once is `<unk>` in training too: otherwise `<unk>` would occur in validation
# text alone and never be learnt. All characters are kept, so that training text decodes to itself.
_MIN_FREQUENCY = {"char": 1, "word": 2, "bpe": 2}

_LOOKALIKES = {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\t": " "}
_LOOKALIKES |= {'"': "“", "'": "’", ".": "。", "-": "—", ",": "，", "\u00a0": " "}


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a tokenizer.

    Attributes:
        kind: `char`: Unicode characters. `bpe`: byte pairs; no text is unknown. `word`:
            words with the space before them, punctuation marks, single Han characters. `shards`:
            what the shards of data=shards were made with.
        vocab_size: Maximum number of tokens, with `<doc>` and `<unk>`; the rarest are left out.
            None: no maximum (char, word).
    """

    kind: str = "char"
    vocab_size: int | None = None

    def check(self) -> None:
        """Raises DataError if no tokenizer can have these settings."""
        if self.kind == SHARDS:
            raise DataError(
                "tokenizer=shards stands for the tokenizer of data=shards; this text needs one of "
                f"its own: tokenizer={', tokenizer='.join(_SPLITS)}."
            )
        if self.kind not in _SPLITS:
            raise DataError(f"tokenizer.kind must be one of {', '.join(_SPLITS)}, got {self.kind}.")
        least = BYTES + 1 if self.kind == "bpe" else 3
        if self.vocab_size is None:
            if self.kind == "bpe":
                raise DataError("tokenizer=bpe needs tokenizer.vocab_size, for example 4000.")
        elif not isinstance(self.vocab_size, int) or self.vocab_size < least:
            raise DataError(
                f"tokenizer.vocab_size must be at least {least} for {self.kind}, "
                f"got {self.vocab_size!r}."
            )


class Tokenizer:
    """Encodes text as token ids, and decodes it.

    Attributes:
        vocab_size: Number of ids.
        doc_id: Id of `<doc>`.
        unk_id: Id of `<unk>`; None if no text is unknown (bpe).
    """

    def __init__(self, tokenizer: huggingface.Tokenizer):
        doc_id = tokenizer.token_to_id(DOC)
        if doc_id is None:
            raise DataError(f"The tokenizer has no token {DOC}: it was not made by this project.")
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.doc_id: int = doc_id
        self.unk_id: int | None = tokenizer.token_to_id(UNK)
        # For characters a table, a hundred times as fast as searching for tokens in text.
        self._id_of_code_point: np.ndarray | None = None
        split = json.loads(tokenizer.to_str())["pre_tokenizer"]
        ids = {t: id for t, id in tokenizer.get_vocab().items() if t not in (DOC, UNK)}
        by_character = (split.get("pattern") or {}).get("Regex") == _SPLITS["char"]
        if by_character and all(len(token) == 1 for token in ids):
            self._id_of_code_point = np.full(_CODE_POINTS, self.unk_id, np.int32)
            for token, id in ids.items():
                self._id_of_code_point[ord(token)] = id

    @classmethod
    def train(cls, settings: TokenizerSettings, texts: Iterable[str]) -> Tokenizer:
        """A tokenizer trained on texts; the same for the same texts.

        Raises:
            DataError: No tokenizer can have these settings.
        """
        settings.check()
        # DOC and UNK get their ids here and not from the trainers, with which the tokenizer would
        # also find them in the text: "<doc>" in a document is five characters.
        splitter = huggingface.Tokenizer(models.BPE())
        splitter.pre_tokenizer = _pre_tokenizer(settings.kind)
        min_frequency = _MIN_FREQUENCY[settings.kind]
        everything = 2**31 - 1
        if settings.kind == "bpe":
            assert settings.vocab_size is not None  # checked above
            byte_pairs = trainers.BpeTrainer(
                vocab_size=settings.vocab_size - 1,
                min_frequency=min_frequency,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            splitter.train_from_iterator(pieces(texts), byte_pairs)
            trained = json.loads(splitter.to_str())["model"]
            vocab = trained["vocab"]
            vocab[DOC] = len(vocab)
            merges = [tuple(merge) for merge in trained["merges"]]
            tokenizer = huggingface.Tokenizer(models.BPE(vocab, merges))
            tokenizer.decoder = decoders.ByteLevel()
        else:
            most = (settings.vocab_size or everything) - 2
            if settings.kind == "char":
                counts = np.zeros(_CODE_POINTS, np.int64)
                for text in texts:
                    found = np.bincount(_code_points(text))
                    counts[: len(found)] += found
                # The most frequent; equally frequent ones in the order of Unicode.
                codes = np.flatnonzero(counts)
                codes = codes[np.argsort(-counts[codes], kind="stable")][:most]
                frequent = [chr(code) for code in codes]
            else:
                splitter.model = models.WordLevel(unk_token=UNK)
                words = trainers.WordLevelTrainer(
                    vocab_size=most, min_frequency=min_frequency, show_progress=False
                )
                splitter.train_from_iterator(pieces(texts), words)
                frequent = list(splitter.get_vocab())
            # In the order of the code points: independent of the order of the text.
            vocab = {token: id for id, token in enumerate([DOC, UNK, *sorted(frequent)])}
            tokenizer = huggingface.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
            tokenizer.decoder = decoders.Fuse()
        tokenizer.pre_tokenizer = _pre_tokenizer(settings.kind)
        return cls(tokenizer)

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same text the same ids."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path, where: str | None = None) -> Tokenizer:
        """The tokenizer that `save` wrote.

        Args:
            path: The file.
            where: Where it came from, for the error.

        Raises:
            DataError: There is no such file, or it is not a tokenizer of this project.
        """
        if not Path(path).is_file():
            raise DataError(f"There is no tokenizer {path}.")
        return cls.from_json(Path(path).read_bytes(), where or str(path))

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`, which `tokenizers.Tokenizer.from_file` also reads."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def from_json(cls, content: bytes, where: str) -> Tokenizer:
        """The tokenizer that `to_json` made.

        Args:
            content: Of the file.
            where: Where it came from, for the error.

        Raises:
            DataError: It is not a tokenizer of this project.
        """
        try:
            return cls(huggingface.Tokenizer.from_str(content.decode()))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{where} is damaged or of another kind: {error}") from error

    def to_json(self) -> bytes:
        """The content of `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=True).encode()

    def encode(self, text: str) -> list[int]:
        """The ids of a text without unknown tokens, such as a prompt.

        Raises:
            DataError: Characters or words are unknown; the message names them and similar ones.
        """
        stray = [character for character in text if "\ud800" <= character <= "\udfff"]
        if stray:
            raise DataError(f"The text is not valid Unicode: it holds {_show(stray)}.")
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self.unk_id is not None and self.unk_id in encoding.ids:
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            unknown = dict.fromkeys(text[a:b] for id, (a, b) in spans if id == self.unk_id)
            raise DataError(self._unknown(list(unknown)))
        return encoding.ids

    def encode_corpus(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of texts, piece by piece, with `<unk>` for what is unknown.

        Every piece is an int64 array; concatenated they are the ids of all texts. Pieces limit the
        memory and use all cores.
        """
        batch: list[str] = []
        if self._id_of_code_point is not None:
            for piece in pieces(texts):
                yield self._id_of_code_point[_code_points(piece)].astype(np.int64)
            return
        for piece in pieces(texts):
            batch.append(piece)
            if len(batch) == 64:
                yield self._encode_batch(batch)
                batch = []
        if batch:
            yield self._encode_batch(batch)

    def _encode_batch(self, batch: list[str]) -> np.ndarray:
        encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.int64) for encoding in encodings])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without `<doc>`; `<unk>` is left in it.

        Bytes that are not a character, as at the end of a cut sequence (bpe), become U+FFFD.
        """
        return self._tokenizer.decode(
            [int(id) for id in ids if id != self.doc_id], skip_special_tokens=False
        )

    def token(self, id: int) -> str:
        """Display text of a token: its text, `<doc>`, `<unk>`, or `<0xE4>` for part of a character.

        Raises:
            DataError: There is no such id.
        """
        token = self._tokenizer.id_to_token(int(id))
        if token is None:
            raise DataError(f"There is no token {id}: the vocabulary has {self.vocab_size}.")
        if id == self.doc_id:
            return DOC
        text = self.decode([id])
        if self.unk_id is None and "\ufffd" in text:
            raw = bytes(_BYTE_OF[character] for character in token)
            text = "".join(f"<0x{byte:02X}>" for byte in raw)
        return text

    def _unknown(self, unknown: list[str]) -> str:
        vocab = self._tokenizer.get_vocab()
        hints = []
        for token in unknown:
            bare = token.strip() or token
            meant = [bare.lower(), bare.capitalize(), bare.upper()]
            meant += [_LOOKALIKES.get(bare, ""), unicodedata.normalize("NFKC", bare)]
            if len(bare) == 1:
                meant += [unicodedata.normalize("NFD", bare)[0]]
                if "!" <= bare <= "~":  # ASCII for Chinese punctuation
                    meant.append(chr(ord(bare) + 0xFEE0))
            else:
                meant += get_close_matches(token, vocab, n=1)
            for word in filter(None, meant):
                spelt = len(bare) == 1 and set(word) <= vocab.keys()
                if word in vocab or f" {word}" in vocab or spelt:
                    hints.append(f"{word!r} for {bare!r}")
                    break
        kind = "characters" if all(len(token) == 1 for token in unknown) else "words"
        return (
            f"The tokenizer does not know these {kind}, which its training text does not contain"
            f"{' or contains only once' * (kind == 'words')}: {_show(unknown)}."
            f"{' Perhaps ' + ', '.join(hints) + '?' if hints else ''} "
            "Leave them out, or train with tokenizer=bpe, which encodes every text."
        )


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_SPLITS[kind]), behavior="isolated")
    if kind != "bpe":
        return split
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, as_bytes])


def pieces(texts: Iterable[str], size: int = 2**14) -> Iterator[str]:
    """Texts in pieces of at least `size` characters, with the same tokens as the whole.

    A piece ends after a newline that no newline follows: there every kind of tokenizer begins a
    new token (`_SPLITS`).
    """
    for text in texts:
        begin = 0
        while begin < len(text):
            end = text.find("\n", begin + size) + 1 or len(text)
            while text[end : end + 1] == "\n":
                end += 1
            yield text[begin:end]
            begin = end


def _show(tokens: list[str], most: int = 10) -> str:
    shown = [
        f"{token!r} (U+{ord(token):04X})" if len(token) == 1 else repr(token)
        for token in tokens[:most]
    ]
    more = f" and {len(tokens) - most} more" if len(tokens) > most else ""
    return ", ".join(shown) + more


def _byte_of_character() -> dict[str, int]:
    # The byte-level alphabet (GPT-2): printable Latin-1 bytes map to themselves, the others to
    # U+0100 and following, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _byte_of_character()
