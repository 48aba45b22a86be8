"""Searches launches for the table, offline.

    python -m kernels.backends.triton.search --architecture=90 --dtype=bfloat16 --width=128

Without a GPU a launch is judged by what its machine code asks for: no stack, no spilled registers,
shared memory that is there, and Hopper's matrix instruction on sm_90. Of those that fit, the one
that moves the least memory for what it computes is the best: large tiles, then a deep pipeline. On
a GPU of the architecture, --time runs those that fit and takes the fastest.

It judges by the compiler at hand; what is shipped fits other versions too, so that entries of the
table may be smaller than what it finds.
"""

import argparse
import itertools
import pathlib
import statistics
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from kernels.backends.triton import attend, decode, table
from kernels.backends.triton.launches import Launch, bits, trial
from kernels.backends.triton.resources import Kernel, compiled, instructions, lower
from kernels.blocks import Blocks
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.target import architecture as this_architecture

KERNELS = ("forward", "dq", "dkdv", "split", "decode")
# Shared memory that one program can have, in bytes; the entries of 80 also serve 86, 89 and 120.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
TILES = (16, 32, 64, 128)
B, N, K = 2, 16, 4
LENGTH, CELLS = 4096, 32768
CALLS = 20  # timed together: one alone is mostly the time of starting it


def candidates(kernel: str) -> list[Launch]:
    """Launches to try, the most promising first."""
    # Of decode the tile of queries is the group of heads; those of split are few.
    keep_m = {"decode": (16,), "split": (64, 32, 16)}.get(kernel, TILES)
    every = itertools.product(keep_m, TILES, (8, 4), (3, 2, 1))
    return sorted((Launch(*c) for c in every), key=_promise, reverse=True)


def _promise(launch):
    area = launch.block_m * launch.block_n
    return area, min(launch.block_m, launch.block_n), launch.num_stages, launch.num_warps


def misfit(found: Kernel, dtype) -> str | None:
    """Why a kernel cannot be shipped; None if it can."""
    if found.stack or found.spills:
        return f"{found.stack} bytes of stack, {found.spills} spilled"
    if found.shared > SHARED[found.architecture]:
        return f"{found.shared} bytes of shared memory"
    matrices = found.name in ("forward_kernel", "dq_kernel") and bits(dtype) < 32
    if found.architecture == 90 and matrices and not instructions(found)["HGMMA"]:
        return "no HGMMA"
    return None


def fitting(kernel: str, architecture: int, dtype, width: int, launches, limit: int = 1):
    """The first `limit` launches that fit, each with what it asks for: [(launch, Kernel)]."""
    found = []
    function, arrays = _program(kernel, dtype, width)
    for launch in launches:
        with trial(kernel, launch):
            try:
                lowered = lower(function, *arrays, architecture=architecture)
                (one,) = compiled(lowered, f"{kernel}_kernel")
            except (RuntimeError, ValueError) as error:  # the assembler, or a pass, gave up
                print(f"  {tuple(launch)}: {str(error).splitlines()[0]}")
                continue
        reason = misfit(one, dtype)
        print(f"  {tuple(launch)}: {reason or f'{one.registers} registers'}", flush=True)
        if reason is None:
            found.append((launch, one))
            if len(found) == limit:
                break
    return found


def seconds(kernel: str, dtype, width: int, launch: Launch, repeats: int = 10) -> float:
    """Time of the program that holds a kernel, on this machine's GPU."""
    function, shapes = _program(kernel, dtype, width)
    arrays = [_fill(x) for x in shapes]
    kept = 2 if kernel == "decode" else 0  # the blocks, which change in place
    with trial(kernel, launch):
        program = jax.jit(lambda *x: function(*x), donate_argnums=tuple(range(kept)))
        program = program.lower(*arrays).compile()
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for _ in range(CALLS):
            results = jax.tree.leaves(program(*arrays))
            arrays[:kept] = results[:kept]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times[1:])


def _fill(x):
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=x.dtype), x.shape)
    return jax.random.normal(jax.random.key(0), x.shape, x.dtype)


def _program(kernel, dtype, width):
    """A function that runs the kernel, and the shapes of its operands."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    positions = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    options = Options(width**-0.5)
    if kernel == "decode":
        blocks, q, new = array(B, K, CELLS, width), array(B, 1, N, width), array(B, 1, K, width)
        last = jnp.full((1, 1), CELLS - 1, jnp.int32)

        def step(keys, values, k, v, q):
            blocks = Blocks((keys, values), batched=True)
            (keys, values), z = decode(blocks, last, (k, v), q, Shared(), options=options)
            return keys, values, z

        return step, (blocks, blocks, new, new, q)
    q, block = array(B, LENGTH, N, width), array(B, K, LENGTH, width)

    # Split in its larger form, in which a program merges all that it reads.
    options = replace(options, exact=kernel == "split")

    def forward(q, keys, values, positions):
        return attend(q, keys, values, Where(positions), Shared(), options=options)[0]

    def backward(q, keys, values, positions):
        z, pull = jax.vjp(partial(forward, positions=positions), q, keys, values)
        return pull(z)

    run = forward if kernel in ("forward", "split") else backward
    return run, (q, block, block, positions)


def render(entries: dict) -> str:
    """The text of the table: {(architecture, bits, width): {kernel: launch}}."""
    lines = ["TABLE = {"]
    for key, row in sorted(entries.items()):
        lines.append(f"    {key}: {{")
        lines += [f'        "{k}": {tuple(row[k])},' for k in KERNELS if k in row]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, required=True, choices=sorted(SHARED))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--precision", default="highest", choices=["highest", "tensorfloat32"])
    parser.add_argument("--width", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--kernel", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--time", type=int, default=0, help="time so many that fit, on this GPU")
    parser.add_argument(
        "--write", action="store_true", help="write kernels/backends/triton/table.py"
    )
    args = parser.parse_args()
    if args.time:
        try:
            here = this_architecture()
        except NotImplementedError as error:
            parser.error(f"--time: {error}")
        if here != args.architecture:
            parser.error(f"--time: this GPU is of architecture {here}.")
    jax.config.update("jax_default_matmul_precision", args.precision)
    entries = {key: dict(row) for key, row in table.TABLE.items()}
    for width, kernel in itertools.product(args.width, args.kernel):
        print(f"sm_{args.architecture} {args.dtype} width {width} {kernel}")
        search = partial(fitting, kernel, args.architecture, args.dtype, width)
        found = [launch for launch, _ in search(candidates(kernel), max(1, args.time))]
        if args.time:
            timed = [(seconds(kernel, args.dtype, width, launch), launch) for launch in found]
            for duration, launch in sorted(timed):
                print(f"  {tuple(launch)}: {duration * 1e6:.0f} us")
            found = [launch for _, launch in sorted(timed)]
        if found:
            key = args.architecture, bits(args.dtype), width
            entries.setdefault(key, {})[kernel] = found[0]
            print(f"  -> {tuple(found[0])}")
    if args.write:
        path = pathlib.Path(table.__file__)
        path.write_text(path.read_text().split("TABLE = ")[0] + render(entries))


if __name__ == "__main__":
    main()
