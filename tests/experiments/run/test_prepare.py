"""Making a run ready: what is read, what is refused, and before anything is written."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.run.prepare import prepare, read_documents, shorten_warmup
from transformer import Model, load, save
from transformer.data.tokenizer import byte_tokenizer
from transformer.storage.checkpoint import CheckpointError

FIXTURES = Path(__file__).parents[2] / "transformer" / "storage" / "formats" / "fixtures"
STEPS = 160  # of the fixture `reference`


def test_damaged_files_are_named(experiment, reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    longer = experiment(train__steps=STEPS + 1)
    (workdir / "experiment.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"experiment\.json is damaged; remove it"):
        prepare(longer, workdir)
    (workdir / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file"):
        prepare(longer, workdir)
    with pytest.raises(NotADirectoryError, match="is a file; give a directory"):
        prepare(longer, workdir / "tokenizer.json")


def test_bytes_have_no_size_to_change(experiment, reference):
    assert prepare(experiment(data__vocab_size=999), reference) is None  # it is finished


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model__width": 48}, ValueError, "another architecture: width is 32 there and 48 here"),
        ({"data__tokenizer": "bpe"}, ValueError, r"data.tokenizer \(bytes -> bpe\) cannot change"),
        ({"optimizer__name": "muon"}, CheckpointError, "optimizer.name was adamw and is muon. Go "),
        ({"optimizer__clip_norm": None}, CheckpointError, "Go on with .*optimizer.clip_norm=1.0,"),
        ({"data__path": "/nowhere/*.txt"}, OSError, "no file matches '/nowhere/"),
    ],
)
def test_a_run_goes_on_only_as_it_began(experiment, reference, changes, kind, message):
    with pytest.raises(kind, match=message):
        prepare(experiment(train__steps=STEPS + 1, **changes), reference)


def test_a_run_begins_with_a_model_that_is_there(experiment, reference, tmp_path, capsys):
    from experiments.train import train

    changes = {"init__path": str(reference), "model__width": 64, "data__tokenizer": "bpe"}
    run = prepare(experiment(train__steps=1, **changes), tmp_path)
    model = load(reference)
    assert run.model == model.config and run.tokenizer.vocab_size == model.tokenizer.vocab_size
    jax.tree.map(np.testing.assert_array_equal, run.state.params, model.params)
    assert "of config.model only dtype and remat are used" in capsys.readouterr().out
    train(run)
    assert prepare(experiment(train__steps=2, **changes), tmp_path).start == 1
    assert "those of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init__path": str(FIXTURES / "llama")}, "the model has no tokenizer; it needs one"),
        ({"init__path": "/nowhere"}, "/nowhere is neither a saved model nor"),
    ],
)
def test_a_model_to_begin_with_must_be_one_that_can_train(experiment, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        prepare(experiment(**changes), tmp_path / "run")


def test_an_average_cannot_begin_late(experiment, tmp_path):
    from experiments.train import train

    without = {"train__steps": 2, "train__ema_decay": None}
    train(prepare(experiment(**without), tmp_path))
    message = (
        r"its ema is missing\. config\.train\.ema_decay was None and is 0\.9\. Go on with --con"
    )
    with pytest.raises(CheckpointError, match=message):
        prepare(experiment(train__steps=3), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "/nowhere/*.txt"}, "no file matches"),
        ({"data__validation_fraction": 1.5}, "config.data.validation_fraction=1.5; it must lie"),
        ({"data__separator": "\u2028"}, r"config.data.separator='\\u2028' stands in no file"),
        ({"data__document_length": 0}, "config.data.document_length=0; it must be at least 1"),
        ({"data__seed": -1}, "config.data.seed=-1; it must be at least 0"),
        ({"train__ema_decay": 1.5}, "config.train.ema_decay=1.5; it must be above 0 and below 1"),
        ({"model__num_heads": 5}, "config.model.width=32 must be a multiple of config.model.num_h"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(experiment, tmp_path, changes, message):
    workdir = tmp_path / "run"
    with pytest.raises((ValueError, OSError), match=message):
        prepare(experiment(**changes), workdir)
    assert not workdir.exists()


def test_a_file_that_is_not_utf8(experiment, tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text("text")
    (tmp_path / "g.txt").write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match=r"g\.txt is not UTF-8: byte 3 is 0xff"):
        prepare(experiment(data__path=str(tmp_path / "*.txt")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "warmup"), [(60, 60), (12, 10), (10, 2), (3, 0), (1, 0)])
def test_a_warmup_leaves_steps_to_train(experiment, capsys, steps, warmup):
    given = experiment(train__steps=steps, optimizer__warmup_steps=60 if steps == 60 else 10)
    shortened = shorten_warmup(given)
    if steps == 60:
        warmup = 15
    assert shortened.optimizer.warmup_steps == warmup
    printed = capsys.readouterr().out
    if shortened == given:
        assert not printed
    else:
        assert f"config.train.steps={steps}; the warm-up is shortened to {warmup} step" in printed


def test_a_single_document_is_cut_unless_a_length_is_given(experiment, tmp_path, capsys):
    path = tmp_path / "book.txt"
    path.write_text("a line of text\n" * 1000)
    data = experiment(data__path=str(path)).data
    pieces = len(read_documents(data))
    assert 15 <= pieces <= 20
    assert f"one document, which is cut into {pieces}, so that" in capsys.readouterr().out
    assert (
        len(
            read_documents(
                experiment(**{"data__path": str(path), "data__document_length": 1500}).data
            )
        )
        == 10
    )
    assert not capsys.readouterr().out


def test_adapters_are_trained_on_conversations_and_merged(experiment, model, tmp_path):
    from experiments.train import train

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    save(Model(model.config, model.params, tokenizer), tmp_path / "model")
    talks = [
        {"messages": [{"role": r, "content": 9 * f"{n} "} for r in ("user", "assistant")]}
        for n in range(9)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    changes = {
        "data__path": str(tmp_path / "talks.jsonl"),
        "data__chat": True,
        "init__path": str(tmp_path / "model"),
        "lora__rank": 2,
        "lora__targets": ("query",),
        "optimizer__learning_rate": 0.1,
    }
    workdir = tmp_path / "run"
    run = prepare(experiment(train__steps=2, **changes), workdir)
    train(run)
    after = load(workdir)
    assert after.tokenizer.chat_template == tokenizer.chat_template
    with_query = after.params.layers[0].mixer.replace(query=model.params.layers[0].mixer.query)
    layer = after.params.layers[0].replace(mixer=with_query)
    assert not np.allclose(with_query.query.weight, after.params.layers[0].mixer.query.weight)
    jax.tree.map(np.testing.assert_array_equal, after.params.replace(layers=(layer,)), model.params)
    again = prepare(experiment(train__steps=3, **changes), workdir)
    assert again.start == 2
    jax.tree.map(np.testing.assert_array_equal, again.state.base, model.params)
    assert np.any(again.state.params.adapters["layers.0.mixer.query.weight"].b)
    other = model.params.replace(embedding=model.params.embedding + 1)
    save(Model(model.config, other, tokenizer), tmp_path / "other model")
    with pytest.raises(ValueError, match="other parameters than those that the adapters of this"):
        prepare(
            experiment(train__steps=3, **changes | {"init__path": str(tmp_path / "other model")}),
            workdir,
        )
    with pytest.raises(CheckpointError, match=r"lora.rank was 2 and is 4. Go on with"):
        prepare(experiment(train__steps=3, **changes | {"lora__rank": 4}), workdir)
    with pytest.raises(ValueError, match=r"config.lora.targets=.*'queries'; choose from down"):
        prepare(experiment(**changes | {"lora__targets": ("queries",)}), tmp_path / "other")


def test_adapters_and_conversations_need_a_model(experiment):
    for changes, name in (({"lora__rank": 2}, "lora.rank=2"), ({"data__chat": True}, "data.chat")):
        with pytest.raises(ValueError, match=f"config.{name}.* give config.init.path"):
            experiment(**changes)
