"""What the kernels in a lowered function cost a GPU, found without one.

`compiled` assembles the very PTX that the program would hand to the driver, with the assembler that
comes with triton.
"""

import pathlib
import re
import subprocess
import tempfile
import zlib
from typing import NamedTuple

import jax
import triton

_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Kernel(NamedTuple):
    """One compiled kernel.

    Bytes of shared memory per program, of stack and local memory per thread; registers per thread;
    spills: instructions that move a register to local memory or back.
    """

    name: str
    architecture: int
    num_warps: int
    ptx_version: float
    registers: int
    shared: int
    stack: int
    local: int
    spills: int
    instructions: frozenset


def compiled(lowered: jax.stages.Lowered) -> list[Kernel]:
    """Assembles the Triton kernels of a function lowered for CUDA, each once, in order of calls."""
    return [_assemble(*kernel) for kernel in dict.fromkeys(_kernels(lowered))]


def _kernels(lowered):
    """(name, warps, bytes of shared memory, PTX, architecture) of each custom call."""
    for operation in _operations(lowered.compiler_ir("stablehlo").operation):
        attributes = operation.attributes
        if operation.name != "stablehlo.custom_call":
            continue
        if "triton_kernel_call" not in str(attributes["call_target_name"]):
            continue
        call = _fields(zlib.decompress(attributes["backend_config"].value_bytes))
        kernel = _fields(_fields(call[1])[1])
        yield kernel[1].decode(), kernel[2], kernel[3], kernel[4].decode(), kernel[6]


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
    assembler = "ptxas-blackwell" if architecture >= 100 else "ptxas"
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = f"{folder}/kernel.ptx", f"{folder}/kernel.cubin"
        pathlib.Path(source).write_text(ptx)
        _tool(assembler, f"-arch={target}", source, "-o", cubin)
        usage = _tool("cuobjdump", "-res-usage", cubin)
        assembly = _tool("cuobjdump", "-sass", cubin)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?(\w+)", assembly, re.MULTILINE)
    return Kernel(
        name=name,
        architecture=architecture,
        num_warps=num_warps,
        ptx_version=float(re.search(r"\.version ([\d.]+)", ptx)[1]),
        registers=usage["REG"],
        shared=shared,
        stack=usage["STACK"],
        local=usage["LOCAL"],
        spills=sum(name in ("STL", "LDL") for name in instructions),
        instructions=frozenset(instructions),
    )


def _tool(name, *arguments):
    result = subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr.strip()}")
    return result.stdout
