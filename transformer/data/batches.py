"""A corpus as batches: packed into rows, shuffled, sharded by process, and resumed.

A tokenized corpus is one stream of documents, each behind the tokens that begin one. The target of
a token is the one after it, and that of a document's last token is the token that ends a document;
in tokenizers made here one special token does both. Rows are windows of that stream. Grain
shuffles, shards and batches them. Because any row of any epoch can be computed alone, the state of
an iterator is one integer.
"""

import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from transformer.checks import whole_number
from transformer.data.chat import read_messages, taught_tokens
from transformer.data.documents import Document
from transformer.data.tokenizer import Tokenizer


class Batch(NamedTuple):
    """Rows of packed documents, a pytree of arrays [B, T].

    Attributes:
        tokens: int32, the inputs.
        targets: int32, the token after each input in its document; after the last, the token that
            ends one.
        positions: int32, the position of the input in the piece of its document that lies in this
            row. The pieces of a row are contiguous, and each counts from 0.
        weights: float32, 1 where the target counts and 0 where there is only padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


class TokenizedCorpus(NamedTuple):
    """Documents as one stream of tokens.

    Attributes:
        tokens: int32 [N + 1], each document as the tokens that begin one and its text, and after
            the last document the token that ends one.
        starts: int64 [documents + 1], where each document begins, and N.
        weights: float32 [N], 1 where the target of a token counts, else 0.
    """

    tokens: np.ndarray
    starts: np.ndarray
    weights: np.ndarray


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, chat: bool = False
) -> TokenizedCorpus:
    """Encodes documents into one stream.

    Args:
        documents: the documents.
        tokenizer: encodes them.
        chat: whether a document is a conversation, an object of JSON with "messages". What the
            assistant says counts, and nothing else.

    Raises:
        ValueError: there is no document, or one of them is not a conversation.
    """
    if not documents:
        raise ValueError("there are no documents to tokenize; give at least one.")
    if chat:
        encoded = [_encode_conversation(document, tokenizer) for document in documents]
        tokens, weights = ([one[n] for one in encoded] for n in range(2))
    else:
        texts = tokenizer.encode_batch([document.text for document in documents])
        start = np.array(tokenizer.document_start, np.int32)
        tokens = [np.concatenate([start, text]) for text in texts]
        weights = [np.ones(len(text), np.float32) for text in tokens]
    starts = np.cumsum([0] + [len(text) for text in tokens])
    end = np.array([tokenizer.end_of_document], np.int32)
    return TokenizedCorpus(np.concatenate([*tokens, end]), starts, np.concatenate(weights))


def _encode_conversation(document, tokenizer):
    """The tokens of a conversation, and the weights of their targets."""
    try:
        tokens, own = taught_tokens(tokenizer, read_messages(document.text))
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from error
    ends = own[-1] and tokens[-1] not in tokenizer.ends  # nothing in the text says so
    return np.array(tokens, np.int32), np.array([*own[1:], ends], np.float32)


class PackedRows(grain.MapDataset[Batch]):
    """The rows [T] of a corpus; in each epoch every target counts in exactly one row.

    The documents are joined, and the stream is cut into rows of `length`. With a seed every epoch
    joins them in a new order and begins to cut at a new place, going round at the end, so a
    document is cut elsewhere each time. Without one, every epoch is in order from the beginning.
    The last row is filled up with padding, each token of which is a piece of its own.
    """

    def __init__(self, corpus: TokenizedCorpus, length: int, seed: int | None = None):
        super().__init__()
        self._corpus = corpus
        self._length = length
        self._seed = seed
        # A batch may lie in two epochs.
        self._layout = functools.lru_cache(maxsize=2)(self._compute_layout)

    def __len__(self) -> int:
        return -(-int(self._corpus.starts[-1]) // self._length)

    def _compute_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The order of documents, where each then begins, and where the first row does."""
        lengths = np.diff(self._corpus.starts)
        if self._seed is None:
            return np.arange(len(lengths)), self._corpus.starts, 0
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(lengths))
        starts = np.concatenate([[0], np.cumsum(lengths[order])])
        return order, starts, int(random.integers(starts[-1]))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        tokens, document_starts, weights = self._corpus
        epoch, row = divmod(index, len(self))
        order, starts, offset = self._layout(epoch)
        columns = np.arange(self._length)
        joined = (offset + row * self._length + columns) % starts[-1]
        piece = np.searchsorted(starts, joined, side="right") - 1
        in_document = joined - starts[piece]
        source = document_starts[order[piece]] + in_document
        last = source + 1 == document_starts[order[piece] + 1]
        real = row * self._length + columns < starts[-1]
        return Batch(
            tokens=np.where(real, tokens[source], tokens[-1]),
            targets=np.where(real & ~last, tokens[source + 1], tokens[-1]),
            # A document that began in an earlier row counts from the beginning of this one.
            positions=np.where(real, np.minimum(in_document, columns), 0).astype(np.int32),
            weights=np.where(real, weights[source], 0),
        )


