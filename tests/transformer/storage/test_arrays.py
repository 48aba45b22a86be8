"""Arrays in the folders where Orbax keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import struct

from transformer.storage.arrays import Damaged, checksum, flat, layout, read


@struct.dataclass
class Pair:
    left: jax.Array
    right: tuple


def tree():
    return Pair(jnp.arange(6.0).reshape(2, 3), ({"a": jnp.bfloat16(1.5)}, jnp.arange(4)))


def target(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.fixture
def folder(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "arrays", flat(tree()))
    return tmp_path / "arrays"


def test_leaves_are_named_by_their_paths():
    assert list(flat(tree())) == ["left", "right.0.a", "right.1"]


def test_a_layout_is_of_paths_shapes_and_types_not_of_numbers():
    same = jax.tree.map(jnp.zeros_like, tree())
    assert layout(same) == layout(tree()) == layout(target(tree()))
    others = (
        tree().replace(left=jnp.zeros((3, 2))),
        tree().replace(left=jnp.zeros((2, 3), int)),
        tree().replace(right=()),
    )
    assert len({layout(other) for other in (tree(), *others)}) == 4


def test_a_checksum_is_of_numbers():
    assert checksum(tree()) == checksum(jax.tree.map(np.asarray, tree()))
    assert checksum(tree()) != checksum(tree().replace(left=tree().left.at[1, 1].add(1)))


def test_what_orbax_wrote_is_read(folder):
    restored = read(folder, target(tree()), checksum(tree()))
    assert jax.tree.structure(restored) == jax.tree.structure(tree())
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree()), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_what_differs_from_what_was_written_is_damage(folder):
    with pytest.raises(Damaged, match="the numbers are not those that were saved"):
        read(folder, target(tree()), checksum(tree()) + 1)
    with pytest.raises(Damaged, match="the array left has another shape or type"):
        read(folder, target(tree().replace(left=jnp.zeros((3, 2)))), checksum(tree()))
    with pytest.raises(Damaged, match=r"the array right\.2 cannot be read"):
        read(folder, target(tree().replace(right=(*tree().right, jnp.zeros(2)))), 0)
    with pytest.raises(Damaged, match="the array left cannot be read"):
        read(folder / "nowhere", target(tree()), checksum(tree()))
