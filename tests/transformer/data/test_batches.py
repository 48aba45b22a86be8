"""The data pipeline: packing, coverage, determinism, sharding, resuming."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from transformer.data.batches import Batch, PackedRows, tokenize, train_batches, validation_batches
from transformer.data.documents import Document
from transformer.data.tokenizer import Tokenizer, byte_tokenizer

BYTES = byte_tokenizer()
END = BYTES.end_of_document

corpora = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8).map(
    lambda texts: [Document(f"{number}.txt", text) for number, text in enumerate(texts)]
)
lengths = st.integers(1, 20)
batch_sizes = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)
examples = settings(deadline=None, max_examples=40)


def numbered(*sizes):
    """Documents of these sizes in which no byte occurs twice, so a token tells where it is from."""
    characters = itertools.count(1)
    return [
        Document(f"{number}", "".join(chr(next(characters)) for _ in range(size)))
        for number, size in enumerate(sizes)
    ]


def stacked(batches):
    return Batch(*(np.concatenate(field) for field in zip(*batches, strict=True)))


def take(documents, count, batch_size=3, length=8, seed=5, **shard):
    dataset = train_batches(documents, BYTES, batch_size, length, seed, **shard)
    return list(itertools.islice(dataset, count))


def assert_same(left, right):
    assert len(left) == len(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def pairs_of_documents(documents):
    """How often each (token, target) occurs in the documents, the definition of the task."""
    return Counter(
        pair
        for document in documents
        for pair in itertools.pairwise([END, *document.text.encode(), END])
    )


def pairs_of_rows(batch):
    counts = batch.weights == 1
    return Counter(zip(batch.tokens[counts].tolist(), batch.targets[counts].tolist(), strict=True))


def check_rows(batch, documents):
    """What every batch promises: types, and that pieces are consecutive text of one document."""
    texts = [[END, *document.text.encode(), END] for document in documents]
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.int32, np.float32]
    assert set(np.unique(batch.weights)) <= {0, 1}
    for row in zip(*batch, strict=True):
        cells = np.arange(len(row[0]))
        first = cells - row[2]
        assert (np.isin(np.diff(first), [0]) | (row[2][1:] == 0)).all()
        for begin in np.unique(first):
            tokens, targets, _, weights = (field[first == begin] for field in row)
            assert len(set(weights)) == 1
            if not weights[0]:
                continue
            piece = [*tokens.tolist(), int(targets[-1])]
            assert piece[1:] == targets.tolist()
            assert any(
                text[start : start + len(piece)] == piece
                for text in texts
                for start in range(len(text))
            )
            assert END not in tokens[1:]


@examples
@given(documents=corpora, length=lengths, batch_size=batch_sizes)
def test_validation_counts_every_target_once(documents, length, batch_size):
    batches = validation_batches(documents, BYTES, batch_size, length)
    assert {field.shape for batch in batches for field in batch} == {(batch_size, length)}
    rows = stacked(batches)
    check_rows(rows, documents)
    assert pairs_of_rows(rows) == pairs_of_documents(documents)
    text_bytes = sum(len(document.text.encode()) for document in documents)
    assert (rows.weights * BYTES.byte_lengths[rows.targets]).sum() == text_bytes
    assert len(batches) == -(-(text_bytes + len(documents)) // (batch_size * length))


@examples
@given(documents=corpora, length=lengths, seed=seeds, epoch=st.integers(0, 10**6))
def test_every_training_epoch_counts_every_target_once(documents, length, seed, epoch):
    rows = PackedRows(tokenize(documents, BYTES), length, seed)
    batch = rows.shuffle(seed=seed).batch(len(rows))[epoch]
    check_rows(batch, documents)
    assert pairs_of_rows(batch) == pairs_of_documents(documents)


@settings(examples, max_examples=12)
@given(
    documents=corpora, length=lengths, batch_size=batch_sizes, seed=seeds, shards=st.integers(1, 4)
)
def test_shards_side_by_side_are_the_batches_of_one_process(
    documents, length, batch_size, seed, shards
):
    options = {"length": length, "seed": seed}
    one = take(documents, 3, batch_size * shards, **options)
    parts = [
        take(documents, 3, batch_size, shard_index=index, shard_count=shards, **options)
        for index in range(shards)
    ]
    assert_same([stacked(batches) for batches in zip(*parts, strict=True)], one)


def test_document_layout_by_hand():
    """Two documents in rows of 4: the second begins inside row 0 and goes on in row 1."""
    (batch,) = validation_batches([Document("a", "A"), Document("b", "BCDE")], BYTES, 3, 4)
    a, b, c, d, e = b"ABCDE"
    np.testing.assert_array_equal(batch.tokens[:2], [[END, a, END, b], [c, d, e, END]])
    np.testing.assert_array_equal(batch.targets[:2], [[a, END, b, c], [d, e, END, END]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 0, 1], [0, 1, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])


def test_epochs_and_seeds_differ_and_repeat_exactly():
    documents = numbered(40, 3, 17, 1, 30)
    rows = PackedRows(tokenize(documents, BYTES), 8, seed=1)
    epochs = [rows.shuffle(seed=1).batch(len(rows))[epoch] for epoch in range(3)]
    for left, right in itertools.combinations(epochs, 2):
        # Not the same rows in another order: documents are cut at other places.
        assert set(map(tuple, left.tokens)) != set(map(tuple, right.tokens))
    assert_same(take(documents, 30), take(documents, 30))
    with pytest.raises(AssertionError):
        assert_same(take(documents, 3), take(documents, 3, seed=6))


def test_one_long_document_is_cut_elsewhere_each_epoch():
    rows = PackedRows(tokenize(numbered(100), BYTES), 10, seed=0)
    cuts = [set(rows.batch(len(rows))[epoch].tokens[:, 0].tolist()) for epoch in range(5)]
    assert len(set.union(*cuts)) > 2 * len(cuts[0])


def test_order_is_shuffled():
    rows = train_batches(numbered(110), BYTES, 1, 1, seed=3)
    order = [int(batch.tokens[0, 0]) for batch in itertools.islice(rows, 111)]
    # Over a shuffled order the neighbours of the stream are rarely neighbours; 111 in order.
    assert sum(abs(left - right) == 1 for left, right in itertools.pairwise(order)) < 20


def test_resumes_exactly_from_any_point():
    documents = numbered(40, 3, 17, 1, 30)
    expected = take(documents, 25)
    iterator = iter(train_batches(documents, BYTES, 3, 8, 5))
    states = [json.dumps(iterator.get_state())]
    for batch in expected:
        assert_same(next(iterator), batch)
        states.append(json.dumps(iterator.get_state()))
    for taken in (25, 0, 11):  # Backwards too, on an iterator that has run ahead.
        iterator.set_state(json.loads(states[taken]))
        assert_same(list(itertools.islice(iterator, 25 - taken)), expected[taken:])


def test_resumes_exactly_in_a_fresh_process_through_orbax(tmp_path):
    documents = numbered(40, 3, 17, 1, 30)
    iterator = iter(train_batches(documents, BYTES, 3, 8, 5))
    for _ in range(11):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    program = """
