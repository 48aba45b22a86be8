"""Which bytes of text each token of a tokenizer stands for."""

import json
import re

import tokenizers
from tokenizers import pre_tokenizers

# Byte-level tokens are spelled with 256 printable characters: a byte that is printable in Latin-1
# is itself, and the others take, in order, the characters from U+0100 (GPT-2, Radford et al. 2019).
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_PRINTABLE = [ord(character) for character in _ALPHABET if ord(character) < 256]
BYTE_OF = dict(zip(_ALPHABET, _PRINTABLE + sorted(set(range(256)) - set(_PRINTABLE)), strict=True))

_LATIN = {ord(character): byte for character, byte in BYTE_OF.items()}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(backend: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes of each token in the middle of a text, by its id; none for special tokens.

    Raises:
      ValueError: the tokenizer decodes in a way that has no such bytes; says which.
    """
    spell = _spelling(backend)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, id_ in vocabulary.items():
        if id_ not in special:
            pieces[id_] = spell(token)
    return pieces


def _spelling(backend):
    """A function from a token to its bytes, from what the decoder does in the middle of a text."""
    steps = _steps(json.loads(backend.decoder.__getstate__())) if backend.decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    space, falls_back = None, False
    for step in steps:
        kind = step["type"]
        if kind == "Metaspace":
            space = step["replacement"]
        elif kind == "Replace" and step["content"] == " " and "String" in step["pattern"]:
            space = step["pattern"]["String"]
        elif kind == "ByteFallback":
            falls_back = True
        elif kind not in ("Fuse", "Strip"):  # which change nothing but the ends of a text
            raise ValueError(_refused(kinds))
    if space is None:
        raise ValueError(_refused(kinds))

    def spell(token):
        byte = _BYTE.fullmatch(token) if falls_back else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(space, " ").encode()

    return spell


def _steps(decoder):
    if decoder["type"] == "Sequence":
        return [step for each in decoder["decoders"] for step in _steps(each)]
    return [decoder]


def _refused(kinds):
    return (
        f"the tokenizer decodes by {', '.join(kinds) or 'nothing'}; supported are ByteLevel, "
        "Metaspace, and Replace with ByteFallback."
    )


def _byte_level(token):
    """A token in the alphabet of bytes; another one stands for itself, as in the library."""
    if BYTE_OF.keys() >= set(token):
        return token.translate(_LATIN).encode("latin-1")
    return token.encode()
