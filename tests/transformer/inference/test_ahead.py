"""What is compiled ahead is what calls run, and is not traced again where tracing it was kept."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cpu import kept
from transformer.inference import ahead
from transformer.inference.ahead import Ahead

# A function of a static operand, a tree and an array that is given away, with a kernel in it. It
# says in `traced` whenever it is traced.
SOURCE = """
import jax
from functools import partial
from kernels.dot import dot

traced = []

def make():
    @partial(jax.jit, static_argnums=0, donate_argnums=2)
    def scaled(factor, tree, x):
        traced.append(factor)
        return {"product": factor * dot(x, tree["w"]), "sum": x + tree["b"]}

    return scaled
"""
# Another process, which finds what was kept: prints how often it traces, and one of the results.
OTHER = (
    SOURCE
    + """
import numpy as np
from transformer.inference.ahead import Ahead

tree = {"w": np.eye(64, dtype=np.float32), "b": np.float32(1)}
x = np.full((2, 64), 3, np.float32)
function = Ahead(make(), [0], [2])
function.compile(2.0, tree, x, keep=True)
print(len(traced), float(function(2.0, tree, x)["product"][1, 63]))
"""
)


@pytest.fixture
def scaled():
    """scaled() makes the function anew; scaled.traced says when it was traced."""
    space = {}
    exec(SOURCE, space)
    make = lambda: Ahead(space["make"](), [0], [2])
    make.traced = space["traced"]
    return make


def arguments(rng, rows=2):
    tree = {"w": jnp.float32(rng.normal(size=(64, 64))), "b": jnp.float32(rng.normal())}
    return 2.0, tree, jnp.float32(rng.normal(size=(rows, 64)))


def check(function, operands):
    factor, tree, x = operands
    wanted = {"product": factor * x @ tree["w"], "sum": x + tree["b"]}
    given = function(factor, tree, x.copy())  # it is given away
    # Sums of 64 products of normal numbers, in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5), given, wanted)


@pytest.mark.parametrize("keep", [False, True])
def test_calls_run_what_was_compiled(cache_dir, scaled, rng, keep):
    function, operands = scaled(), arguments(rng)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands[1:])
    function.compile(2.0, *shapes, keep=keep)
    before = len(scaled.traced)
    check(function, operands)
    assert len(scaled.traced) == before
    check(function, (3.0, *operands[1:]))  # another static argument: as without Ahead
    assert scaled.traced[before:] == [3.0]
    check(function, arguments(rng, rows=3))  # and so is another shape
    assert scaled.traced[before:] == [3.0, 2.0]


def test_what_was_kept_is_not_traced_again(cache_dir, scaled, rng):
    for first in (True, False):
        operands, function = arguments(rng), scaled()
        function.compile(*operands, keep=True)
        assert bool(scaled.traced) == first
        check(function, operands)
        scaled.traced.clear()


@pytest.mark.parametrize("change", ["sources", "static", "shape", "setting", "damage", "content"])
def test_what_is_kept_for_something_else_is_not_taken(cache_dir, scaled, rng, monkeypatch, change):
    operands = arguments(rng)
    scaled().compile(*operands, keep=True)
    scaled.traced.clear()
    if change == "sources":
        monkeypatch.setattr(ahead, "_origin", lambda: "another")
    elif change == "static":
        operands = 3.0, *operands[1:]
    elif change == "shape":
        operands = arguments(rng, rows=5)
    elif change == "setting":
        monkeypatch.setenv("XLA_FLAGS", "")
    else:
        [path] = cache_dir.glob("unison_scaled_*")
        if change == "damage":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            kept.keep(path.name, b"whole, but nothing that can be read")
    for traces in (True, False):  # what was made anew takes its place
        function = scaled()
        function.compile(*operands, keep=True)
        assert bool(scaled.traced) == traces
        check(function, operands)
        scaled.traced.clear()


def test_what_has_no_name_of_its_own_is_not_kept(cache_dir):
    """A function as an argument is described by its address, which means nothing elsewhere."""
    function = Ahead(jax.jit(lambda f, x: f(x), static_argnums=0), [0], [])
    function.compile(lambda x: x + 1, jnp.zeros(3), keep=True)
    assert not list(cache_dir.glob("unison_*"))


def test_another_process_traces_nothing(cache_dir, scaled):
    tree = {"w": np.eye(64, dtype=np.float32), "b": np.float32(1)}
    scaled().compile(2.0, tree, np.ones((2, 64), np.float32), keep=True)
    env = {**ahead.os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache_dir)}
    result = subprocess.run(
        [sys.executable, "-c", OTHER], env=env, capture_output=True, text=True, timeout=600
    )
    assert result.stdout == "0 6.0\n", result.stderr
