"""Machine code that is kept is what was compiled, and is compiled anew where it is damaged."""

import ctypes

import jax
import pytest
from llvmlite import ir

from kernels.cpu import code, kept


@pytest.fixture
def compile_three_more():
    """Compiles a function that adds three, and counts how often."""
    made = []

    def make():
        module = ir.Module("test")
        code.function(module, "three_more", lambda _, x: x + 3)
        made.append(code.machine_code(module))
        return made[-1]

    make.made = made
    return make


def test_a_kernel_is_compiled_once_and_anew_where_it_is_damaged(cache_dir, compile_three_more):
    found = [kept.machine_code("three_more", compile_three_more) for _ in range(2)]
    assert found == compile_three_more.made * 2
    address = code.linked(found[1], "three_more")
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(4) == 7
    [path] = cache_dir.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert kept.machine_code("three_more", compile_three_more) == found[0]
    assert len(compile_three_more.made) == 2


def test_nothing_is_kept_without_a_place(cache_dir, compile_three_more):
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "missing"))
    for _ in range(2):
        kept.machine_code("three_more", compile_three_more)
    assert len(compile_three_more.made) == 2 and not list(cache_dir.iterdir())
