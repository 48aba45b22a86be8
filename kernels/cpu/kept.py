"""What is made at a start and kept for the next, in the directory of JAX's persistent cache."""

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
_KERNELS = Path(__file__).parents[1]


def machine_code(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make()` gives, or gave before in the same sources on a processor like this one.

    Args:
      name: of the kernel, which no other one has.
      make: compiles it.
    """
    content = found_machine_code(name)
    return keep(_file(name), make()) if content is None else content


def found_machine_code(name: str) -> bytes | None:
    """The machine code of a kernel if it is kept, else None."""
    return found(_file(name))


def keep(file_name: str, content: bytes) -> bytes:
    """Keeps something, where there is a place for it, and returns it.

    Args:
      file_name: says all that it depends on.
      content: takes the place of what is there.
    """
    path = _path(file_name)
    with contextlib.suppress(OSError):  # without a place for it there is none
        if path is not None:
            unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            unfinished.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(unfinished, path)
    return content


def found(file_name: str) -> bytes | None:
    """What is kept under a name; None if there is nothing, or it is damaged."""
    path = _path(file_name)
    with contextlib.suppress(OSError):
        content = path.read_bytes() if path is not None else b""
        if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            return content[_DIGEST:]
    return None


def origin(*folders: Path) -> str:
    """A number for the sources in some folders, and for the processor and JAX's version."""
    number = hashlib.sha256(f"{jax.__version__} {jaxlib.__version__} {code.processor()}".encode())
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            number.update(path.read_bytes())
    return number.hexdigest()[:32]


def _file(kernel):
    return f"{kernel}_{_origin()}.o"


@cache
def _origin():
    return origin(_KERNELS / "cpu", _KERNELS / "exact")


def _path(file_name):
    folder = jax.config.jax_compilation_cache_dir
    if folder is None or not jax.config.jax_enable_compilation_cache:
        return None
    return Path(folder) / file_name
