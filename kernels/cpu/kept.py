"""Machine code of kernels, kept where JAX keeps what it compiles, so that a start compiles none."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jaxlib

from kernels.cpu import code

_DIGEST = hashlib.sha256().digest_size


def machine_code(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make()` gives, or gave before in the same sources on a processor like this one.

    It is kept in the directory of JAX's persistent cache, where there is one.

    Args:
      name: of the kernel, which no other one has.
      make: compiles it.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder is None or not jax.config.jax_enable_compilation_cache:
        return make()
    path = Path(folder) / f"{name}_{_origin()}.o"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        digest, found = kept[:_DIGEST], kept[_DIGEST:]
        if hashlib.sha256(found).digest() == digest:
            return found
    made = make()
    with contextlib.suppress(OSError):  # without a place for it there is none
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        unfinished.write_bytes(hashlib.sha256(made).digest() + made)
        os.replace(unfinished, path)
    return made


@cache
def _origin():
    """A number for the sources of kernels and for what else machine code depends on."""
    number = hashlib.sha256(f"{jaxlib.__version__} {code.processor()}".encode())
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *(here.parent / "exact").glob("*.py")]):
        number.update(path.read_bytes())
    return number.hexdigest()[:32]
