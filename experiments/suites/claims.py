"""The essay's claims, judged by what was measured.

A claim about blocks compares two of them document by document, so that what documents differ by
drops out; it is undecided where the 95 % interval of the mean difference holds 0. So are claims
about time, whose samples are steps and rounds.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.suites.essay import (
    CACHED,
    PARALLEL,
    RECOMPUTED,
    Learned,
    Measure,
    Way,
    half_interval,
)

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim, its verdict (`SUPPORTED`, `REFUTED` or `UNDECIDED`), and the figures behind it."""

    sentence: str
    verdict: str
    figures: str


def judge(measures: Sequence[Measure], learned: Sequence[Learned], ways: Sequence[Way]):
    """Judges every claim: a list of `Claim`."""
    of = {measure.name: measure.values for measure in measures}

    def ends(sentence, name, sign=1):
        """A claim that the last block has more (sign 1) or less (-1) than the first."""
        return _more(sentence, name, "last block", sign * of[name][-1], "first", sign * of[name][0])

    up_to = of["loss with reads of the blocks up to this one only"]
    on = of["loss with reads from this block on only"]
    middle = len(up_to) // 2
    return [
        ends(
            "Late cells say more than early ones about the token that comes next.",
            "a linear probe of its cells finds the token after",
        ),
        ends(
            "Early cells say more than late ones about their own token.",
            "a linear probe of its cells finds its own token",
            sign=-1,
        ),
        ends("Late blocks are read from further back.", "how far back it is read"),
        ends(
            "What is written last cannot be processed much further: the later the block, the "
            "nearer the lens is to the prediction when it is written.",
            "the lens before it agrees with the model",
        ),
        ends(
            "Early blocks are weak and late ones strong: a model loses more without the reads of "
            "its last block than without those of its first.",
            "loss without the reads of this block",
        ),
        _more(
            "Early blocks are weak and late ones strong: a model that may read only its late half "
            "loses less than one that may read only its early half.",
            "nats more",
            "early half",
            up_to[max(0, middle - 1)],
            "late",
            on[middle],
        ),
        *_feedback(*learned),
        _caching({way.name: way for way in ways}),
    ]


def _more(sentence, name, first, a, second, b) -> Claim:
    """A claim that a [D] is more than b [D], over documents, or over steps."""
    change, half = np.mean(a - b), half_interval(a - b)
    said = f"{first} {abs(np.mean(a)):.3f}, {second} {abs(np.mean(b)):.3f}"
    figures = f"{name}: {said}; they differ by {abs(change):.3f} ± {half:.3f}"
    return Claim(sentence, _verdict(a, b), figures)


def _verdict(a, b) -> str:
    """Whether a [D] is more than b [D], in the mean."""
    change, half = np.mean(a - b), half_interval(a - b)
    return SUPPORTED if change > half else REFUTED if change < -half else UNDECIDED


def _feedback(plain, feedback) -> list[Claim]:
    slow, fast = np.array(feedback.seconds), np.array(plain.seconds)
    same = min(len(feedback.losses), max(1, round(fast.sum() / slow.mean()) + 1))
    slower = _more(
        "That price is paid in time: it is slower per step.",
        "ms a step",
        "feedback",
        1e3 * slow,
        "plain",
        1e3 * fast,
    )
    losses = (
        f"; loss at step {len(plain.losses)} {feedback.losses[-1]:.3f} against "
        f"{plain.losses[-1]:.3f}, and after as many seconds {feedback.losses[same - 1]:.3f}"
    )
    return [
        Claim(
            "The late block cannot be read early but at the price of depth: the feedback "
            "transformer is deeper.",
            SUPPORTED if feedback.depth > plain.depth else REFUTED,
            f"depth {feedback.depth} against {plain.depth}",
        ),
        replace(slower, figures=slower.figures + losses),
    ]


def _caching(ways) -> Claim:
    order = [ways[name] for name in (PARALLEL, CACHED, RECOMPUTED)]
    seconds = [np.array(way.seconds[-1]) for way in order]
    verdicts = {_verdict(slow, fast) for fast, slow in itertools.pairwise(seconds)}
    fewer = order[1].operations[-1] < order[2].operations[-1]
    decided = UNDECIDED if UNDECIDED in verdicts else SUPPORTED
    said = [
        f"{1e3 * x.mean():.1f} ± {1e3 * half_interval(x):.1f} ms and "
        f"{way.operations[-1] / 1e9:.3g} Gflop {way.name}"
        for x, way in zip(seconds, order, strict=True)
    ]
    return Claim(
        "A cache saves the work of recomputing, and all tokens at once are faster than one by one.",
        REFUTED if REFUTED in verdicts or not fewer else decided,
        f"{order[0].lengths[-1]} tokens: {', '.join(said)}",
    )
