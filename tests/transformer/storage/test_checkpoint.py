"""Checkpoints: exact, verified, the best kept, and never lost to what comes later."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.storage.checkpoint import SPARE_BYTES, CheckpointError, Checkpoints, LayoutError

DTYPES = ("float32", "bfloat16", "int32", "uint32")


@pytest.fixture
def random_tree(rng):
    """A function that makes arrays of several types and ranks, new ones each time."""

    def array(dtype):
        shape = tuple(rng.integers(1, 40, rng.integers(0, 4)))
        return jnp.asarray(rng.integers(0, 2**20, shape) / 64, dtype)

    return lambda: {"lists": [array(dtype) for dtype in DTYPES], "one": array("float32")}


@pytest.fixture
def tree(random_tree):
    return random_tree()


def target(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def read(path, like, steps=None):
    with Checkpoints(path, read_only=True) as checkpoints:
        order = reversed(checkpoints.steps) if steps is None else steps
        return checkpoints.restore(lambda _: {"params": target(like)}, order)


def files(folder):
    return [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]


@contextlib.contextmanager
def largest_file(size):
    """Every write beyond `size` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_saved_comes_back(tmp_path, random_tree):
    params, ema = random_tree(), random_tree()
    metadata = {"data": {"next_index": 12}, "text": "ü"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, {"params": params, "ema": ema}, metadata)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        seen = []
        restored = checkpoints.restore(
            lambda names: seen.append(names) or {"ema": target(ema), "params": target(params)}, [7]
        )
    assert seen == [{"params", "ema"}]
    assert restored.step == 7
    assert restored.metadata == metadata
    assert_same(restored.items, {"ema": ema, "params": params})


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"large": jnp.zeros((500, 1000)), "scalar": jnp.int32(0)}
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        for step in range(1, 5):
            tree = advance(tree)
            checkpoints.save(step, {"params": tree}, {})
            tree = advance(tree)
    for step in range(1, 5):
        expected = jax.tree.map(lambda x, step=step: jnp.full_like(x, 2 * step - 1), tree)
        assert_same(read(tmp_path, tree, [step]).items["params"], expected)


def test_the_newest_and_the_best_are_kept(tmp_path, tree):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 5.0, 6: None, 7: 4.0}
    first, second = [dict(list(losses.items())[part]) for part in (slice(4), slice(4, None))]
    for part in (first, second):  # two runs: what is best is remembered on disk
        with Checkpoints(tmp_path, keep_last=2, keep_best=2) as checkpoints:
            for step, loss in part.items():
                checkpoints.save(step, {"params": tree}, {}, loss)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [2, 4, 6, 7]
        assert checkpoints.best_first == [2, 4, 7, 6]


def test_without_any_best_only_the_newest_are_kept(tmp_path, tree):
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        for step in range(3):
            checkpoints.save(step, {"params": tree}, {}, float(step))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [2]