def train_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    batch_size: int,
    length: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    chat: bool = False,
) -> grain.IterDataset[Batch]:
    """Endless shuffled batches for training.

    Batch n of shard s is rows `(n * shard_count + s) * batch_size` and on of one endless list of
    rows, so shards are disjoint, together cover everything, and put side by side are the batch that
    one process would see with `batch_size * shard_count`. The iterator has `get_state` and
    `set_state`; its state is {"next_index": number of batches taken}, which is all it takes to
    continue exactly, given the same documents and arguments.

    Args:
        documents: the training documents.
        tokenizer: encodes them.
        batch_size: B, rows in each batch of this shard.
        length: T, tokens in each row.
        seed: of the order, 0..2**32 - 1.
        shard_index: which part of the data is this process's, 0..shard_count - 1.
        shard_count: number of processes that share the data.
        chat: as in `tokenize`.

    Raises:
        TypeError: a number is not a whole one.
        ValueError: a number is out of its range, there is no document, or one of them is not a
            conversation.
    """
    batch_size = whole_number("batch_size", batch_size, least=1)
    length = whole_number("length", length, least=1)
    shard_count = whole_number("shard_count", shard_count, least=1)
    shard_index = whole_number("shard_index", shard_index)
    seed = whole_number("seed", seed)
    if seed >= 2**32:
        raise ValueError(f"seed={seed}; it must be between 0 and 2**32 - 1.")
    if shard_index >= shard_count:
        raise ValueError(
            f"shard_index={shard_index}; with shard_count={shard_count} it must be between 0 and "
            f"{shard_count - 1}."
        )
    rows = PackedRows(tokenize(documents, tokenizer, chat), length, seed)
    # Endless in practice. Without a count, Grain's length of batches of one row overflows.
    epochs = sys.maxsize // (2 * len(rows))
    batches = rows.shuffle(seed=seed).repeat(epochs).batch(batch_size)[shard_index::shard_count]
    # Rows are made in microseconds: one thread, a few batches ahead, hides that.
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def validation_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    batch_size: int,
    length: int,
    chat: bool = False,
) -> list[Batch]:
    """All targets of the documents, each exactly once, in order; the last batch is padded.

    Every batch is [B, T]. With `nll` in nats, bits per byte of the text are

        sum(weights * nll) / log(2) / sum(weights * tokenizer.byte_lengths[targets])

    The end of a document is a target like any other and costs nats, but stands for 0 bytes: a
    model must also tell where a text ends.

    Raises:
        TypeError: a number is not a whole one.
        ValueError: a number is out of its range, or there is no document.
    """
    batch_size = whole_number("batch_size", batch_size, least=1)
    length = whole_number("length", length, least=1)
    rows = PackedRows(tokenize(documents, tokenizer, chat), length)
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    batches = rows.batch(batch_size, batch_fn=pad)
    return [batches[index] for index in range(len(batches))]
