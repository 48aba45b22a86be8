"""lm-evaluation-harness asks, and the model answers; runs where the extra `eval` is installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transformer import generate, score

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval.api.instance import Instance

from experiments.suites.harness import Harness

ROOT = Path(__file__).parents[3]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""


def requests(kind, *arguments):
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def test_likelihoods_are_those_of_score(model):
    harness, tokenizer = Harness(model), model.tokenizer
    [(one, greedy), (alone, _)] = harness.loglikelihood(
        requests("loglikelihood", ("ab ", "cd"), ("", "xyz"))
    )
    start = [tokenizer.end_of_document]
    # A space at the end of the context is the continuation's.
    assert one == pytest.approx(float(score(model, start + tokenizer.encode("ab cd"))[2:].sum()))
    assert alone == pytest.approx(float(score(model, start + tokenizer.encode("xyz")).sum()))
    assert not greedy
    [best] = generate(model, ["ab"], max_new_tokens=1, temperature=0, logit_bias={256: -np.inf})
    assert harness._likelihood(start + tokenizer.encode("ab"), best.tokens)[1]


def test_texts_longer_than_the_model_are_cut(model):
    config = model.config.replace(max_length=8)
    harness = Harness(type(model)(config, model.params, model.tokenizer))
    [total] = harness.loglikelihood_rolling(requests("loglikelihood_rolling", ("abcdefghij",)))
    ids = [256, *b"abcdefghij"]
    first, rest = score(model, ids[:8]), score(model, ids[3:])[-3:]
    assert total == pytest.approx(float(first.sum() + rest.sum()))
    [(end, _)] = harness.loglikelihood(requests("loglikelihood", ("abcdefgh", "ij")))
    assert end == pytest.approx(float(score(model, list(b"cdefghij"))[-2:].sum()))
    with pytest.raises(ValueError, match="it must have one, and fit behind one of context"):
        harness.loglikelihood(requests("loglikelihood", ("a", "bcdefghi")))


def test_completions_are_those_of_generate(model):
    settings = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    hot = {"until": "x", "max_gen_toks": 4, "temperature": 0.5, "top_k": 3}
    texts = Harness(model, batch_size=2).generate_until(
        requests("generate_until", ("ab", settings), ("cd", hot), ("ef", settings))
    )
    plain = generate(model, ["ab", "ef"], max_new_tokens=5, temperature=0, stop=["\n"])
    assert [texts[0], texts[2]] == [completion.text for completion in plain]
    [other] = generate(model, ["cd"], max_new_tokens=4, temperature=0.5, top_k=3, stop=["x"])
    assert texts[1] == other.text
    with pytest.raises(ValueError, match="the task sets 'num_beams' for generation"):
        Harness(model).generate_until(requests("generate_until", ("ab", {"num_beams": 2})))


def test_tasks_of_a_local_file(saved, tmp_path):
    rows = [{"question": "a b", "answer": " c"}, {"question": "d e", "answer": " f"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "mine_choice": ("multiple_choice", 'doc_to_choice: ["{{answer}}", " g"]'),
        "mine_text": ("loglikelihood_rolling", "metric_list: [{metric: bits_per_byte}]"),
        "mine_answer": (
            "generate_until",
            "metric_list: [{metric: exact_match}]\n"
            "generation_kwargs: {until: [' '], max_gen_toks: 4, do_sample: false}",
        ),
    }
    for name, (kind, more) in kinds.items():
        task = TASK.format(name=name, data=data, kind=kind, more=more)
        if kind == "loglikelihood_rolling":
            task = task.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""')
        if kind == "multiple_choice":
            task = task.replace('doc_to_target: "{{answer}}"', "doc_to_target: 0")
        (tmp_path / f"{name}.yaml").write_text(task)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.evaluate", "--json", f"--model={saved}"),
            *(f"--include_path={tmp_path}", f"--tasks={','.join(kinds)}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout[done.stdout.index("{") :])
    assert results["mine_text"]["bits_per_byte,none"] > 0
    assert 0 <= results["mine_choice"]["acc,none"] <= 1
    assert 0 <= results["mine_answer"]["exact_match,none"] <= 1


def test_an_unknown_task_is_said(saved):
    command = [sys.executable, "-m", "experiments.evaluate", f"--model={saved}", "--tasks=no_task"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: there is no task 'no_task'")
