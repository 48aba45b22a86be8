"""The platform that a computation is traced for: that of this process, or one that is named."""

import contextlib
import contextvars
from typing import NamedTuple

import jax

PLATFORMS = ("cpu", "gpu", "tpu")


class _Target(NamedTuple):
    platform: str
    architecture: int | None


_target = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(platform: str, architecture: int | None = None):
    """Traces and lowers for a device that is not there, so that a CPU host can do it.

    It is read while tracing: a function that `jit` has traced before keeps its target.

    Args:
      platform: one of `PLATFORMS`.
      architecture: ten times the compute capability of a CUDA GPU: 80, 90, 100, ...; None for any
        other platform.

    Raises:
      ValueError: the platform does not exist, or the architecture does not go with it.
    """
    if platform not in PLATFORMS or (platform == "gpu") != (architecture is not None):
        raise ValueError(
            f"target({platform!r}, {architecture}) does not exist; choose 'cpu', 'tpu', or 'gpu' "
            "with ten times its compute capability, as in target('gpu', 90)."
        )
    token = _target.set(_Target(platform, architecture))
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """The platform that `target` set, or else the one that this process runs on."""
    if _target.get() is not None:
        return _target.get().platform
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def architecture() -> int:
    """Ten times the compute capability of the CUDA GPU that is traced for.

    Raises:
      NotImplementedError: the platform is not a CUDA GPU.
    """
    if platform() == "gpu":
        if _target.get() is not None:
            return _target.get().architecture
        capability = jax.local_devices()[0].compute_capability
        if capability.replace(".", "").isdigit():
            return round(10 * float(capability))
        raise NotImplementedError(f"it runs on CUDA GPUs, and this one is {capability}.")
    raise NotImplementedError(
        f"it runs on CUDA GPUs, and this is a {platform()}; to lower for a GPU that is not there, "
        "trace under kernels.tracing.target.target('gpu', 90)."
    )
