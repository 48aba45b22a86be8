"""Claims: each verdict where the figures are made for it."""

import numpy as np
import pytest

from experiments.suites.claims import REFUTED, SUPPORTED, UNDECIDED, judge
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
        [Way(*way) for way in (("parallel", [8], [1], [8]), ("one by one", [8], [2], [8]))]
        + [Way("without a cache", [8], [3], [64])],
    )
    assert [claim.verdict for claim in claims] == [verdict] * 6 + [SUPPORTED] * 3
