"""Claims: each verdict where the figures are made for it."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.suites.claims import REFUTED, SUPPORTED, UNDECIDED, _caching, judge
from experiments.suites.essay import Learned, Measure, Way

NAMES = (
    "a linear probe of its cells finds the token after",
    "a linear probe of its cells finds its own token",
    "how far back it is read",
    "the lens before it agrees with the model",
    "loss without the reads of this block",
    "loss with reads of the blocks up to this one only",
    "loss with reads from this block on only",
)


WAYS = [
    Way("parallel", [8], [[1.0, 1.1, 1.0]], [8]),
    Way("one by one", [8], [[2.0, 2.2, 2.1]], [8]),
    Way("without a cache", [8], [[3.0, 3.1, 3.2]], [64]),
]


@pytest.mark.parametrize(
    ("change", "verdict"), [(1.0, SUPPORTED), (-1.0, REFUTED), (0.0, UNDECIDED)]
)
def test_blocks_are_compared_document_by_document(change, verdict):
    """Documents differ by far more than blocks do, which does not hide a change."""
    documents = 100.0 * np.arange(6)
    noise = np.array([0.1, -0.1, 0.2, -0.2, 0.1, -0.1])
    more = np.stack([documents, documents + change + noise])
    less = np.stack([documents, documents - change + noise])
    values = dict.fromkeys(NAMES, more) | {
        "a linear probe of its cells finds its own token": less,
        "loss with reads of the blocks up to this one only": more[::-1],
        "loss with reads from this block on only": np.stack([documents, documents + noise]),
    }
    claims = judge(
        [Measure(name, "", x) for name, x in values.items()],
        [
            Learned("plain", [3.0, 2.0, 1.0], [0.1, 0.11], 2),
            Learned("feedback", [3.0, 2.0, 1.5], [0.2, 0.22], 16),
        ],
        WAYS,
    )
    assert [claim.verdict for claim in claims] == [verdict] * 6 + [SUPPORTED] * 3


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [([2.0, 2.2, 2.1], SUPPORTED), ([0.5, 0.6, 0.4], REFUTED), ([0.1, 9.0, 1.0], UNDECIDED)],
)
def test_ways_are_compared_round_by_round(seconds, verdict):
    parallel, cached, recomputed = WAYS
    slow = Way(recomputed.name, [8], [[30.0, 30.1, 30.0]], [64])
    ways = parallel, replace(cached, seconds=[seconds]), slow
    assert _caching({way.name: way for way in ways}).verdict == verdict
