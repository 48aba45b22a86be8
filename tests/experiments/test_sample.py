"""The sampling program as people start it: what it prints, and what it says to wrong use."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from transformer.inference.generate import generate

ROOT = Path(__file__).parents[2]
OPTIONS = {"max_new_tokens": 24, "temperature": 0.9, "top_k": 100, "top_p": 0.95, "seed": 5}
FLAGS = [f"--{name}={value}" for name, value in OPTIONS.items()]
PROMPTS = ["ab", "ab", "longer é prompt", "longer é prompt"]
PROGRAM = [sys.executable, "-m", "experiments.sample"]


@pytest.fixture
def sample(run_program):
    return partial(run_program, "experiments.sample")


def test_json_is_what_generate_returns(sample, model, saved):
    result = sample(
        f"--workdir={saved}", "--prompt=ab", "--prompt=longer é prompt", "--num_samples=2",
        "--stop=x", "--stop=yz", "--json", *FLAGS,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    completions = generate(model, PROMPTS, stop=["x", "yz"], **OPTIONS)
    for prompt, row, completion in zip(PROMPTS, printed, completions, strict=True):
        assert row.pop("prompt") == prompt
        # The same program of the same machine gives the same numbers.
        assert row == vars(completion)


def test_text_of_several_prompts_comes_one_after_the_other(sample, model, saved):
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    result = sample(f"--workdir={saved}", *flags, *FLAGS)
    assert result.returncode == 0, result.stderr
    texts = [completion.text for completion in generate(model, PROMPTS, **OPTIONS)]
    expected = "".join(
        f"=== {n} of 4 ===\n{prompt}{text}\n"
        for n, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True), 1)
    )
    # Every line break is read as \n, also those that the model wrote.
    assert result.stdout.splitlines() == expected.splitlines()


def test_a_reader_that_leaves_is_no_error(saved):
    flags = [f"--workdir={saved}", "--prompt=ab", "--max_new_tokens=200", "--temperature=0"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*PROGRAM, *flags], cwd=ROOT, stdout=pipe, stderr=pipe) as program:
        assert program.stdout.read(2) == b"ab"
        program.stdout.close()
        assert program.stderr.read() == b""


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt=a", "--workdir=nowhere"], "nowhere"),
        (["--prompt=a", "--top_p=0"], "top_p=0.0"),
        (["--prompt=a", "--attention=splash"], "attention backend 'splash': "),
        (["--prompt=a", "--max_new_tokens=1000"], "max_new_tokens=1000"),
        (["--prompt=a", "--num_samples=0"], "num_samples"),
        ([], "prompt"),
    ],
)
def test_wrong_use_is_one_line(sample, saved, flags, message):
    result = sample(f"--workdir={saved}", *flags)
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_help_needs_no_jax():
    code = "import sys, experiments.sample; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    result = subprocess.run([*PROGRAM, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--prompt" in result.stdout and "--top_p" in result.stdout
