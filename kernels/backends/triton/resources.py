"""What a function asks of a CUDA GPU, found without one.

`compiled` assembles the very PTX that the program would hand to the driver, with the assembler that
comes with triton.
"""

import collections
import pathlib
import re
import subprocess
import tempfile
import zlib
from typing import NamedTuple

import jax
import triton

from kernels.tracing.target import target

_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Kernel(NamedTuple):
    """One compiled kernel.

    registers, stack (bytes) and spills (bytes moved to local memory and back) are of one thread,
    shared (bytes) of one program; cubin is the machine code.
    """

    name: str
    architecture: int
    num_warps: int
    ptx_version: float
    registers: int
    stack: int
    spills: int
    shared: int
    cubin: bytes


def lower(function, *arguments, architecture: int) -> jax.stages.Lowered:
    """Lowers a function for a CUDA GPU that need not be there.

    Args:
      function: jitted or not; it is traced anew.
      *arguments: arrays or `jax.ShapeDtypeStruct`s.
      architecture: as in `kernels.tracing.target.target`.
    """
    with target("gpu", architecture):
        # A new function, so that jit does not find an old trace, made for another target.
        traced = jax.jit(lambda *x: function(*x)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",))


def array_shapes(lowered: jax.stages.Lowered) -> set[tuple[int, ...]]:
    """The shapes of all arrays in a lowered function."""
    shapes = re.findall(r"tensor<([0-9x]*)x[a-z]", lowered.as_text())
    return {tuple(map(int, shape.split("x"))) for shape in shapes}


def compiled(lowered: jax.stages.Lowered, name: str | None = None) -> list[Kernel]:
    """Assembles the Triton kernels of a function lowered for CUDA, each once, in order of calls.

    name: assemble only the kernels of this name; None: all.
    """
    kernels = dict.fromkeys(_kernels(lowered))
    return [_assemble(*kernel) for kernel in kernels if name in (None, kernel[0])]


def instructions(kernel: Kernel) -> collections.Counter:
    """How often each machine instruction stands in a kernel, without its modifiers."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(kernel.cubin)
        listing = _tool("cuobjdump", "-sass", path)
    return collections.Counter(
        re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?(\w+)", listing, re.MULTILINE)
    )


def _kernels(lowered):
    """(name, warps, bytes of shared memory, PTX, architecture) of each custom call."""
    for operation in _operations(lowered.compiler_ir("stablehlo").operation):
        attributes = operation.attributes
        if operation.name != "stablehlo.custom_call":
            continue
        if "triton_kernel_call" not in str(attributes["call_target_name"]):
            continue
        config = attributes["mhlo.backend_config"]["opaque"]
        call = _fields(zlib.decompress(config.value_bytes))
        kernel = _fields(_fields(call[1])[1])
        shared = kernel.get(3, 0)  # fields that are zero are left out
        yield kernel[1].decode(), kernel[2], shared, kernel[4].decode(), kernel[6]


def _operations(operation):
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _fields(message):
    """The fields of a protocol buffer message by number, the last of each."""

    def number(at):
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    fields, at = {}, 0
    while at < len(message):
        tag, at = number(at)
        value, at = number(at)
        if tag & 7 == 2:  # bytes, preceded by their length; the rest of what is used are integers
            value, at = message[at : at + value], at + value
        fields[tag >> 3] = value
    return fields


def _assemble(name, num_warps, shared, ptx, architecture):
    machine = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(ptx)
        usage = _tool("ptxas", "-v", f"-arch={machine}", source, "-o", cubin)
        code = cubin.read_bytes()

    def used(what):
        return sum(map(int, re.findall(rf"(\d+) {what}", usage)))

    return Kernel(
        name=name,
        architecture=architecture,
        num_warps=num_warps,
        ptx_version=float(re.search(r"\.version ([\d.]+)", ptx)[1]),
        registers=int(re.search(r"Used (\d+) registers", usage)[1]),
        stack=used("bytes stack frame"),
        spills=used("bytes spill stores") + used("bytes spill loads"),
        shared=shared,
        cubin=code,
    )


def _tool(name, *arguments):
    result = subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr.strip()}")
    return result.stdout + result.stderr
