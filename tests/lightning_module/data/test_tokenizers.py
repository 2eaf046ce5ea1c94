"""Tokenizers: text comes back as it was, training is reproducible, unknown text is named."""

import os
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import tokenizers as huggingface
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_module.data.tokenizers import DOC, UNK, Tokenizer, TokenizerSettings, pieces
from lightning_module.errors import DataError

ENGLISH = (
    "HAMLET:\nTo be, or not to be: that is the question--\n\nWhether 'tis nobler o'er the king's "
    "mind,  to suffer 1603 slings.\n\n\n[Exit]\n"
)
CHINESE = "话说天下大势，分久必合，合久必分。\n“此名《太平要术》”！\u3000周末七国分争，并入于秦。\n"
TEXTS = [ENGLISH * 3, CHINESE * 3, ENGLISH.upper() * 2 + CHINESE]
SETTINGS = {
    "char": TokenizerSettings("char"),
    "bpe": TokenizerSettings("bpe", 400),
    "word": TokenizerSettings("word"),
}

# Whitespace, marks and scripts where splitting goes wrong if it does.
TROUBLE = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r'’-.,三国がナไ́é1२_\u3000\u00a0\u2028\x00\x85"),
        st.characters(codec="utf-8"),
    ),
    max_size=60,
)


@pytest.fixture(scope="module", params=SETTINGS)
def tokenizer(request):
    return Tokenizer.train(SETTINGS[request.param], TEXTS)


def corpus_ids(tokenizer, texts):
    return np.concatenate([*tokenizer.encode_corpus(texts), np.empty(0, np.int64)]).tolist()


# --- there and back -------------------------------------------------------------------------------


