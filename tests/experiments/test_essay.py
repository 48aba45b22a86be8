"""The essay's claims, measured on a tiny hybrid: every claim is judged, and a report is written."""

import json

import jax
import numpy as np

from experiments.suites import essay
from experiments.suites.claims import REFUTED, SUPPORTED, UNDECIDED
from experiments.suites.essay import Measure, _probe, feedback_beside_plain
from transformer import Model, init_cache, init_params, presets, program, save, trace
from transformer.config import Delta
from transformer.data.tokenizer import byte_tokenizer


def test_it_measures_and_judges(run_program, tmp_path, corpus):
    config = presets["tiny"].replace(
        width=16, num_heads=2, num_kv_heads=1, layer_kinds=("delta", "attention"), delta=Delta()
    )
    save(
        Model(config, init_params(config, jax.random.key(0)), byte_tokenizer()), tmp_path / "model"
    )
    flags = f"--workdir={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", f"--text={corpus}"
    sizes = "--fraction=0.5", "--documents=4", "--length=12", "--steps=3", "--lengths=8"
    result = run_program("experiments.essay", *flags, *sizes)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out/essay.json").read_text())
    assert len(found["claims"]) == 9
    assert {x["verdict"] for x in found["claims"]} <= {SUPPORTED, REFUTED, UNDECIDED}
    counts = {way["name"]: way["operations"][0] for way in found["ways"]}
    assert counts["parallel"] <= 1.5 * counts["one by one"] < counts["without a cache"]
    for measure in found["measures"]:
        assert len(measure["mean"]) == len(measure["half_interval"]) == 3
        assert np.isfinite(measure["mean"]).all()
    report = (tmp_path / "out/essay.md").read_text()
    assert report in result.stdout and "python -m experiments.essay" in report
    assert (tmp_path / "out/essay.png").read_bytes().startswith(b"\x89PNG")


def test_a_probe_reads_what_is_there(rng):
    targets = rng.integers(0, 5, (8, 20))
    there = np.eye(5)[targets] + 0.01 * rng.standard_normal((8, 20, 5))
    noise = rng.standard_normal((8, 20, 5))
    assert _probe(there, targets, 4).tolist() == [1, 1, 1, 1]
    assert _probe(noise, targets, 4).mean() < 0.5  # chance is 0.2, of 80 guesses


def test_intervals_are_over_documents(rng):
    values = rng.standard_normal((2, 400))
    measure = Measure("", "", values)
    assert measure.mean.shape == (2,)
    np.testing.assert_allclose(measure.interval, 1.96 / 20, rtol=0.2)  # 400 draws of deviation 1


def test_a_block_that_is_read_again_is_read_by_the_mean_of_its_reads():
    config = presets["tiny"].replace(
        width=16, num_heads=2, num_kv_heads=1, num_layers=3, num_shared_kv_layers=1
    )
    given = init_params(config, jax.random.key(0)), init_cache(config, 8), np.arange(8)
    seen = jax.jit(trace, static_argnums=0)(program(config), *given)
    mean = sum(seen.weights(1, read=read).mean(0) for read in (0, 1)) / 2
    np.testing.assert_allclose(essay._shares(seen, 1), mean, atol=1e-6)  # float32 shares of 1
    np.testing.assert_allclose(essay._shares(seen, 0), seen.weights(0).mean(0), atol=1e-6)


def test_layers_that_are_scanned_all_count(monkeypatch):
    """XLA counts a loop over layers once; a model counts the same however its layers are kept."""
    monkeypatch.setattr(essay, "_seconds", lambda programs, *_: [[0.0]] * len(programs))
    counts = []
    for scan in (True, False):
        config = presets["tiny"].replace(width=16, num_heads=2, num_kv_heads=1, scan_layers=scan)
        [*_, last] = essay.ways(config, init_params(config, jax.random.key(0)), [8])
        counts.append(last.operations)
    assert counts[0] == counts[1]


def test_wrong_use_is_one_line(run_program, tmp_path):
    for flags, message in (
        ([], "give one of --workdir=DIR and --model=PATH."),
        (["--model=x", "--lengths=8,no"], "--lengths=8,no; give numbers of tokens"),
    ):
        result = run_program("experiments.essay", *flags, f"--out={tmp_path}")
        assert result.returncode == 2 and not result.stdout
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ") and message in line


def test_the_feedback_transformer_is_deeper():
    plain, feedback = feedback_beside_plain(steps=3, length=8, rows=2)
    assert (plain.depth, feedback.depth) == (2, 16)
    assert len(plain.losses) == 3 and len(plain.seconds) == 2
    assert np.isfinite([plain.losses, feedback.losses]).all()
