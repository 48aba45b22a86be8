"""What is done to logits before a token is drawn: against transformers, and by its definitions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.inference.adjust import Written
from transformer.inference.options import Options
from transformer.inference.sampling import warp

V, PROMPT = 40, 5  # of the 12 tokens of a row, that many are its prompt
BIAS = {3: 2.5, 7: -1.0}

# One structure for all, so that one function is compiled.
OPTIONS = {
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": BIAS},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {
        "repetition_penalty": 1.3,
        "logit_bias": BIAS,
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.8,
        "min_p": 0.1,
    },
}


@pytest.fixture(scope="module")
def processors():
    """What transformers makes of logits [N, V] behind tokens [N, T], by the names of options."""
    with np.load(Path(__file__).parent / "fixtures" / "processors.npz") as arrays:
        return dict(arrays)


def written(tokens, capacity=16):
    state = Written.begin(tokens[:PROMPT], capacity, V)
    for i in range(PROMPT, len(tokens)):
        state = _push(state, tokens[i], i)
    return state


_push = jax.jit(Written.push)


@jax.jit
def _apply(logits, adjust, state, sampling):
    return warp(adjust(logits, state), sampling)


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_those_of_transformers(name, processors):
    options = Options(max_new_tokens=1, **OPTIONS[name])
    adjust, sampling = options.adjustments(V), options.sampling(None)
    for logits, tokens, theirs in zip(
        processors["logits"], processors["tokens"], processors[name], strict=True
    ):
        ours = np.asarray(_apply(logits, adjust, written(tokens), sampling))
        kept = np.isfinite(theirs)
        np.testing.assert_array_equal(np.isfinite(ours), kept)
        # Ours are shifted, so that the largest is 0. Logits of about 10 in float32.
        np.testing.assert_allclose(ours[kept], theirs[kept] - theirs.max(), atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, V - 1), min_size=PROMPT, max_size=16))
def test_what_was_written_is_known(tokens):
    state = written(np.array(tokens, np.int32))
    assert state.tokens.tolist() == tokens + [-1] * (16 - len(tokens))
    assert np.flatnonzero(state.in_prompt).tolist() == sorted(set(tokens[:PROMPT]))
    np.testing.assert_array_equal(state.counts, np.bincount(tokens[PROMPT:], minlength=V))


def test_presence_and_frequency_count_the_completion_only():
    tokens = np.array([1, 1, 1, 1, 2, 3, 3, 3, 2], np.int32)  # 3 three times, and 2 once
    adjust = Options(max_new_tokens=1, presence_penalty=0.5, frequency_penalty=2.0).adjustments(V)
    made = np.asarray(adjust(jnp.zeros(V), written(tokens)))
    assert made[[1, 2, 3, 4]].tolist() == [0, -2.5, -6.5, 0]


def test_a_processor_comes_last_and_sees_the_tokens():
    def no_repeats(logits, tokens):  # of the last token
        last = tokens[(tokens >= 0).sum() - 1]
        return jnp.where(jnp.arange(V) == last, -jnp.inf, logits)

    options = Options(max_new_tokens=1, logits_processor=no_repeats, logit_bias={2: 3.0})
    made = np.asarray(options.adjustments(V)(jnp.zeros(V), written(np.arange(6, dtype=np.int32))))
    assert made[2] == 3 and np.flatnonzero(np.isinf(made)).tolist() == [5]


def test_what_is_not_asked_for_costs_nothing():
    adjust = Options(max_new_tokens=1).adjustments(V)
    logits = jnp.zeros(V)
    assert adjust(logits, None) is logits and not adjust.need_written


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty=0; it must be above 0"),
        ({"presence_penalty": np.inf}, ValueError, "presence_penalty=inf; it must be finite"),
        ({"frequency_penalty": "a"}, TypeError, "frequency_penalty='a'; it must be a number"),
        ({"logit_bias": {V: 1.0}}, ValueError, "logit_bias: token id 40"),
        ({"logit_bias": {1: np.nan}}, ValueError, "neither finite nor -inf"),
        ({"logit_bias": [1]}, TypeError, "it must map token ids to numbers"),
        ({"logit_bias": dict.fromkeys(range(V), -np.inf)}, ValueError, "forbids every token"),
        ({"top_logprobs": V + 1}, ValueError, "top_logprobs=41; there are 40 tokens"),
        ({"num_samples": 0}, ValueError, "num_samples=0"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
    ],
)
def test_what_is_out_of_range_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        Options(max_new_tokens=1, **options).adjustments(V)
