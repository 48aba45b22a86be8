"""What the TPU kernel alone has to be asked; the rest is in tests/kernels/test_attention.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention


def test_documents_are_packed_in_up_to_32768_cells():
    q, k = jnp.zeros((1, 1, 1, 32)), jnp.zeros((1, 32769, 1, 32))
    with pytest.raises(NotImplementedError, match="up to 32768 cells; got 32769"):
        attention(q, k, k, q_starts=np.zeros((1, 1), np.int32), backend="splash_interpret")
