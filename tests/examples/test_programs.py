"""The programs of examples/: the lawful ones run in every mode, the others are refused."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import examples.programs
from transformer import run
from transformer.memory.rules import Rule
from transformer.modes.contract import check_contract, static
from transformer.modes.contract.findings import Findings

FOLDER = pathlib.Path(examples.programs.__file__).parent
LAWFUL = (
    "attention",
    "token_shift",
    "latent_attention",
    "linear_attention",
    "gated_delta",
    "recurrent",
    "shared_keys",
    "looped",
    "looped_scan",
)
UNLAWFUL = {  # which rule each breaks, and a part of the line that does
    "feedback": (Rule.ONCE, "turn.write_read"),
    "shared_block": (Rule.ONCE, "turn.write_read"),
    "written_twice": (Rule.ONCE, "turn.write_read"),
    "out_of_order": (Rule.ONCE, "turn.write_read"),
    "next_cell": (Rule.OWN, "turn.write_read"),
    "list_state": (Rule.STATE, "PAST"),
    "mean_over_positions": (Rule.APART, "pmean"),
    "expert_choice": (Rule.APART, "all_gather"),
}
LENGTH, CAPACITY = 11, 16
# Layers in the runs of the contract, whose time is in compiling them. The rules are proved of each
# program as it is, and the first one runs as it is.
FEWER = {name: {"LAYERS": 1} for name in LAWFUL[1:6]}
FEWER |= {"shared_keys": {"PAIRS": 1}, "looped": {"ITERATIONS": 2}}

# The modes multiply the same float32 numbers in another order, and sums have up to 64 terms;
# rounding errors of a few layers stay well below this share of the largest number.
TOLERANCE = 2e-5

lawful = pytest.mark.parametrize("name", LAWFUL)


def example(name):
    return importlib.import_module(f"examples.programs.{name}")


def given_to(module, seed=0, length=LENGTH):
    """Parameters and tokens."""
    tokens = np.random.default_rng(seed).integers(0, module.VOCAB_SIZE, length, dtype=np.int32)
    return module.init(jax.random.key(seed)), tokens


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE * np.abs(y).max(), rtol=0)


def test_every_program_is_listed_here_and_in_the_readme():
    for folder, names in ((FOLDER, LAWFUL), (FOLDER / "unlawful", UNLAWFUL)):
        files = {path.stem for path in folder.glob("*.py")} - {"__init__", "parts"}
        assert files == set(names)
    readme = (FOLDER.parent / "README.md").read_text()
    for path in FOLDER.rglob("*.py"):
        if path.name != "__init__.py":
            assert f"({path.relative_to(FOLDER.parent)})" in readme


@pytest.mark.parametrize("name", ["attention", "gated_delta", "looped_scan"])
def test_a_batch_is_vmap_over_sequences(name):
    """Each sequence has a cache of its own, and is at a position of its own.

    That rows do not see one another is a law of the contract, which all programs are held to.
    """
    module = example(name)
    params, tokens = given_to(module, seed=2, length=15)
    first, second, third = tokens.reshape(3, 5)
    some = lambda cache, tokens, start: run(module.program, params, cache, tokens, start)
    alone, batch = jax.jit(some), jax.jit(jax.vmap(some))
    new = module.empty(CAPACITY)
    used, _ = alone(new, first, 0)
    rows = (new, second, 0), (used, third, 5)
    actual = batch(*jax.tree.map(lambda *x: jnp.stack(x), *rows))
    assert_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *[alone(*row) for row in rows]))


def contract_of(module):
    params = module.init(jax.random.key(0))
    return check_contract(
        module.program, params, module.empty(CAPACITY), vocab_size=module.VOCAB_SIZE
    )


@lawful
def test_the_contract_holds(name, monkeypatch):
    """Which is that every schedule gives the same, with its gradients, and packed documents too."""
    module, findings = example(name), Findings()
    params = module.init(jax.random.key(0))
    static.check(module.program, params, module.empty(CAPACITY), module.VOCAB_SIZE, findings)
    assert not findings, findings.report()
    for size, number in FEWER.get(name, {}).items():
        monkeypatch.setattr(module, size, number)
    report = contract_of(module)
    assert report.lawful, report


@pytest.mark.parametrize("name", UNLAWFUL)
def test_the_contract_names_the_rule_and_the_line(name):
    module = example(f"unlawful.{name}")
    report = contract_of(module)
    assert not report.lawful
    rule, text = UNLAWFUL[name]
    lines = pathlib.Path(module.__file__).read_text().splitlines()
    for violation in report.violations:
        file, line = violation.where.rsplit(":", 1)
        assert pathlib.Path(file) == pathlib.Path(module.__file__)
        if violation.rule == rule:
            assert text in lines[int(line) - 1]
    assert report.violations[0].rule == rule


def test_the_feedback_transformer_would_run_and_be_wrong():
    """Its modes disagree without an error, which is why the contract is checked."""
    module = example("unlawful.feedback")
    params, tokens = given_to(module)
    logits = [
        run(module.program, params, module.empty(CAPACITY), tokens, chunk=chunk)[1]
        for chunk in (None, 1)
    ]
    assert np.abs(logits[0] - logits[1]).max() > 0.01 * np.abs(logits[1]).max()
