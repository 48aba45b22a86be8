"""Text to token ids and back: by bytes, by a byte-level BPE, or by a published tokenizer.

All kinds are a `tokenizers` model: bytes are a BPE without merges. In those that are made here a
token is a string of bytes, so every text has ids, and joining the bytes of the ids gives the text
back. One special token stands outside of the text: it ends a document and begins the next one,
whose first token it is.
"""

import codecs
import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from transformer.data.pieces import BYTE_OF, token_bytes
from transformer.files import write_json, write_text

END_OF_DOCUMENT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
SETTINGS_FILE = "tokenizer_settings.json"  # beside it, for published tokenizers

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

_log = logging.getLogger(__name__)

_SETTING = threading.Lock()  # one for all tokenizers, which so can be copied to other processes

# Texts in one call of the library: it keeps about 100 bytes a token until the call is over.
_TEXTS_PER_CALL = 64


class Tokenizer:
    """A tokenizer, with special tokens that stand outside of the text.

    Attributes:
        vocab_size: V, the number of ids; ids are 0..V-1.
        end_of_document: id of the special token that ends a text; None: there is none.
        ends: all ids that end what a model writes, that one first.
        begin: ids that stand before a text.
        byte_lengths: int32 [V], bytes of text each token stands for; 0 for special tokens. In
            tokenizers made here the sum over `encode(text)` is exactly `len(text.encode())`.
        chat_template: a template of jinja2 that makes a text of messages; None: there is none.
        names: names that the template may use, as `bos_token`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        begin: Sequence[int] | None = None,
        ends: Sequence[int] | None = None,
        chat_template: str | None = None,
        names: Mapping[str, str] | None = None,
    ):
        """Wraps a tokenizer of `tokenizers`.

        Args:
            backend: a setting of it is changed at every call, so it is this tokenizer's alone.
            begin, ends: None: the token <|endoftext|>, as in those that are made here.
            chat_template, names: as above.

        Raises:
            ValueError: the backend lacks that token, or decodes in a way that is not supported.
        """
        if begin is None or ends is None:
            end = backend.token_to_id(END_OF_DOCUMENT)
            if end is None:
                raise ValueError(
                    f"the tokenizer has no token {END_OF_DOCUMENT}, which must end texts."
                )
            begin = [end] if begin is None else begin
            ends = [end] if ends is None else ends
        self._backend = backend
        self._token_bytes = token_bytes(backend)
        self.vocab_size = len(self._token_bytes)
        self.begin, self.ends = tuple(begin), tuple(ends)
        self.end_of_document = self.ends[0] if self.ends else None
        self.chat_template, self.names = chat_template, dict(names or {})
        self.byte_lengths = np.array([len(token) for token in self._token_bytes], np.int32)

    @property
    def document_start(self) -> tuple[int, ...]:
        """Ids that a document begins with: `begin`, or what ends the one before it."""
        return self.begin or (self.end_of_document,)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text, nothing put before or behind it.

        Args:
            text: any text.
            special: whether the name of a special token stands for that token. By default it is
                text like any other.

        Raises:
            ValueError: the text has no UTF-8 form (it holds half of a surrogate pair).
        """
        require_utf8(text)
        with self._spelling(special):
            return self._backend.encode(text, add_special_tokens=False).ids

    @contextlib.contextmanager
    def _spelling(self, special):
        """Whether names of special tokens stand for them is a setting, and one for all threads."""
        with _SETTING:
            self._backend.encode_special_tokens = not special
            yield

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as int32 [T], as `encode` gives them, on all cores."""
        for text in texts:
            require_utf8(text)
        ids = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            with self._spelling(special=False):
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
        """The text of some ids. Bytes that are not UTF-8 become U+FFFD; special tokens vanish.

        Raises:
            ValueError: an id is outside of 0..V-1.
        """
        ids = list(ids)
        for token in ids:
            self.token_bytes(token)
        return self._backend.decode(ids, skip_special_tokens=True)

    def to_json(self) -> str:
        """The contents of `tokenizer.json`, as the library `tokenizers` reads it."""
        return self._backend.to_str()

    def token(self, token: int) -> str | None:
        """How the library spells a token; None: there is no such id."""
        return self._backend.id_to_token(token)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and, for a published tokenizer, settings, each in one step."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / FILE_NAME, self.to_json())
        end = self._backend.token_to_id(END_OF_DOCUMENT)
        if (self.begin, self.ends, self.chat_template) != ((end,), (end,), None):
            names = ("begin", "ends", "chat_template", "names")
            write_json(directory / SETTINGS_FILE, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the directory holds no `tokenizer.json`.
            ValueError: a file is damaged, or the tokenizer is of a kind that is not supported.
        """
        directory = Path(directory)
        backend = read_backend(directory / FILE_NAME)
        path = directory / SETTINGS_FILE
        if not path.exists():
            return cls(backend)
        try:
            return cls(backend, **json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a tokenizer: {error}") from error


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Reads a file of the library `tokenizers`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    content = path.read_bytes()
    with refused(f"{path} is not a tokenizer file"):
        return tokenizers.Tokenizer.from_str(content.decode())


@contextlib.contextmanager
def refused(what: str):
    """Makes a ValueError of whatever the library `tokenizers` raises: `what`, and the reason."""
    try:
        yield
    except BaseException as error:
        # The library panics over some damage, which is not an `Exception`; nor is an interrupt.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {error}") from error


class IncrementalDecoder:
    """Decodes ids that come one by one; a character appears once all its bytes are there.

    The pieces joined are what `Tokenizer.decode` makes of all the ids, as in the middle of a text:
    some published tokenizers drop a space at the beginning of one.
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
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
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
        vocab_size=vocab_size - 1, initial_alphabet=sorted(BYTE_OF), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_DOCUMENT])
    return Tokenizer(backend)


def cached_bpe(
    texts: Sequence[str], vocab_size: int, cache_directory: str | os.PathLike
) -> Tokenizer:
    """Returns what `train_bpe` gives, and trains only where it has not been given before.

    Each tokenizer has its own folder under `cache_directory`, named by its size and a hash of the
    pattern and the texts. Where the folder cannot be written, a warning is logged.
    """
    digest = hashlib.sha256(PATTERN.encode() + b"decoded")  # files without a decoder came before
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
