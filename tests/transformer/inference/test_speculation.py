"""Speculative decoding: the tokens of plain decoding, in fewer steps."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer import Config, Model, generate
from transformer.inference.options import Options
from transformer.inference.rows import Rows
from transformer.inference.speculation import Lookup, Smaller, SpeculativeRows, look_up
from transformer.program.program import program

CONFIG = Config(vocab_size=32, max_length=256, num_layers=2, width=32, num_heads=4)
# A ring and a state: what a wrong draft wrote has to be taken back.
HYBRID = CONFIG.replace(layer_kinds=("attention", "delta"), window=(6, None))
PROMPTS = [[1, 2, 3, 4, 5, 1, 2, 3], [7, 8, 7, 8, 7, 8, 7, 8], [20], list(range(30)) * 3]
DRAFTS = [Lookup(tokens=4), Smaller(None, tokens=3)]


@pytest.fixture
def model(random_params):
    return lambda config: Model(config, random_params(config), None)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 4))
def test_look_up_finds_the_latest_place_after_the_most_tokens(tokens, count, longest):
    expected = []
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        places = [n for n in range(size, len(tokens)) if tokens[n - size : n] == tokens[-size:]]
        if places:
            expected = tokens[places[-1] : places[-1] + count]
            break
    assert look_up(tokens, count, longest) == expected


@pytest.mark.parametrize("draft", DRAFTS, ids=["lookup", "smaller"])
@pytest.mark.parametrize("config", [CONFIG, HYBRID], ids=["attention", "ring and state"])
def test_tokens_are_those_of_plain_decoding(model, config, draft):
    checked = model(config)
    if isinstance(draft, Smaller):
        # Nearly the same, so that some drafts are right and others wrong.
        near = jax.tree.map(lambda x: x * (1 + 0.02 * (x.ndim > 1)), checked.params)
        draft = Smaller(Model(config, near, None), draft.tokens)
    for options in ({"temperature": 0}, {"temperature": 0.8, "top_k": 9, "seed": 5}):
        options = {"max_new_tokens": 24, "batch_size": 3} | options
        plain = generate(checked, PROMPTS, **options)
        drafted = generate(checked, PROMPTS, draft=draft, **options)
        for one, other in zip(plain, drafted, strict=True):
            assert one.tokens == other.tokens
            # Other shapes of matrix products round float32 logits differently.
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_penalties_see_the_drafts_before_a_position(model):
    checked = model(CONFIG)
    options = {"max_new_tokens": 30, "temperature": 0, "repetition_penalty": 1.5}
    options |= {"frequency_penalty": 0.3, "top_logprobs": 2}
    plain = generate(checked, PROMPTS, **options)
    drafted = generate(checked, PROMPTS, draft=Lookup(4), **options)
    assert [x.tokens for x in plain] == [x.tokens for x in drafted]
    assert [list(top) for top in plain[0].top_logprobs] == [
        list(top) for top in drafted[0].top_logprobs
    ]


def test_right_drafts_save_steps_and_are_counted(model):
    checked = model(CONFIG)
    options = Options(max_new_tokens=20, temperature=0, draft=Smaller(checked, 4))
    prompts = [np.array(PROMPTS[0], np.int32)]
    adjust, f = options.adjustments(CONFIG.vocab_size), program(CONFIG)
    rows = SpeculativeRows(f, checked, prompts, set(), options, adjust)
    tokens = []
    while len(tokens) < 20:
        tokens += [int(drawn.token) for _, drawn in rows.decode(np.ones(1, bool), 1, 1)]
    [plain] = generate(checked, PROMPTS[:1], max_new_tokens=20, temperature=0)
    assert tokens == plain.tokens
    assert rows.steps_run == 4 and rows.drafts_taken == rows.drafts_made == 16


def test_draws_follow_the_probabilities(model, random_params):
    """A chi-square test of the second token against the model's own probabilities."""
    config = CONFIG.replace(vocab_size=8, num_layers=1, width=16)
    checked, other = model(config), Model(config, random_params(config, 1), None)
    count = 2000
    options = {"max_new_tokens": 2, "temperature": 1.0, "num_samples": count, "seed": 1}
    completions = generate(checked, [[1, 2]], draft=Smaller(other, 2), **options)
    first, second = np.array([x.tokens for x in completions]).T
    [top] = generate(checked, [[1, 2]], max_new_tokens=1, top_logprobs=8)
    likely = max(top.top_logprobs[0], key=top.top_logprobs[0].get)
    [top] = generate(checked, [[1, 2, likely]], max_new_tokens=1, top_logprobs=8)
    probabilities = np.exp([top.top_logprobs[0][n] for n in range(8)])
    found = np.bincount(second[first == likely], minlength=8)
    expected = probabilities * found.sum()
    statistic = ((found - expected) ** 2 / expected).sum()
    assert found.sum() > 200
    # 7 degrees of freedom: beyond 40.5 in one of a million seeds, and the seed is always the same.
    assert statistic < 40.5


def test_what_does_not_fit_is_refused(model):
    checked, other = model(CONFIG), model(CONFIG.replace(vocab_size=40))
    with pytest.raises(ValueError, match="vocab_size=40, and the other 32; they must read the"):
        generate(checked, PROMPTS, max_new_tokens=2, draft=Smaller(other))
    with pytest.raises(ValueError, match="tokens=0; it must be at least 1"):
        Lookup(tokens=0)
    assert issubclass(SpeculativeRows, Rows)
