"""Text to token ids and back without loss, by bytes or by a byte-level BPE trained on a corpus.

Both kinds are one `tokenizers` model: bytes are a BPE without merges. A token is a string of bytes,
so every text has ids, and joining the bytes of the ids gives the text back. One special token
stands outside of the text: it ends a document and begins the next one, whose first token it is.
"""

import codecs
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from transformer.files import write_text

END_OF_DOCUMENT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"

# Where a text may be cut before merging, in the manner of GPT-4's pattern. Two departures suit
# code: a word may hold digits ("utf8", "x00ff"), and white space with a line break, or after
# punctuation, is one piece with the indentation that follows ("):\n        ").
PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{N}]*",  # a word and the one sign before it
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+\s*",
        r"\s*[\r\n]\s*",
        r"\s+(?!\S)|\s+",  # a run of spaces leaves its last one to the word
    )
)

# Byte-level tokens are spelled with 256 printable characters: a byte that is printable in Latin-1
# is itself, and the others take, in order, the characters from U+0100 (GPT-2, Radford et al. 2019).
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_PRINTABLE = [ord(character) for character in _ALPHABET if ord(character) < 256]
_BYTE_OF = dict(zip(_ALPHABET, _PRINTABLE + sorted(set(range(256)) - set(_PRINTABLE)), strict=True))

_log = logging.getLogger(__name__)

# Texts in one call of the library: it keeps about 100 bytes a token until the call is over.
_TEXTS_PER_CALL = 64


class Tokenizer:
    """A byte-level tokenizer with one special token, the end of a document.

    Attributes:
        vocab_size: V, the number of ids; ids are 0..V-1.
        end_of_document: id of the special token. No text encodes to it, not even its own name.
        byte_lengths: int32 [V], bytes of text each token stands for; 0 for the special token. The
            sum over `encode(text)` is exactly `len(text.encode())`.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wraps a byte-level BPE of `tokenizers`.

        Raises:
            ValueError: the backend lacks the special token, or has tokens that are not byte-level.
        """
        end = backend.token_to_id(END_OF_DOCUMENT)
        if end is None:
            raise ValueError(f"the tokenizer has no token {END_OF_DOCUMENT}, which must end texts.")
        backend.encode_special_tokens = True  # The name of a special token in a text is only text.
        self._backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.end_of_document = end
        added = backend.get_added_tokens_decoder()
        self._token_bytes = [b""] * self.vocab_size
        for token, id_ in backend.get_vocab(with_added_tokens=False).items():
            if id_ in added:
                continue
            try:
                self._token_bytes[id_] = bytes(_BYTE_OF[character] for character in token)
            except KeyError:
                raise ValueError(
                    f"token {id_}, {token!r}, is not spelled in the byte-level alphabet; "
                    "only byte-level tokenizers are supported."
                ) from None
        self.byte_lengths = np.array([len(token) for token in self._token_bytes], np.int32)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a special token.

        Raises:
            ValueError: the text has no UTF-8 form (it holds half of a surrogate pair).
        """
        require_utf8(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as int32 [T], as `encode` gives them, on all cores."""
        for text in texts:
            require_utf8(text)
        ids = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            encodings = self._backend.encode_batch_fast(
                texts[start : start + _TEXTS_PER_CALL], add_special_tokens=False
            )
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that a token stands for; none for the special token.

        Raises:
            ValueError: the id is outside of 0..V-1.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside of 0..{self.vocab_size - 1}.")
        return self._token_bytes[token]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Bytes that are not UTF-8 become U+FFFD; special tokens vanish."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json`, which the library `tokenizers` reads too, in one atomic step."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / FILE_NAME, self._backend.to_str())

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the directory holds no `tokenizer.json`.
            ValueError: the file is not a byte-level tokenizer with an end of document.
        """
        path = Path(directory) / FILE_NAME
        content = path.read_bytes()
        try:
            text = content.decode()
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        return cls(backend)


class IncrementalDecoder:
    """Decodes ids that come one by one; a character appears once all its bytes are there.

    The pieces joined are what `Tokenizer.decode` makes of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Takes one id and returns the text that is now whole, often the empty string."""
        return self._utf8.decode(self._token_bytes(token))

    def finish(self) -> str:
        """The rest at the end: U+FFFD if a character stayed incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def byte_tokenizer() -> Tokenizer:
    """The tokenizer whose ids 0..255 are the bytes themselves, and 256 the special token."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(_BYTE_OF), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([END_OF_DOCUMENT])
    return Tokenizer(backend)


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016); the same texts give the same tokenizer.

    Args:
        texts: the corpus; merges never cross the pieces of `PATTERN`.
        vocab_size: V with the 256 bytes and the special token. A corpus too small to offer that
            many merges gives a smaller vocabulary.

    Raises:
        ValueError: `vocab_size` is below 257.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size={vocab_size}; it must be at least 257: 256 bytes and {END_OF_DOCUMENT}."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=_ALPHABET, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([END_OF_DOCUMENT])
    return Tokenizer(backend)


def cached_bpe(
    texts: Sequence[str], vocab_size: int, cache_directory: str | os.PathLike
) -> Tokenizer:
    """Returns what `train_bpe` gives, and trains only where it has not been given before.

    Each tokenizer has its own folder under `cache_directory`, named by its size and a hash of the
    pattern and the texts. Where the folder cannot be written, a warning is logged.
    """
    digest = hashlib.sha256(PATTERN.encode())
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    directory = Path(cache_directory) / f"bpe-{vocab_size}-{digest.hexdigest()[:16]}"
    try:
        return Tokenizer.load(directory)
    except (OSError, ValueError):  # it is not there, or damaged, or may not be read
        tokenizer = train_bpe(texts, vocab_size)
    try:
        tokenizer.save(directory)
    except OSError as error:
        _log.warning(
            "the tokenizer is not kept for the next run: %s cannot be written (%s)",
            directory,
            error.strerror,
        )
    return tokenizer


def require_utf8(text: str) -> None:
    """Refuses a text that holds half of a surrogate pair, which has no bytes in UTF-8.

    Raises:
      ValueError: names the character and its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a surrogate pair, {text[error.start]!a}, at character "
            f"{error.start}, so it cannot be written as UTF-8; give whole Unicode characters."
        ) from None
