"""Models on disk."""

import errno
import shutil

import jax
import numpy as np
import pytest

from transformer import Config, Model, init_params, load, save
from transformer.data.tokenizer import byte_tokenizer
from transformer.storage.checkpoint import CheckpointError, Checkpoints
from transformer.storage.model import require_same_architecture, write_description

CONFIG = Config(
    vocab_size=257, max_length=150, num_layers=2, width=16, num_heads=2, window=(8, None)
)


@pytest.fixture
def random_params(rng):
    """A function that makes new parameters each time."""
    return lambda: init_params(CONFIG, jax.random.key(rng.integers(2**31)))


@pytest.fixture
def model(random_params):
    return Model(CONFIG, random_params(), byte_tokenizer())


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_saved_model_comes_back(tmp_path, model):
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == model.config
    assert_same(loaded.params, model.params)
    text = "def f(x): return 'ü'\n"
    assert loaded.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_saving_overwrites_nothing(tmp_path, model):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="there already"):
        save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_disk_that_was_full_is_not_in_the_way_of_the_next_try(tmp_path, model, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    for path in (tmp_path / "new", tmp_path):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(CheckpointError, match="could not save"):
            save(model, path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        save(model, path)
        load(path)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)


def test_a_disk_that_becomes_full_leaves_nothing_behind(tmp_path, model, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "config.json")

    monkeypatch.setattr("transformer.storage.model.write_json", full)
    with pytest.raises(OSError, match=r"No space left on device: 'config\.json'"):
        save(model, tmp_path / "new")
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a saved model nor a work directory"):
        load(tmp_path)
    write_description(tmp_path, CONFIG, byte_tokenizer())
    with pytest.raises(CheckpointError, match="there is none"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 257, "wings": 2}')
    with pytest.raises(ValueError, match=r"config.json does not describe a model.*wings"):
        load(tmp_path)


def test_a_model_of_another_layout_is_refused_in_one_line(tmp_path, model):
    save(model, tmp_path / "model")
    write_description(tmp_path / "model", CONFIG.replace(qk_norm=True), byte_tokenizer())
    with pytest.raises(CheckpointError, match=r"not laid out as its config\.json says") as error:
        load(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_of_a_run_the_best_checkpoint_is_loaded_and_its_average(tmp_path, random_params):
    states = [{"params": random_params(), "ema": random_params()} for _ in range(3)]
    write_description(tmp_path, CONFIG, byte_tokenizer())
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step, (state, loss) in enumerate(zip(states, (2.0, 1.0, None), strict=True)):
            checkpoints.save(step, state, {}, loss)
    assert_same(load(tmp_path).params, states[1]["ema"])
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    assert_same(load(tmp_path).params, states[0]["ema"])
    shutil.rmtree(tmp_path / "checkpoints" / "0" / "ema")  # damaged: the newest is left
    assert_same(load(tmp_path).params, states[2]["ema"])


def test_another_architecture_is_refused_by_the_names_of_its_fields(tmp_path):
    write_description(tmp_path, CONFIG, byte_tokenizer())
    require_same_architecture(tmp_path, CONFIG.replace(remat="dots", dtype="bfloat16"))
    require_same_architecture(tmp_path, CONFIG.replace(head_size=8))  # which it has by default
    other = CONFIG.replace(num_layers=4, norm="layer", window=(8, 9))
    with pytest.raises(ValueError, match="another architecture") as error:
        require_same_architecture(tmp_path, other)
    for part in ("num_layers is 2 there and 4 here", "norm is rms", "window is (8, None)"):
        assert part in str(error.value)
    assert "width" not in str(error.value)


def test_matrices_in_bfloat16_are_saved_and_loaded_as_they_are(tmp_path):
    config = Config(vocab_size=257, max_length=16, num_layers=1, width=16, num_heads=2)
    save(Model(config, init_params(config, jax.random.key(0)), None), tmp_path / "wide")
    narrow = load(tmp_path / "wide", dtype="bfloat16")
    save(narrow, tmp_path / "narrow")
    again = load(tmp_path / "narrow")
    assert again.config == narrow.config
    jax.tree.map(np.testing.assert_array_equal, again.params, narrow.params)
    types = lambda params: [x.dtype for x in jax.tree.leaves(params)]
    assert types(again.params) == types(narrow.params)