def test_training_text_decodes_to_itself(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == corpus_ids(tokenizer, [text])
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.doc_id not in ids


@given(TROUBLE, TROUBLE)
def test_characters_by_the_table_are_those_of_the_library(known, text):
    tokenizer = Tokenizer.train(SETTINGS["char"], [known])
    library = tokenizer._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert corpus_ids(tokenizer, [text]) == library


@given(TROUBLE)
@example("<doc>")
def test_bpe_encodes_every_text(text):
    tokenizer = _trained("bpe")
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id is None
    assert tokenizer.doc_id not in ids
    assert tokenizer.decode(ids) == text


@given(TROUBLE)
@pytest.mark.parametrize("kind", ["char", "word"])
def test_text_of_known_tokens_decodes_to_itself(kind, text):
    tokenizer = Tokenizer.train(SETTINGS[kind], [text, text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if kind == "char":
        assert len(tokenizer.encode(text)) == len(text)
        assert tokenizer.vocab_size == len(set(text)) + 2


@given(st.lists(TROUBLE, max_size=3), st.integers(1, 12))
@pytest.mark.parametrize("kind", SETTINGS)
def test_pieces_have_the_tokens_of_the_whole(kind, texts, size):
    tokenizer = _trained(kind)
    assert "".join(pieces(texts, size)) == "".join(texts)
    for text in texts:
        whole = tokenizer._tokenizer.encode(text).ids
        parts = (tokenizer._tokenizer.encode(piece).ids for piece in pieces([text], size))
        assert list(chain.from_iterable(parts)) == whole
        assert corpus_ids(tokenizer, [text]) == whole


def test_pieces_are_cut():
    assert list(pieces(["ab\n\ncd\nef", "g\n"], 2)) == ["ab\n\n", "cd\n", "ef", "g\n"]


_cache = {}


def _trained(kind):
    if kind not in _cache:
        _cache[kind] = Tokenizer.train(SETTINGS[kind], TEXTS)
    return _cache[kind]


# --- what a token is ------------------------------------------------------------------------------


def tokens(kind, text):
    tokenizer = Tokenizer.train(SETTINGS[kind], [text, text])
    return [tokenizer.token(id) for id in tokenizer.encode(text)]


def test_words():
    assert "|".join(tokens("word", "O, that o'er the king’s  2 men--\n\n\tgo! 三国 ab演 é")) == (
        "O|,| that| o'er| the| king’s| | 2| men|-|-|\n\n|\t|go|!| 三|国| ab|演| é"
    )


def test_characters():
    assert tokens("char", "a \n三é") == ["a", " ", "\n", "三", "é"]


def test_byte_pairs_merge_what_is_frequent():
    frequent = tokens("bpe", "the king and the queen\n" * 20)
    assert frequent[:6] == ["the", " king", " and", " the", " queen", "\n"]
    # A part of a character is shown as its bytes.
    assert _trained("bpe").token(_trained("bpe").encode("龘")[0]) == "<0xE9>"


def test_special_tokens():
    for kind in SETTINGS:
        tokenizer = _trained(kind)
        assert tokenizer.token(tokenizer.doc_id) == DOC
        assert tokenizer.decode([tokenizer.doc_id, *tokenizer.encode("To be")]) == "To be"
        with pytest.raises(DataError, match=f"There is no token {tokenizer.vocab_size}"):
            tokenizer.token(tokenizer.vocab_size)
    assert _trained("char").token(_trained("char").unk_id) == UNK


def test_doc_in_a_text_is_text():
    for kind in SETTINGS:
        tokenizer = Tokenizer.train(SETTINGS[kind], ["<doc> <unk>\n"] * 300)
        ids = tokenizer.encode("<doc> <unk>\n")
        assert not {tokenizer.doc_id, tokenizer.unk_id} & set(ids)
        assert tokenizer.decode(ids) == "<doc> <unk>\n"


# --- training -------------------------------------------------------------------------------------


def test_vocab_size_keeps_the_frequent():
    tokenizer = Tokenizer.train(TokenizerSettings("char", 4), ["aaabbbccd"])
    assert tokenizer.vocab_size == 4
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    assert corpus_ids(tokenizer, ["acb"])[1] == tokenizer.unk_id
    assert Tokenizer.train(TokenizerSettings("word", 4), ["a a a b b b c c d"]).vocab_size == 4
    assert Tokenizer.train(TokenizerSettings("bpe", 300), TEXTS).vocab_size == 300


def test_words_that_occur_once_are_unknown_in_training_too():
    tokenizer = Tokenizer.train(
        SETTINGS["word"], ["the king and the queen and king\n" * 2 + "the x"]
    )
    ids = corpus_ids(tokenizer, ["the x king and"])
    assert [id == tokenizer.unk_id for id in ids] == [False, True, False, False]


@pytest.mark.parametrize("kind", SETTINGS)
def test_training_is_reproducible(kind, tmp_path):
    """In processes of their own, where hashes differ."""
    code = (
        "import sys; from lightning_module.data.tokenizers import *;"
        "from tests.lightning_module.data.test_tokenizers import SETTINGS, TEXTS;"
        f"Tokenizer.train(SETTINGS['{kind}'], TEXTS).save(sys.argv[1])"
    )
    for index in range(3):
        environment = {**os.environ, "PYTHONHASHSEED": str(index), "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", code, str(tmp_path / f"{index}.json")]
        subprocess.run(command, check=True, env=environment)
    assert len({(tmp_path / f"{index}.json").read_bytes() for index in range(3)}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TokenizerSettings("chars"), "tokenizer.kind must be one of char, word, bpe, got chars"),
        (TokenizerSettings("bpe"), "tokenizer=bpe needs tokenizer.vocab_size"),
        (TokenizerSettings("bpe", 100), "tokenizer.vocab_size must be at least 257 for bpe"),
        (TokenizerSettings("char", 2), "tokenizer.vocab_size must be at least 3 for char, got 2"),
    ],
)
def test_settings_that_make_no_tokenizer(settings, message):
    with pytest.raises(DataError, match=message):
        Tokenizer.train(settings, TEXTS)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    loaded = Tokenizer.load(path)
    assert (loaded.vocab_size, loaded.doc_id, loaded.unk_id) == (
        tokenizer.vocab_size,
        tokenizer.doc_id,
        tokenizer.unk_id,
    )
    other = huggingface.Tokenizer.from_file(str(path))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids == other.encode(text).ids
        assert loaded.decode(ids) == text == other.decode(ids)


def test_load_of_other_files(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"There is no tokenizer .*tokenizer\.json"):
        Tokenizer.load(path)
    tokenizer.save(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged or of another kind"):
        Tokenizer.load(path)
    huggingface.Tokenizer(huggingface.models.BPE()).save(str(path))
    with pytest.raises(DataError, match="no token <doc>: it was not made by this project"):
        Tokenizer.load(path)


# --- what is unknown ------------------------------------------------------------------------------


def test_unknown_characters_are_named():
    tokenizer = Tokenizer.train(SETTINGS["char"], ["to be, o naive '--' e\n", "天下，"])
    with pytest.raises(DataError) as error:
        tokenizer.encode("To be “naïve”—天上\u2026")
    message = str(error.value)
    assert "does not know these characters" in message
    for part in ("'T' (U+0054)", "'ï' (U+00EF)", "'—' (U+2014)", "'上' (U+4E0A)", "tokenizer=bpe"):
        assert part in message
    for hint in ("'t' for 'T'", "'i' for 'ï'", "'--' for '—'"):
        assert hint in message
    chinese = Tokenizer.train(SETTINGS["char"], [CHINESE])
    with pytest.raises(DataError, match="Perhaps '，' for ',', '！' for '!'"):
        chinese.encode("天下,大势!")


def test_unknown_words_are_named():
    with pytest.raises(DataError) as error:
        _trained("word").encode("whether nobbler blockchain\n")
    message = str(error.value)
    assert "does not know these words" in message and "' blockchain'" in message
    assert "'Whether' for 'whether', ' nobler' for 'nobbler'" in message
    many = "".join(chr(0x1F600 + i) for i in range(15))
    with pytest.raises(DataError, match="and 5 more"):
        _trained("char").encode(many)


def test_unknown_text_of_a_corpus_is_unk():
    tokenizer = Tokenizer.train(SETTINGS["char"], ["abc"])
    assert corpus_ids(tokenizer, ["axb"]) == [
        *tokenizer.encode("a"),
        tokenizer.unk_id,
        *tokenizer.encode("b"),
    ]
    assert tokenizer.decode(corpus_ids(tokenizer, ["axb"])) == "a<unk>b"


@pytest.mark.parametrize("kind", SETTINGS)
def test_prompts_that_are_no_unicode(kind):
    """Bytes of the command line that are no UTF-8 come as lone surrogates."""
    with pytest.raises(DataError, match=r"not valid Unicode: it holds '\\udce9' \(U\+DCE9\)"):
        _trained(kind).encode("caf\udce9")


def test_empty_text_has_no_tokens(tokenizer):
    assert tokenizer.encode("") == [] == corpus_ids(tokenizer, [])
    assert tokenizer.decode([]) == ""