import itertools, json, sys
import grain, orbax.checkpoint as ocp
from transformer.data.documents import Document
from transformer.data.batches import train_batches
from transformer.data.tokenizer import Tokenizer, byte_tokenizer
documents = [Document(*document) for document in json.loads(sys.argv[1])]
iterator = iter(train_batches(documents, byte_tokenizer(), 3, 8, 5))
with ocp.CheckpointManager(sys.argv[2]) as manager:
    manager.restore(
        0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(iterator))
    )
print(json.dumps([[a.tolist() for a in batch] for batch in itertools.islice(iterator, 20)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(documents), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    continued = [Batch(*map(np.array, batch)) for batch in json.loads(done.stdout)]
    assert_same(continued, list(itertools.islice(iterator, 20)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size=0; it must be at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5 is of type float; it must be a whole number"),
        ({"length": 0}, "length=0; it must be at least 1"),
        ({"seed": -1}, "seed=-1; it must be at least 0"),
        ({"seed": "7"}, "seed='7' is of type str; it must be a whole number"),
        ({"seed": 2**32}, r"seed=4294967296; it must be between 0 and 2\*\*32 - 1"),
        ({"shard_count": 0}, "shard_count=0; it must be at least 1"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index=2; with shard_count=2 .* 0 and 1"),
        ({"documents": []}, "no documents"),
    ],
)
def test_wrong_arguments_get_clear_errors(wrong, message):
    good = {"documents": numbered(9), "batch_size": 2, "length": 4, "seed": 0}
    with pytest.raises((TypeError, ValueError), match=message):
        train_batches(tokenizer=BYTES, **(good | wrong))
    if "batch_size" in wrong or "length" in wrong or "documents" in wrong:
        del good["seed"]
        with pytest.raises((TypeError, ValueError), match=message):
            validation_batches(tokenizer=BYTES, **(good | wrong))


def test_documents_begin_and_end_with_the_tokens_of_a_published_tokenizer():
    begin, end = 7, 9
    published = Tokenizer(Backend.from_str(BYTES._backend.to_str()), begin=[begin], ends=[end])
    [batch] = validation_batches(numbered(2, 1), published, batch_size=1, length=5)
    assert batch.tokens.tolist() == [[begin, 1, 2, begin, 3]]
    assert batch.targets.tolist() == [[1, 2, end, 3, end]]


def test_of_a_conversation_the_replies_count():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    said = lambda asked, answered: json.dumps(
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered},
            ]
        }
    )
    documents = [Document("0", said("ab", "cd")), Document("1", said("e", "f"))]
    [batch] = validation_batches(documents, tokenizer, batch_size=1, length=8, chat=True)
    end = tokenizer.end_of_document
    assert batch.tokens.tolist() == [[*b"abcdef", end, end]]
    assert batch.targets.tolist() == [[*b"bcd", end, *b"f", end, end, end]]
    # The template says nowhere that a reply ends, so the end of the document counts.
    assert batch.weights.tolist() == [[0, 1, 1, 1, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match=r"text\.jsonl: a conversation must be"):
        validation_batches([Document("text.jsonl", "ab")], tokenizer, 1, 8, chat=True)
