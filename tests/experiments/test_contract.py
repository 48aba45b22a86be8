"""The command that checks a program, as people start it."""

from functools import partial

import pytest

LAWFUL = """
import jax, jax.numpy as jnp
from transformer import Cache, Fold

VOCAB_SIZE = 5
SUM = Fold(jnp.add, lambda query, state, shared: state)


def program(params, cache, token, i):
    turn, z = cache.begin(i).write_read(SUM, params[token], None)
    return turn.end(), z @ params.T


def next_cell(params, cache, token, i):
    turn, z = cache.begin(i + 1).write_read(SUM, params[token], None)
    return turn.end(), z @ params.T


def init(key):
    return jax.random.normal(key, (VOCAB_SIZE, 3))


def empty(capacity):
    return Cache.empty(capacity, [(SUM, (3,))])
"""


@pytest.fixture
def start(run_program):
    return partial(run_program, "experiments.contract")


@pytest.fixture
def program(tmp_path):
    """A file of programs; it is also a module where the command is started."""
    (tmp_path / "mine.py").write_text(LAWFUL)
    (tmp_path / "broken.py").write_text("program = 1 +\n")
    return tmp_path


def test_a_lawful_program_of_a_module(start, program):
    result = start("--program=mine:program", folder=program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("lawful")


def test_an_unlawful_program_of_a_file(start, program):
    result = start("--program=mine.py:next_cell", folder=program)
    assert result.returncode == 1, result.stderr
    line = LAWFUL.splitlines().index(
        "    turn, z = cache.begin(i + 1).write_read(SUM, params[token], None)"
    )
    assert "own cell" in result.stdout and f"mine.py:{line + 1}" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_a_trained_model(start, saved):
    result = start(f"--workdir={saved}", "--capacity=3")
    assert result.returncode == 0, result.stderr + result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --program"),
        (["--preset=tiny", "--workdir=x"], "give one of --program"),
        (["--preset=huge"], "--preset=huge does not exist"),
        (["--workdir=nowhere"], "nowhere"),
        (["--program=mine"], "it is module:function"),
        (["--program=nothing:program"], "No module named 'nothing'"),
        (["--program=broken.py:program"], "broken.py cannot be loaded: SyntaxError"),
        (["--program=mine:run"], "mine has no run. Beside the program"),
        (["--capacity=0"], "capacity"),
    ],
    ids=str,
)
def test_wrong_use_is_one_line(start, program, flags, message):
    result = start(*flags, folder=program)
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
