"""What shows when a program runs: every way to run the same tokens gives the same.

The rules are proved from the jaxpr. What a memory makes of a chunk is code of its own, and is held
to its law here, in the whole program and on a few random tokens. Two kinds of comparison are made.
What must not depend on something at all, as a token on those after it, is run twice by one compiled
function and must not change by a bit. What is computed in another order may differ by rounding.
"""

from collections.abc import Callable
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from transformer.memory.cache import Cache
from transformer.modes.compare import difference
from transformer.modes.contract import source
from transformer.modes.contract.by_step import by_step
from transformer.modes.contract.findings import Findings
from transformer.modes.contract.flow import Written
from transformer.modes.contract.static import explained
from transformer.modes.contract.tracing import Trace
from transformer.modes.contract.trial import Outcome, Trial, rounding
from transformer.modes.schedule import run

CHANGES = 12  # places from which on tokens are changed
# Sums of many terms in another order differ by some roundings of the largest term.
ROUNDINGS = 512
# What one rounding of every parameter changes, roundings in between may change a few times over.
RESPONSES = 16


def check(
    f: Callable,
    params,
    cache: Cache,
    vocab_size: int,
    once: Trace,
    written: dict[int, Written],
    findings: Findings,
) -> None:
    """Runs a program in every way and compares.

    Args:
      f, params, cache, vocab_size: as in `check_contract`.
      once: the trace of f.
      written: the blocks that it writes.
      findings: where violations are added.
    """
    with explained(f, findings), jax.default_matmul_precision("highest"):
        laws = Laws(Trial(f, params, cache, vocab_size), once, written, findings)
        if not laws.finite():
            return
    for law in (
        laws.causal,
        laws.unwritten,
        laws.padding,
        laws.sequences,
        laws.sequential,
        laws.chunks,
        laws.steps,
        laws.packed,
        laws.resumed,
        laws.capacity,
    ):
        with explained(f, findings), jax.default_matmul_precision("highest"):
            law()