def test_any_damage_is_noticed_and_the_one_before_is_read(tmp_path, rng, random_tree, caplog):
    old, new = random_tree(), random_tree()
    new = jax.tree.map(lambda x, y: jnp.resize(y, x.shape).astype(x.dtype), old, new)
    new["one"] = new["one"] + 1
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, {"params": old}, {"step": 10})
        checkpoints.save(20, {"params": new}, {"step": 20})
    folder = tmp_path / "checkpoints" / "20"
    fallbacks = 0
    for file in files(folder):
        with open(file, "rb") as stream:
            whole = stream.read()
        turned = bytearray(whole)
        for place in rng.integers(0, len(whole), 3) if whole else ():
            turned[place] ^= 1 << rng.integers(8)
        noise = rng.bytes(len(whole))
        for damaged in (b"", whole[: len(whole) // 2], noise, bytes(turned), None):
            if damaged is None:
                os.remove(file)
            else:
                with open(file, "wb") as stream:
                    stream.write(damaged)
            caplog.clear()
            restored = read(tmp_path, old)
            # Some files are not needed to read; then nothing is lost.
            assert_same(restored.items["params"], {10: old, 20: new}[restored.step])
            assert restored.metadata == {"step": restored.step}
            said = [record.getMessage() for record in caplog.records]
            if restored.step == 10:
                fallbacks += 1
                [line] = said
                assert line.startswith(f"checkpoint {folder} is damaged and left out (")
            else:
                assert not said
        with open(file, "wb") as stream:
            stream.write(whole)
    # The metadata, and the manifest and the data of the arrays, each in most of five ways.
    assert fallbacks > 10
    assert read(tmp_path, old).step == 20


def test_a_damaged_checkpoint_is_one_line_in_the_terminal(tmp_path):
    tree = {str(n): jnp.arange(100.0) + n for n in range(30)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": tree}, {})
    folder = tmp_path / "checkpoints" / "2"
    for data in (folder / "params" / "d").iterdir():
        data.unlink()
    program = """
import gc, sys
import jax
from transformer.storage.checkpoint import Checkpoints
tree = {str(n): jax.ShapeDtypeStruct((100,), "float32") for n in range(30)}
print(Checkpoints(sys.argv[1], read_only=True).restore(lambda _: {"params": tree}, [2, 1]).step)
gc.collect()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "1\n", result.stderr
    reason = "params: the array 0 cannot be read"
    [line] = result.stderr.splitlines()
    assert line.endswith(f"checkpoint {folder} is damaged and left out ({reason})")


def test_a_checkpoint_that_is_gone_for_the_most_part(tmp_path, tree):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": tree}, {}, 1.0 / step)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "params")
    assert read(tmp_path, tree).step == 1
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "metadata")
    with pytest.raises(CheckpointError, match="all of 2, 1 are damaged"):
        read(tmp_path, tree)


def test_other_arrays_than_those_saved_are_no_damage(tmp_path, tree):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": tree}, {"a": 3})
    wider = {**tree, "one": jnp.zeros((41, *tree["one"].shape))}
    with pytest.raises(LayoutError, match="is whole, but its params holds other arrays") as error:
        read(tmp_path, wider)
    assert (error.value.item, error.value.metadata) == ("params", {"a": 3})
    with pytest.raises(LayoutError, match="is whole, but its ema is missing"):
        Checkpoints(tmp_path, read_only=True).restore(lambda _: {"ema": target(tree)}, [1])


def test_nothing_there(tmp_path, tree):
    with pytest.raises(CheckpointError, match="there is none"):
        read(tmp_path, tree)


def test_later_checkpoints_can_be_discarded_and_written_anew(tmp_path, random_tree):
    trees = [random_tree() for _ in range(4)]
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"params": trees[0]}, {}, 1.0)
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        checkpoints.discard_after(1)
        assert checkpoints.steps == [1]
        checkpoints.save(2, {"params": trees[1]}, {}, 2.0)
    assert_same(read(tmp_path, trees[1]).items["params"], trees[1])


def test_reading_writes_nothing_and_says_nothing(tmp_path, tree, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": tree}, {})
    before = {path: os.stat(path).st_mtime_ns for path in files(tmp_path)}
    caplog.clear()
    read(tmp_path, tree)
    assert before == {path: os.stat(path).st_mtime_ns for path in files(tmp_path)}
    assert not caplog.records


def test_a_stray_file_is_not_a_checkpoint(tmp_path, tree):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": tree}, {})
        checkpoints.wait()
        (checkpoints.path / "99").touch()
        assert checkpoints.steps == [1]
        checkpoints.discard_after(1)


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path, tree):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": tree}, {})
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    assert read(tmp_path, tree).step == 1
    assert (folder / "2.orbax-checkpoint-tmp").exists()  # another process may be writing it
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"params": tree}, {})
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path, rng, monkeypatch):
    small, large = {"a": jnp.arange(9.0)}, {"a": jnp.asarray(rng.random(90_000), jnp.float32)}
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, {"params": small}, {})
    checkpoints.wait()
    with (
        largest_file(100_000),
        pytest.raises(CheckpointError, match=r"File too large.* intact: 1\."),
    ):
        checkpoints.save(2, {"params": large}, {})
        checkpoints.wait()
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    usage = shutil.disk_usage(tmp_path)
    free = SPARE_BYTES + 4 * 90_000 - 1  # one byte less than it takes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(CheckpointError, match=r"1\.4 MB are needed .* free; free some space there"):
        checkpoints.save(3, {"params": large}, {})
    monkeypatch.undo()
    assert_same(read(tmp_path, small).items["params"], small)
    with checkpoints:  # and it goes on once there is room
        checkpoints.save(4, {"params": large}, {})
    assert_same(read(tmp_path, large).items["params"], large)
