"""Settings of the tests of the Triton kernels."""

import jax
import pytest


@pytest.fixture(autouse=True)
def a_cpu_interprets(request):
    """Skips what runs in the interpreter, which a CUDA machine cannot lower, where there is one."""
    if hasattr(request.module, "interpret") and jax.default_backend() != "cpu":
        pytest.skip("the interpreter runs kernels on a CPU, and this process has an accelerator")
