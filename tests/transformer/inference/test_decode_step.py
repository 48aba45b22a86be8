"""What the compiled decode step does, read from its program: no scatter, no copy of a block."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from kernels.dot import has_kernel
from transformer.config import Config, Delta
from transformer.program.init import init_cache, init_params
from transformer.program.program import program

CONFIG = Config(vocab_size=101, max_length=4096, num_layers=2, width=48, num_heads=3)


def decode_loop(config, capacity, batch):
    """A loop that generates greedily into a cache it owns, not yet compiled."""
    f = program(config)

    def generate(params, cache, token, i):
        def step(carry, _):
            cache, token, i = carry
            cache, logits = f(params, cache, token, i)
            token = jnp.argmax(logits).astype(jnp.int32)
            return (cache, token, i + 1), token

        return jax.lax.scan(step, (cache, token, i), length=16)

    cache = init_cache(config, capacity)
    token = i = jnp.int32(0)
    if batch:
        generate = jax.vmap(generate, in_axes=(None, 0, 0, 0))
        stack = lambda x: jnp.zeros((batch, *x.shape), x.dtype)
        cache, token, i = jax.tree.map(stack, (cache, token, i))
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return jax.jit(generate, donate_argnums=1).lower(params, cache, token, i)


def operations(text, at_least):
    """(opcode, name) of instructions whose result has at least so many elements."""
    found = re.findall(r"%(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    for name, shape, opcode in found:
        size = 1
        for n in shape.split(","):
            size *= int(n)
        if size >= at_least:
            yield opcode, name


# What may have the size of a block (tiles of three sequences are smaller than the block of one):
# other names for it, and the change of a cell in place.
HARMLESS = {"parameter", "get-tuple-element", "bitcast", "tuple", "dynamic-update-slice"}


@pytest.mark.parametrize("batch", [None, 3], ids=["one", "batch"])
@pytest.mark.parametrize(
    ("capacity", "changes"),
    [
        (4096, {}),
        (4096, {"scan_layers": True}),
        (4096, {"window": 3500}),
        (4096, {"window": 3500, "scan_layers": True}),
        (128, {}),
        (4096, {"window": 128}),
        (4096, {"num_kv_heads": 1}),
        (4096, {"cache_dtype": "int8"}),
    ],
    ids=[
        *("all", "all-scanned", "ring", "ring-scanned", "one-tile", "one-tile-ring"),
        *("grouped", "int8"),
    ],
)
def test_no_scatter_and_no_copy_of_a_block(compiled_text, batch, capacity, changes):
    config = CONFIG.replace(**changes)
    text = compiled_text(decode_loop(config, capacity, batch))
    opcodes = {opcode for opcode, _ in operations(text, 1)}
    assert {"while", "dynamic-update-slice"} <= opcodes | set(re.findall(r"\) (while)\(", text))
    assert not {opcode for opcode in opcodes if "scatter" in opcode}
    block = config.shape.K * (config.window or capacity) * CONFIG.shape.H
    # A kernel that changes cells in place; where it could not, there would be a copy beside it.
    writes = re.findall(r'%(\S+) = .* custom-call\(.*custom_call_target="unison_write"', text)
    assert bool(writes) == (batch is not None and has_kernel())
    moved = [
        (opcode, name)
        for opcode, name in operations(text, block)
        if opcode not in HARMLESS
        and not (opcode == "fusion" and "dynamic-update-slice" in name)
        and name not in writes
    ]
    assert not moved


@pytest.mark.skipif(not has_kernel(), reason="kernels of a CPU, with multiply-adds")
@pytest.mark.parametrize("batch", [None, 3], ids=["one", "batch"])
@pytest.mark.parametrize("scanned", [False, True])
def test_no_copy_of_a_state(compiled_text, batch, scanned):
    delta = Delta(num_key_heads=2, num_value_heads=4, key_size=128, value_size=128)
    config = CONFIG.replace(layer_kinds="delta", delta=delta, scan_layers=scanned)
    text = compiled_text(decode_loop(config, 8, batch))
    assert "unison_delta_rule" in text
    moved = [
        (opcode, name) for opcode, name in operations(text, 4 * 128 * 128) if opcode not in HARMLESS
    ]
    assert not moved


def test_scanned_layers_are_compiled_once():
    """The traced program of 100 scanned layers is as long as that of 10."""

    def length(num_layers):
        config = CONFIG.replace(num_layers=num_layers, scan_layers=True)
        params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        traced = jax.make_jaxpr(program(config))(params, init_cache(config, 8), 0, 0)
        return len(str(traced).splitlines())

    assert length(100) == length(10)
