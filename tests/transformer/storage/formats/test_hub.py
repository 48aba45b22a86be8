"""Models of the Hub: what an address is, where its files lie, and what is said offline."""

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import errors

from transformer import load


@pytest.mark.parametrize("address", ["hf://llama", "hf://a/b/c", "hf://a/b@", "hf://../b?c=d"])
def test_what_is_not_an_address_is_refused(address):
    with pytest.raises(ValueError, match="a model of the Hub is hf://owner/name"):
        load(address)


def test_a_model_is_read_from_the_cache_of_the_hub(published_named, monkeypatch):
    asked = []

    def snapshot(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        return str(published_named("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = load("hf://owner/na.me@v1.0")
    assert asked == [("owner/na.me", "v1.0")]
    jax.tree.map(np.testing.assert_array_equal, model.params, load(published_named("llama")).params)


@pytest.mark.parametrize(
    "raised, error, message",
    [
        (errors.LocalEntryNotFoundError("no network"), ConnectionError, "Hub cannot be reached"),
        (OSError("no route\nto host"), ConnectionError, r"reached: no route\. Go online"),
    ],
)
def test_offline_it_says_what_to_do(raised, error, message, monkeypatch):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(error, match=message):
        load("hf://owner/name")
