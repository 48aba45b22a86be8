"""The Jacobian lens: derivatives of the last stream by each, against differences."""

import jax
import numpy as np

from transformer.insight import add, intervene, jacobian, replace, stream, trace


def test_it_is_how_the_last_stream_moves(model):
    """What one token read in the first layer, moved, moves its stream there and after the last."""
    with jax.enable_x64(True):
        f, params, cache, tokens = model("scanned", dtype="float64")
        one = tokens[:1]
        made = jacobian(f, params, one[None])

        @jax.jit
        def streams(more):
            g = intervene(f, [add(0, 0, more, of="read")])
            return stream(g, params, trace(g, params, cache, one)).after[:, 0]

        moved = (streams(1e-6) - streams(-1e-6)) / 2e-6
        # Central differences of float64, with steps of 1e-6.
        np.testing.assert_allclose(moved[0] + moved[0] @ made.matrices[0], moved[1], rtol=1e-5)
        assert not np.asarray(made.matrices[1]).any()  # the last stream itself
        assert np.abs(moved[0] - moved[1]).max() > 1e-2


def test_it_is_a_mean_over_tokens_and_holds_under_edits(model):
    """Where nobody reads anything, tokens in a row are as each alone."""
    f, params, _, tokens = model("attention")
    alone = intervene(f, [replace(block, None, 0.0, of="read") for block in range(2)])
    row, apart = tokens[None, :2], tokens[:2, None]
    made = jacobian(alone, params, row).matrices
    # float32: sums in another order of numbers of the size of the largest.
    expected = jacobian(alone, params, apart).matrices
    np.testing.assert_allclose(made, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(jacobian(f, params, row).matrices - made).max() > 1e-3
