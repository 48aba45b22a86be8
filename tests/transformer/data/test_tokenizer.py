"""Tokenizers: lossless on any text, exact byte counts, streaming, and the cache."""

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.data import tokenizer as tokenizer_module
from transformer.data.tokenizer import (
    END_OF_DOCUMENT,
    FILE_NAME,
    IncrementalDecoder,
    Tokenizer,
    byte_tokenizer,
    cached_bpe,
    train_bpe,
)

CORPUS = [
    "def f(x):\n    if x:\n        return self.name + '日本語'\n    return x + 100\n" * 5,
    "class A:\n    def __init__(self):\n        self.name = 'naïve'\r\n\tpass\n" * 5,
]
BPE = train_bpe(CORPUS, 300)
BYTES = byte_tokenizer()
both_kinds = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])

# Any text at all, and texts built of what could trip a tokenizer: runs of white space, the name of
# the special token, characters of several bytes, combining marks, and words of the corpus.
SIGNS = ["<|endoftext|>", "<|", "|>", " ", "\t", "\n", "\r\n", "\xa0", "\u2028", "\0", "\ufeff"]
WORDS = ["def", "self", ".name", "(x):", "12345", "é", "e\u0301", "日", "👩\u200d👧", "x1", "_"]
texts = st.text() | st.lists(st.sampled_from(SIGNS + WORDS)).map("".join)
examples = settings(deadline=None, max_examples=200)


@both_kinds
@examples
@given(text=texts)
def test_round_trip_is_lossless_and_byte_lengths_are_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    np.testing.assert_array_equal(tokenizer.encode_batch([text, text])[1], ids)


@both_kinds
@examples
@given(data=st.data())
def test_streaming_equals_decoding_at_once_for_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    decoder = IncrementalDecoder(tokenizer)
    assert "".join([decoder.push(i) for i in ids] + [decoder.finish()]) == tokenizer.decode(ids)


@both_kinds
@examples
@given(text=texts)
def test_streaming_gives_each_character_with_its_last_byte(tokenizer, text):
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer.encode(text)
    given_out = ""
    for count, id_ in enumerate(ids, 1):
        given_out += decoder.push(id_)
        so_far = text.encode()[: tokenizer.byte_lengths[ids[:count]].sum()]
        assert given_out == so_far.decode(errors="ignore")
    assert decoder.finish() == ""


def test_threads_encode_with_and_without_special_tokens_at_once():
    """The library has a setting for it, which all threads share."""
    text = END_OF_DOCUMENT * 50
    wanted = {True: [BPE.end_of_document] * 50, False: BPE.encode(text)}
    with ThreadPoolExecutor(4) as pool:
        special = [n % 2 == 0 for n in range(400)]
        given = list(pool.map(lambda x: BPE.encode(text, special=x), special))
    assert given == [wanted[x] for x in special] and wanted[True] != wanted[False]


def test_a_copy_encodes_alike():
    assert pickle.loads(pickle.dumps(BPE)).encode("def f(x)") == BPE.encode("def f(x)")


def test_byte_ids_are_the_bytes():
    everything = "".join(map(chr, range(0x250)))
    assert BYTES.encode(everything) == list(everything.encode())
    assert [BYTES.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert (BYTES.vocab_size, BYTES.end_of_document) == (257, 256)
    assert BYTES.byte_lengths.tolist() == [1] * 256 + [0]


def test_bpe_has_the_size_asked_for_every_byte_and_compresses():
    assert BPE.vocab_size == 300
    assert {bytes([i]) for i in range(256)} <= {BPE.token_bytes(i) for i in range(300)}
    text = CORPUS[0]
    assert len(BPE.encode(text)) < len(text.encode()) / 2


def test_small_corpus_gives_a_smaller_vocabulary():
    tokenizer = train_bpe(["ab"], 1000)
    assert tokenizer.vocab_size == 258
    assert tokenizer.byte_lengths.max() == 2


@both_kinds
def test_special_token_is_nothing_in_text(tokenizer):
    assert tokenizer.byte_lengths[tokenizer.end_of_document] == 0
    assert tokenizer.decode([tokenizer.end_of_document]) == ""
    assert len(tokenizer.encode(END_OF_DOCUMENT)) > 1


@both_kinds
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    text = "".join(CORPUS) + END_OF_DOCUMENT
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.vocab_size, loaded.end_of_document) == (
        tokenizer.vocab_size,
        tokenizer.end_of_document,
    )
    np.testing.assert_array_equal(loaded.byte_lengths, tokenizer.byte_lengths)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [FILE_NAME]


