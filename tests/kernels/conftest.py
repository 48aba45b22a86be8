"""Settings of the tests of kernels."""

import jax
import pytest


@pytest.fixture(autouse=True)
def exact_products():
    """float32 means float32, on devices that would otherwise multiply in TF32 or bfloat16 too."""
    with jax.default_matmul_precision("highest"):
        yield
