"""Models on disk, and the scores that a model gives."""

import shutil

import jax
import numpy as np
import pytest
from jax.scipy.special import logsumexp

import transformer
from transformer import Config, Model, init_cache, init_params, load, run, save, score
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.score import _scorer
from transformer.program import program
from transformer.storage.checkpoint import CheckpointError, Checkpoints
from transformer.storage.model import require_same_architecture, write_description

RANDOM = np.random.default_rng()
CONFIG = Config(
    vocab_size=257, max_length=150, num_layers=2, width=16, num_heads=2, window=(8, None)
)


def random_params(config=CONFIG):
    return init_params(config, jax.random.key(RANDOM.integers(2**31)))


def random_model():
    return Model(CONFIG, random_params(), byte_tokenizer())


def random_tokens(length):
    return RANDOM.integers(0, CONFIG.vocab_size, length)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_public_surface_is_there():
    for name in transformer.__all__:
        assert getattr(transformer, name) is not None


def test_a_saved_model_comes_back(tmp_path):
    model = random_model()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == model.config
    assert_same(loaded.params, model.params)
    text = "def f(x): return 'ü'\n"
    assert loaded.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_saving_overwrites_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="there already"):
        save(random_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_disk_that_was_full_is_not_in_the_way_of_the_next_try(tmp_path, monkeypatch):
    model, usage = random_model(), shutil.disk_usage(tmp_path)
    for path in (tmp_path / "new", tmp_path):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(CheckpointError, match="could not save"):
            save(model, path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        save(model, path)
        load(path)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)


def test_what_is_no_model_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a saved model nor a work directory"):
        load(tmp_path)
    write_description(tmp_path, CONFIG, byte_tokenizer())
    with pytest.raises(CheckpointError, match="there is none"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 257, "wings": 2}')
    with pytest.raises(ValueError, match=r"config.json does not describe a model.*wings"):
        load(tmp_path)


def test_of_a_run_the_best_checkpoint_is_loaded_and_its_average(tmp_path):
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
    other = CONFIG.replace(num_layers=4, norm="layer", window=(8, 9))
    with pytest.raises(ValueError, match="another architecture") as error:
        require_same_architecture(tmp_path, other)
    for part in ("num_layers is 2 there and 4 here", "norm is rms", "window is (8, None)"):
        assert part in str(error.value)
    assert "width" not in str(error.value)


def test_scores_are_the_sequential_modes_log_probabilities():
    model = random_model()
    tokens = random_tokens(50)
    cache = init_cache(CONFIG, 50)
    _, logits = run(program(CONFIG), model.params, cache, tokens, chunk=1)
    logits = np.asarray(logits, np.float64)[:-1]
    expected = logits[np.arange(49), tokens[1:]] - np.asarray(logsumexp(logits, axis=-1))
    # Float32 sums in another order: a few rounding errors of logits of about 1.
    np.testing.assert_allclose(score(model, tokens), expected, atol=1e-5)


def test_a_score_depends_on_nothing_that_follows():
    model = random_model()
    tokens = random_tokens(150)
    whole = score(model, tokens)
    assert whole.shape == (149,) and whole.dtype == np.float32
    for length in (1, 2, 64, 65, 149):
        part = score(model, tokens[:length])
        assert part.shape == (length - 1,)
        # As above: other shapes may sum in another order.
        np.testing.assert_allclose(part, whole[: length - 1], atol=1e-5)


def test_new_lengths_do_not_compile_anew():
    model = random_model()
    for length in range(1, 151, 7):
        score(model, random_tokens(length))
    assert _scorer(CONFIG, "fast")._cache_size() == 3  # padded to 64, 128 and 150


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one"),
        ([[1, 2]], r"\[1, 2\]"),
        ([1.0, 2.0], "float64"),
        ([0, 257], "token id 257 at 1 is outside of the vocabulary, 0 to 256"),
        ([-1], "token id -1 at 0"),
        ([0] * 151, r"151 tokens are more than the 150 positions .*max_length"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokens, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        score(model, tokens)