def test_training_is_deterministic_across_processes(tmp_path):
    train_bpe(CORPUS, 320).save(tmp_path / "here")
    program = (
        "import json, sys; from transformer.data.tokenizer import train_bpe;"
        "train_bpe(json.loads(sys.argv[1]), 320).save(sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", program, json.dumps(CORPUS), str(tmp_path / "there")], check=True
    )
    assert (tmp_path / "here" / FILE_NAME).read_bytes() == (
        tmp_path / "there" / FILE_NAME
    ).read_bytes()


def test_cache_trains_once_for_each_corpus_size_and_pattern(tmp_path, monkeypatch):
    trained = []

    def counting(texts, vocab_size):
        trained.append(vocab_size)
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr(tokenizer_module, "train_bpe", counting)
    first = cached_bpe(CORPUS, 280, tmp_path)
    again = cached_bpe(CORPUS, 280, tmp_path)
    assert trained == [280]
    assert again.encode(CORPUS[0]) == first.encode(CORPUS[0])
    cached_bpe(CORPUS, 290, tmp_path)
    cached_bpe(["".join(CORPUS)], 280, tmp_path)
    monkeypatch.setattr(tokenizer_module, "PATTERN", r"\s+|\S+")
    cached_bpe(CORPUS, 280, tmp_path)
    assert trained == [280, 290, 280, 280]


def test_a_damaged_cache_is_made_anew(tmp_path):
    first = cached_bpe(CORPUS, 280, tmp_path)
    [path] = tmp_path.rglob("tokenizer.json")
    for content in (b"xx", b"\xff"):
        path.write_bytes(content)
        assert cached_bpe(CORPUS, 280, tmp_path).encode(CORPUS[0]) == first.encode(CORPUS[0])


def test_killed_training_leaves_no_file_that_is_taken_for_a_tokenizer(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(Killed):
            cached_bpe(CORPUS, 280, tmp_path)
    assert cached_bpe(CORPUS, 280, tmp_path).vocab_size == 280


def test_a_cache_that_cannot_be_written_costs_only_the_time(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert cached_bpe(CORPUS, 280, tmp_path / "file" / "unison").vocab_size == 280
    [record] = caplog.records
    assert "the tokenizer is not kept for the next run" in record.getMessage()
    assert f"{tmp_path}/file/unison/bpe-280-" in record.getMessage()
    assert "Not a directory" in record.getMessage()


def test_wrong_use_gets_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=256; it must be at least 257"):
        train_bpe(CORPUS, 256)
    for id_ in (-1, 257):
        with pytest.raises(ValueError, match=rf"token id {id_} is outside of 0\.\.256"):
            BYTES.decode([id_])
    with pytest.raises(ValueError, match=r"surrogate pair, '\\ud800', at character 2"):
        BPE.encode("ab\ud800")
    with pytest.raises(ValueError, match="surrogate pair"):
        BPE.encode_batch(["fine", "\udcff"])
    with pytest.raises(FileNotFoundError, match=FILE_NAME):
        Tokenizer.load(tmp_path)
    panics = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["ab", "b"]]}
    for damaged in ('{"half": ', json.dumps({"version": "1.0", "model": panics})):
        (tmp_path / FILE_NAME).write_text(damaged)
        with pytest.raises(ValueError, match="is not a tokenizer file"):
            Tokenizer.load(tmp_path)
    (tmp_path / FILE_NAME).write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}'
    )
    with pytest.raises(ValueError, match=r"no token <\|endoftext\|>"):
        Tokenizer.load(tmp_path)
