"""Traces of some steps."""

import jax.numpy as jnp
import pytest

from experiments.run.profile import Profile


def test_a_trace_of_the_steps_asked_for(tmp_path):
    with Profile("2:2", tmp_path / "profile") as profile:
        for step in (1, 2, 3):
            profile.before(step)
            profile.after(step, jnp.sin(jnp.ones(3)))
            assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 2)


def test_without_steps_there_is_none(tmp_path):
    with Profile(None, tmp_path / "profile") as profile:
        profile.before(1)
        profile.after(1, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["3", "0:2", "5:4", "a:b", ":"])
def test_what_is_refused(steps, tmp_path):
    with pytest.raises(ValueError, match="give the first and the last step"):
        Profile(steps, tmp_path)
