"""The essay's claims, judged by what was measured.

A claim about blocks compares two of them document by document, so that what documents differ by
drops out; it is undecided where the 95 % interval of the mean difference holds 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.suites.essay import Learned, Measure, Way, half_interval

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
    verdict = SUPPORTED if change > half else REFUTED if change < -half else UNDECIDED
    said = f"{first} {abs(np.mean(a)):.3f}, {second} {abs(np.mean(b)):.3f}"
    return Claim(
        sentence, verdict, f"{name}: {said}; they differ by {abs(change):.3f} ± {half:.3f}"
    )


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
    parallel, cached, recomputed = (
        ways[name] for name in ("parallel", "one by one", "without a cache")
    )
    faster = parallel.seconds[-1] < cached.seconds[-1] < recomputed.seconds[-1]
    fewer = cached.operations[-1] < recomputed.operations[-1]
    said = lambda way: f"{way.seconds[-1]:.4f} s and {way.operations[-1] / 1e9:.3g} Gflop"
    return Claim(
        "A cache saves the work of recomputing, and all tokens at once are faster than one by one.",
        SUPPORTED if faster and fewer else REFUTED,
        f"{parallel.lengths[-1]} tokens: {said(parallel)} at once, {said(cached)} one by one, "
        f"{said(recomputed)} without a cache",
    )
