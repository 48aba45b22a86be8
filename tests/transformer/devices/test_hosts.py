"""Processes that run as one; tests/experiments/test_processes.py runs two of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.devices import hosts


def test_one_process_is_all_there_is():
    assert hosts.is_main()
    hosts.wait("for nobody")
    hosts.require_same("what it does", object())
    gathered = hosts.gather({"a": jnp.arange(3), "b": np.ones(2)})
    assert isinstance(gathered["a"], np.ndarray)
    np.testing.assert_array_equal(gathered["a"], [0, 1, 2])
    with pytest.raises(KeyError), hosts.failing_at_once():
        raise KeyError


def test_half_of_an_address_is_refused():
    with pytest.raises(ValueError, match="give all three, or none of them"):
        hosts.join("127.0.0.1:1234", 2)


def test_no_cluster_is_said(monkeypatch):
    def initialize(*given, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(ValueError, match=r"JAX finds no Slurm.*should be defined"):
        hosts.join()
    with pytest.raises(ValueError, match=r"^coordinator_address"):
        hosts.join("127.0.0.1:1234", 2, 5)
