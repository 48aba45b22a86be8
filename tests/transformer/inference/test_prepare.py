"""Parameters made ready for decoding."""

import jax
import numpy as np
import pytest

from transformer import init_cache, init_params, presets, program
from transformer.inference.prepare import lay_out_params
from transformer.numerics.matrix import is_matrix
from transformer.numerics.numerics import EXACT, FAST


def combinations():
    """Of three choices; without --thorough half of them, in which every two go together."""
    presets, numerics = ("tiny", "tiny-mla", "tiny-gpt-oss", "tiny-hybrid"), (FAST, EXACT)
    for n, preset in enumerate(presets):
        for scan_layers in (False, True):
            for kind in numerics:
                left_out = (n + scan_layers + kind.exact) % 2
                marks = [pytest.mark.thorough] if left_out else []
                name = f"{preset}-{'scanned' if scan_layers else 'unrolled'}-{kind.name}"
                yield pytest.param(preset, scan_layers, kind, marks=marks, id=name)


@pytest.mark.parametrize(("preset", "scan_layers", "numerics"), combinations())
def test_every_kind_of_layer_runs_with_them(preset, scan_layers, numerics):
    config = presets[preset].replace(scan_layers=scan_layers)
    params = init_params(config, jax.random.key(0))
    f = program(config, numerics=numerics.name)
    laid_out = lay_out_params(f, params)
    if not numerics.exact:  # the order that exact products want is not had without optimisation
        assert any(map(is_matrix, jax.tree.leaves(laid_out, is_leaf=is_matrix)))
    run = jax.jit(
        lambda params, tokens: jax.vmap(
            lambda token: f(params, init_cache(config, 8), token, 0)[1]
        )(tokens)
    )
    tokens = np.arange(8)
    # The tests compile without optimisation, where equal bits are not claimed.
    np.testing.assert_allclose(run(laid_out, tokens), run(params, tokens), rtol=0, atol=1e-4)


def test_what_is_split_over_devices_stays():
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("data",), devices=devices[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(init_params(presets["tiny"], jax.random.key(0)), split)
    assert lay_out_params(program(presets["tiny"]), params) is params
