"""The platform that a computation is traced for."""

import jax
import pytest

from kernels.tracing.target import architecture, platform, target


def test_a_target_is_a_platform_and_its_architecture():
    with target("gpu", 90):
        assert (platform(), architecture()) == ("gpu", 90)
        with target("tpu"):
            assert platform() == "tpu"
            with pytest.raises(NotImplementedError, match="this is a tpu"):
                architecture()
        assert platform() == "gpu"
    assert platform() == jax.default_backend()
    for wrong in (("gpu",), ("tpu", 5), ("abacus",)):
        with pytest.raises(ValueError, match="choose 'cpu', 'tpu', or 'gpu'"), target(*wrong):
            pass