class Laws:
    """The laws, each held by running the trial; what breaks one is added to the findings."""

    def __init__(self, trial: Trial, once: Trace, written: dict[int, Written], findings: Findings):
        self.trial, self.once, self.written, self.findings = trial, once, written, findings
        self.where = source.of_function(trial.f)
        self.chunk = max(1, len(trial.i) // 3)
        self.twice = min(2 * self.chunk, len(trial.i))  # the last one is filled up with padding

    def finite(self) -> bool:
        """There are numbers to compare."""
        _, self.logits = self.trial.parallel()
        wrong = np.flatnonzero(~np.isfinite(self.logits).all(1))
        if wrong.size:
            why = (
                f"the logits of position {wrong[0]} are not finite, so that nothing can be "
                "compared. Check the parameters, and that the capacity is within the positions "
                "that the program knows."
            )
            self._fail("finite", "parallel mode", why)
        return not wrong.size

    # What must not matter at all.

    def causal(self):
        """A token changes nothing before it."""
        trial = self.trial
        length = len(trial.i)
        for j in sorted({*np.linspace(1, length - 1, CHANGES, dtype=int)} - {0, length}):
            changed = np.where(trial.i < j, trial.tokens, trial.others)
            _, logits = trial.parallel(tokens=changed)
            why = f"other tokens from position {j} on change what comes before them"
            if not self._same("causal", "parallel mode", why, logits[:j]):
                return

    def unwritten(self):
        """What a cell holds that was not written yet is not seen, and a sequence begins at 0."""
        trial, law = self.trial, "unwritten cells"
        garbage = trial.filled()
        why = "what the cache held before changes a sequence that begins at position 0"
        _, logits = trial.parallel(garbage)
        if not self._same(law, "parallel mode", why, logits):
            return
        _, logits = trial.chunks(self.twice, garbage)
        expected = trial.chunks(self.twice)[1]
        if not self._same(law, f"chunks of {self.twice}", why, logits, expected):
            return
        _, logits = trial.parallel(trial.filled(jnp.nan))
        if not np.array_equal(logits, self.logits):
            self.findings.note(
                "a nan in a cell that was never written reaches the logits, while finite numbers "
                "do not. A cache is made without any."
            )

    def padding(self):
        """Padding writes nothing, and nothing sees it."""
        trial, law = self.trial, "padding"
        real = max(1, len(trial.i) - 3)
        i = np.where(trial.i < real, trial.i, -1)
        for tokens in (trial.tokens, np.where(i < 0, trial.others, trial.tokens)):
            _, logits = trial.parallel(tokens=tokens, i=i)
            why = "tokens at position -1 change those of the sequence"
            if not self._same(law, "parallel mode", why, logits[:real]):
                return
        garbage = trial.filled()
        after, _ = trial.parallel(garbage, i=np.full_like(i, -1))
        blocks = zip(after._blocks, garbage._blocks, strict=True)
        for number, pair in enumerate(blocks):
            if not all(map(np.array_equal, *map(jax.tree.leaves, pair))):
                why = "a chunk of nothing but padding, which writes nothing, changes the block."
                self._fail(law, "parallel mode", why, number)

    def sequences(self):
        """The other sequences of a batch do not matter."""
        trial, length = self.trial, len(self.trial.i)
        stack = lambda *trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
        tokens = np.stack([trial.tokens, trial.others])
        twice = np.stack([trial.i, trial.i])
        _, expected = trial.batch(stack(trial.cache, trial.cache), tokens, twice)
        late = np.where(trial.i < 2, trial.i + max(length - 2, 0), -1)
        other = stack(trial.cache, trial.filled(jnp.nan))
        _, logits = trial.batch(other, tokens[[0, 0]], np.stack([trial.i, late]))
        why = "another sequence of the batch changes the first one"
        if self._same("sequences apart", "batch of 2", why, logits[0], expected[0]):
            self._close("sequences apart", "batch of 2", Outcome([logits[0]]))

    # What may differ by rounding.

    def sequential(self):
        """Token after token gives the same, in generation and in training."""
        self._close_run("sequential mode", *self.trial.sequential())
        self._close_way("sequential mode", partial(run, self.trial.f, chunk=1))

    def chunks(self):
        """Any split into chunks gives the same."""
        self._close_way(f"chunks of {self.chunk}", partial(run, self.trial.f, chunk=self.chunk))
        self._close_run(f"chunks of {self.twice}", *self.trial.chunks(self.twice))

    def steps(self):
        """The chunk of each memory is the scan of its step."""
        steps = by_step(self.once.jaxpr, self.once.results)
        self._close_way("scan of step", partial(run, steps), gradients=False)

    def packed(self):
        """Documents packed in one row are as each alone."""
        trial, length = self.trial, len(self.trial.i)
        first = length - length // 2
        _, logits = trial.packed(np.where(trial.i < first, trial.i, trial.i - first))
        alone = np.where(trial.i < length - first, trial.i, -1)
        _, second = trial.parallel(tokens=np.roll(trial.tokens, -first), i=alone)
        expected = np.concatenate([self.logits[:first], second[: length - first]])
        share = difference([logits], [expected])
        if not share <= self._tolerance["logits"]:
            why = (
                f"two documents in one row differ by {share:.1e} of the largest from each alone, "
                f"and rounding explains {self._tolerance['logits']:.1e}"
            )
            why += self._first(logits, expected)
            self._fail("documents apart", "packed row", f"{why}.")

    def resumed(self):
        """A cache that was saved goes on where it was."""
        trial, length = self.trial, len(self.trial.i)
        half = length - length // 2
        cache, first = trial.parallel(i=np.where(trial.i < half, trial.i, -1))
        saved = jax.device_get(cache)
        i = np.where(trial.i < length - half, trial.i + half, -1)
        cache, second = trial.parallel(saved, np.roll(trial.tokens, -half), i)
        logits = np.concatenate([first[:half], second[: length - half]])
        self._close_run("saved and resumed", cache, logits)

    def capacity(self):
        """How much room a cache has does not matter."""
        cache, length = self.trial.cache, len(self.trial.i)
        if _shapes(_resized(cache, self.written, cache.capacity)) != _shapes(cache):
            self.findings.note("another capacity was not tried: the cache cannot be made anew.")
            return
        capacity = length if cache.capacity > length else 2 * length
        _, logits = self.trial.parallel(_resized(cache, self.written, capacity))
        self._close("capacity", f"capacity {capacity}", Outcome([logits]))

    @cached_property
    def _parallel(self) -> Callable:
        """The parallel mode with its gradients, if it has any."""
        trial = self.trial
        way = partial(run, trial.f)
        with_gradients = trial.run(way, gradients=True)
        try:
            with_gradients(trial.params)
        except Exception as error:  # it is the user's code that runs
            self.findings.note(f"gradients were not compared: {type(error).__name__}: {error}")
            return trial.run(way, gradients=False)
        return with_gradients

    @cached_property
    def _expected(self) -> Outcome:
        """What the parallel mode gives."""
        return self._parallel(self.trial.params)

    @cached_property
    def _tolerance(self) -> dict[str, float]:
        """What rounding may change, as shares of the largest."""
        unit = rounding(self.once)
        rounded = self._parallel(self.trial.rounded(unit))
        return {
            kind: ROUNDINGS * unit + RESPONSES * share
            for kind, share in _shares(rounded, self._expected).items()
        }

    # What is told.

    def _same(self, law, operation, why, logits, expected=None):
        """Whether logits are the same to the bit as those of the parallel mode, or as others."""
        expected = self.logits[: len(logits)] if expected is None else expected
        wrong = np.flatnonzero((logits != expected).any(1))
        if wrong.size:
            at = f"the first logits to differ are those of position {wrong[0]}"
            self._fail(law, operation, f"{why}; {at}.")
        return not wrong.size

    def _close_run(self, operation, cache, logits):
        arrays = list(map(np.asarray, jax.tree.leaves(cache)))
        self._close("schedules agree", operation, Outcome([np.asarray(logits)], arrays))

    def _close_way(self, operation, way, gradients=True):
        run = self.trial.run(way, gradients and bool(self._expected.gradients))
        self._close("schedules agree", operation, run(self.trial.params))

    def _close(self, law, operation, outcome: Outcome):
        """Whether an outcome is that of the parallel mode, but for rounding."""
        for kind, share in _shares(outcome, self._expected).items():
            if not share <= self._tolerance[kind]:
                why = (
                    f"{kind} differ from those of the parallel mode by {share:.1e} of the largest, "
                    f"and rounding explains {self._tolerance[kind]:.1e}"
                )
                if kind == "logits":
                    why += self._first(outcome.logits[0], self._expected.logits[0])
                self._fail(law, operation, f"{why}.")
                return

    def _first(self, logits, expected):
        """Where logits begin to differ."""
        shares = [difference([x], [y]) for x, y in zip(logits, expected, strict=True)]
        wrong = np.flatnonzero(~(np.asarray(shares) <= self._tolerance["logits"]))
        return f"; the first are those of position {wrong[0]}" if wrong.size else ""

    def _fail(self, law, operation, why, block=None):
        self.findings.violation(law, block, operation, self.where, why)


def _shares(outcome: Outcome, expected: Outcome) -> dict[str, float]:
    """The largest differences in what was looked at, as shares of the largest."""
    cells = [difference([x], [y]) for x, y in zip(outcome.cache, expected.cache, strict=False)]
    gradients = outcome.gradients and difference(outcome.gradients, expected.gradients)
    shares = {"logits": difference(outcome.logits, expected.logits)}
    return shares | {"cells": max(cells, default=0.0), "gradients": gradients or 0.0}


def _resized(cache, written, capacity):
    """An empty cache of the same blocks with another capacity."""
    blocks = [(written[n].memory, written[n].shapes) for n in sorted(written)]
    made = Cache.empty(capacity, blocks, repeats=cache.repeats)
    return jax.tree.map(
        lambda x, like: x.astype(like.dtype), made, cache.replace(capacity=capacity)
    )


def _shapes(cache):
    return [x.shape for x in jax.tree.leaves(cache)]
