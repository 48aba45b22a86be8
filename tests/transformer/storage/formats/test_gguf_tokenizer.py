"""Tokenizers in files of GGUF: the ids are those of the tokenizer that was converted."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from transformer.data.tokenizer import train_bpe
from transformer.storage.formats.gguf_tokenizer import read_tokenizer

CORPUS = ["The year 1984 and 22 of the 333 things; it's  what\n\n  they SAY, isn't it?  été\n" * 8]
BPE = json.loads(train_bpe(CORPUS, 330).to_json())["model"]
TOKENS = [*sorted(BPE["vocab"], key=BPE["vocab"].get), "<|im_end|>", "<think>"]


def byte_level(pre):
    """The metadata of a byte-level tokenizer, with a special token and one that is not."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 2) + [3, 4],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in BPE["merges"]],
        "tokenizer.ggml.eos_token_id": len(TOKENS) - 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


# The longest pieces into which each of them may cut a text.
@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("smollm", "  1  22\n\n  333", ["  ", "1", "  ", "2", "2", "\n\n  ", "3", "3", "3"]),
        ("qwen2", "a  12\n\n b", ["a", " ", " ", "1", "2", "\n\n", " b"]),
        ("llama-bpe", "IT'S 12345", ["IT", "'S", " ", "123", "45"]),
        ("gpt-2", "it's 12345 !!", ["it", "'s", " 12345", " !!"]),
    ],
)
def test_texts_are_cut_as_each_family_does(pre, text, pieces):
    """Ids of the whole text are those of its pieces, which are never merged."""
    tokenizer = read_tokenizer(byte_level(pre))
    assert tokenizer.encode(text) == [i for piece in pieces for i in tokenizer.encode(piece)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_ends_and_template():
    tokenizer = read_tokenizer(byte_level("smollm"))
    end = len(TOKENS) - 2
    assert tokenizer.ends == (end,) and tokenizer.begin == ()
    assert tokenizer.encode("<|im_end|>", special=True) == [end]
    assert end not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode("<think>") == [end + 1]
    assert tokenizer.decode([end, end + 1]) == "<think>"
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.names == {"eos_token": "<|im_end|>"}


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abehlotw", "▁h"]
PIECES += ["he", "ll", "▁he", "hell", "▁hello", "lo", "▁w", "wo", "la", "tt", "et"]
TYPES = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259)


def sentence_piece(space_prefix):
    """A BPE of SentencePiece as it is rebuilt, and in the library, as transformers has it."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    scores = [0.0] * 259 + [-float(n) for n in range(len(PIECES) - 259)]
    merges = []
    for piece in PIECES[259:]:  # by falling scores
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    library = Tokenizer(model)
    prepend = [normalizers.Prepend("▁")] if space_prefix else []
    library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    library.add_special_tokens([AddedToken(x, normalized=False) for x in ("<unk>", "<s>", "</s>")])
    library.encode_special_tokens = True
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }
    return read_tokenizer(metadata), library


KINDS = {space_prefix: sentence_piece(space_prefix) for space_prefix in (True, False)}


@pytest.mark.parametrize("space_prefix", [True, False])
@given(text=st.text(st.sampled_from("abehlotw  é日\n<")) | st.text())
def test_sentence_piece_gives_the_ids_of_the_library(space_prefix, text):
    tokenizer, library = KINDS[space_prefix]
    ids = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.begin == (1,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert' is not supported"),
        ({"tokenizer.ggml.pre": "mystery"}, "tokenizer.ggml.pre='mystery': how it cuts texts"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.merges": ["Z Z"]}, "tokenizer.ggml.merges do not fit the tokens"),
    ],
)
def test_other_tokenizers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_tokenizer(byte_level("gpt-2") | change)


def test_a_file_without_a_tokenizer_has_none():
    assert read_tokenizer({}) is None
