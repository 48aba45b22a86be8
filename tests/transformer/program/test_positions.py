"""Positions: rotary angles and their scalings, and ALiBi's slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer.config import Config, RotaryScaling
from transformer.program.positions import alibi_slopes, rotary_frequencies, rotate
from transformer.program.program import program

CONFIG = Config(
    vocab_size=10, max_length=64, num_layers=4, width=32, num_heads=4, head_size=64
)  # fmt: skip


def frequencies(**fields):
    config = CONFIG.replace(**fields)
    return rotary_frequencies(config, config.rotary_size)


@pytest.mark.parametrize("kind", ["linear", "ntk", "llama3", "yarn"])
def test_scaling_keeps_fast_frequencies_and_divides_slow_ones(kind):
    plain, _ = frequencies()
    scaled, magnitude = frequencies(rotary_scaling=RotaryScaling(kind, 4.0, 1024))
    ratio = plain / scaled
    # Linear scaling divides every frequency, the others only the slow ones.
    np.testing.assert_allclose(ratio[0], 4.0 if kind == "linear" else 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[-1], 4.0, rtol=1e-5)
    assert np.all(np.diff(ratio) >= -1e-6)
    expected = 0.1 * np.log(4.0) + 1 if kind == "yarn" else 1.0
    np.testing.assert_allclose(magnitude, expected, rtol=1e-6)


def test_longrope_divides_each_frequency_by_its_own_number():
    divisors = tuple(1.0 + n for n in range(32))
    scaling = RotaryScaling("longrope", 4.0, attention_factor=1.25, divisors=list(divisors))
    scaled, magnitude = frequencies(rotary_scaling=scaling)
    np.testing.assert_allclose(frequencies()[0] / scaled, divisors, rtol=1e-6)
    assert magnitude == np.float32(1.25)


def test_yarn_begins_between_two_pairs_where_it_is_not_truncated():
    rough, fine = (
        frequencies(rotary_scaling=RotaryScaling("yarn", 4.0, 1024, truncate=truncate))[0]
        for truncate in (True, False)
    )
    assert (rough != fine).any() and rough[0] == fine[0]
    np.testing.assert_allclose(rough, fine, rtol=0.5)


def test_layers_with_a_window_have_their_own_base():
    local = {"rotary_window_base": 100.0, "rotary_scaling": RotaryScaling("linear", 8.0)}
    np.testing.assert_array_equal(
        frequencies(window=8, **local)[0], frequencies(rotary_base=100.0)[0]
    )
    np.testing.assert_allclose(frequencies(**local)[0], frequencies()[0] / 8, rtol=1e-6)


@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([1.0, 0.5, 0.25]))
def test_a_rotation_keeps_lengths_and_knows_only_distances(seed, fraction):
    config = CONFIG.replace(head_size=16, rotary_fraction=fraction)
    rng = np.random.default_rng(seed)
    turn = lambda x, i: np.asarray(ROTATE(config, x, np.int32(i)), np.float64)
    q, k = rng.standard_normal((2, 3, 16), np.float32)
    i, j, shift = rng.integers(0, 100, 3)
    # float32: angles up to 200 are rounded to 1e-5, which turns pairs of length about 1.
    np.testing.assert_allclose(
        np.linalg.norm(turn(q, i), axis=1), np.linalg.norm(q, axis=1), rtol=1e-5
    )
    scores = lambda i, j: (turn(q, i) * turn(k, j)).sum(1)
    np.testing.assert_allclose(scores(i + shift, j + shift), scores(i, j), atol=3e-4)
    kept = config.rotary_size
    np.testing.assert_array_equal(turn(q, i)[:, kept:], q[:, kept:])
    np.testing.assert_array_equal(turn(q, 0), q)


ROTATE = jax.jit(lambda config, x, i: rotate(program(config), x, i), static_argnums=0)


def test_rotation_pairs_numbers_half_a_head_apart():
    """By hand: heads of 4 numbers, pairs (0, 2) and (1, 3), frequencies 1 and base^(-1/2)."""
    config = CONFIG.replace(head_size=4, rotary_base=100.0)
    turned = rotate(program(config), jnp.array([[1.0, 0, 0, 1]]), jnp.int32(2))[0]
    expected = [np.cos(2), -np.sin(0.2), np.sin(2), np.cos(0.2)]
    np.testing.assert_allclose(turned, expected, rtol=1e-6)


def test_alibi_slopes():
    """The two examples of the paper: 8 heads, and a number that is not a power of two."""
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
