"""Every kernel of the launch table, compiled for each architecture on a machine without a GPU.

These are the tests of table, launches, resources and search.
"""

import itertools
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from kernels.blocks import Blocks
from kernels.operands import Shared, Where
from kernels.options import Options

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)

from kernels.backends.triton import attend, decode, product, search, table, write
from kernels.backends.triton.launches import Launch, launch, split_size
from kernels.backends.triton.resources import array_shapes, compiled, instructions, lower

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bfloat16", "float32")
WIDTHS = (32, 64, 128, 256)
# Beside (90, 128), which runs always; heads of 256 fit no launch of 80.
TF32 = [(a, H) for a in ARCHITECTURES for H in WIDTHS if (a, H) not in ((80, 256), (90, 128))]
B, T, N, K = 2, 1056, 8, 2


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def lower_training(architecture, H, dtype, HV=None, T=T, alibi=None, **choices):
    """Forward and backward of attention over packed documents."""
    options = Options(H**-0.5, **choices)

    def gradients(q, keys, values, q_positions, q_starts, alibi):
        def loss(*moving):
            where = Where(q_positions, q_starts=q_starts)
            z, _ = attend(*moving, where, Shared(alibi=alibi), options=options)
            return z.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(q, keys, values)

    q, keys = array(B, T, N, H, dtype=dtype), array(B, K, T, H, dtype=dtype)
    values = array(B, K, T, HV or H, dtype=dtype)
    arrays = (q, keys, values, array(B, T), array(B, T), alibi)
    return lower(gradients, *arrays, architecture=architecture)


def lower_reading(architecture, H, dtype, T, exact):
    """Attention with the cells split."""
    options = Options(H**-0.5, exact=exact)
    read = lambda q, k, v, i: attend(q, k, v, Where(i), Shared(), options=options)
    block = array(B, K, 8192, H, dtype=dtype)
    arrays = array(B, T, N, H, dtype=dtype), block, block, array(B, T)
    return lower(read, *arrays, architecture=architecture)


def lower_product(architecture, dtype):
    x, w = array(300, 768, dtype=dtype), array(768, 1000, dtype=dtype)
    return lower(product, x, w, architecture=architecture)


def lower_write(architecture, H, dtype):
    shapes = (B, K, 8192, H), (B, T), (B, K, T, H)
    block, cells, new = (
        array(*shape, dtype=d) for shape, d in zip(shapes, (dtype, jnp.int32, dtype), strict=True)
    )
    return lower(write, block, cells, new, architecture=architecture)


def lower_decode(architecture, H, dtype, HV=None, S=8192, **choices):
    sizes = H, HV or H
    block = tuple(array(B, 2, K, S, size, dtype=dtype) for size in sizes)
    cell = tuple(array(B, 1, K, size, dtype=dtype) for size in sizes)
    step = partial(decode, options=Options(H**-0.5, **choices))
    blocks = Blocks(block, array(), batched=True)
    arrays = (blocks, array(B, 1), cell, array(B, 1, N, H, dtype=dtype), Shared())
    return lower(step, *arrays, architecture=architecture)


@pytest.fixture
def report(record_property):
    """Hands what kernels ask of a GPU to tests/conftest.py, which prints it after the tests."""

    def write(kernels, H, dtype):
        for kernel in kernels:
            line = (
                f"{f'sm_{kernel.architecture}':>6} {dtype:8} H={H:3} {kernel.name:14} "
                f"warps {kernel.num_warps} registers {kernel.registers:3} stack {kernel.stack} "
                f"spills {kernel.spills} shared {kernel.shared:6} PTX {kernel.ptx_version}"
            )
            record_property("kernel", line)

    return write


def combinations(*values, every=2):
    """All combinations; without --thorough one of `every`."""
    for places in itertools.product(*(range(len(x)) for x in values)):
        marks = [pytest.mark.thorough] if (sum(places) + 1) % every else []
        yield pytest.param(*(x[n] for x, n in zip(values, places, strict=True)), marks=marks)


@pytest.mark.parametrize(
    ("architecture", "dtype", "H"), combinations(ARCHITECTURES, DTYPES, WIDTHS, every=4)
)
def test_shipped_kernels_fit(architecture, dtype, H, report):
    kernels = compiled(lower_training(architecture, H, dtype))
    kernels += compiled(lower_decode(architecture, H, dtype))
    kernels += compiled(lower_write(architecture, H, dtype))
    kernels += compiled(lower_reading(architecture, H, dtype, T, exact=True))
    kernels += compiled(lower_product(architecture, dtype))
    report(kernels, H, dtype)
    names = ["forward", "dq", "dkdv", "decode", "combine", "write"]
    names += ["split", "product"]
    assert [kernel.name for kernel in kernels] == [f"{name}_kernel" for name in names]
    for kernel in kernels:
        assert search.misfit(kernel, dtype) is None, kernel.name
        assert kernel.ptx_version <= 8.8, kernel.name
        assert kernel.registers * 32 * kernel.num_warps <= 65536, kernel.name
    if architecture == 90 and dtype == "bfloat16":
        assert all(instructions(kernel)["HGMMA"] for kernel in kernels[6:])  # split, product
        # At 256 the two gradients of a tile of 64 keys would not fit the registers.
        assert instructions(kernels[2])["HGMMA"] or H == 256


@pytest.mark.parametrize(
    ("architecture", "dtype", "H"), combinations(ARCHITECTURES, DTYPES, WIDTHS, every=12)
)
def test_what_reads_few_queries_fits(architecture, dtype, H, report):
    kernels = compiled(lower_reading(architecture, H, dtype, 16, exact=False))
    report(kernels, H, dtype)
    assert [kernel.name for kernel in kernels] == ["split_kernel", "merge_kernel"]
    if (architecture, dtype, H) == (100, "float32", 256):
        # No launch that was tried holds all of it; a few values wait on the stack.
        assert all(kernel.stack <= 24 for kernel in kernels)
        return
    for kernel in kernels:
        assert search.misfit(kernel, dtype) is None, kernel.name


@pytest.mark.parametrize(("architecture", "dtype"), combinations(ARCHITECTURES, DTYPES, every=3))
def test_latent_attention_fits(architecture, dtype, report):
    """Keys of 192 and values of 128 for many tokens; for one, cells of 576 of which 512 are values.

    These are the sizes of DeepSeek-V2 (arXiv:2405.04434, section 3.1.2).
    """
    training = compiled(lower_training(architecture, 192, dtype, HV=128))
    fits = (architecture, dtype) != (80, "float32")
    step = compiled(lower_decode(architecture, 576, dtype, HV=512)) if fits else []
    report(training, 192, dtype)
    report(step, 576, dtype)
    for kernel in (*training, *step):
        assert kernel.shared <= search.SHARED[architecture], kernel.name
        # As below, a few values may wait on the stack; with triton 3.6.0 they take 40 bytes.
        assert kernel.stack <= 40, kernel.name


@pytest.mark.parametrize(
    ("architecture", "H"),
    [(90, 128), *(pytest.param(a, H, marks=pytest.mark.thorough) for a, H in TF32)],
)
def test_float32_as_jax_multiplies_it(architecture, H, report):
    """By default on tensor cores, as XLA's own products on a GPU."""
    with jax.default_matmul_precision("default"):
        kernels = compiled(lower_training(architecture, H, "float32"))
        kernels += compiled(lower_decode(architecture, H, "float32"))
        kernels += compiled(lower_reading(architecture, H, "float32", T, True))
        kernels += compiled(lower_product(architecture, "float32"))
        report(kernels, H, "tf32")
        for kernel in kernels:
            assert search.misfit(kernel, "float32") is None, kernel.name
    instruction = "HGMMA" if architecture == 90 else "HMMA"
    if architecture < 100:
        assert instructions(kernels[0])[instruction]


def test_heads_too_large_for_the_kernels():
    with pytest.raises(NotImplementedError, match="up to 256 for several tokens; got 576"):
        lower_training(90, 576, "bfloat16", HV=512)
    with pytest.raises(NotImplementedError, match="up to 1024 for one token; got 1032"):
        lower_decode(90, 64, "bfloat16", HV=1032)
    with pytest.raises(NotImplementedError, match="'decode' with float32 heads of 576 numbers"):
        lower_decode(80, 576, "float32", HV=512)


def test_a_head_size_that_is_not_a_multiple_of_8():
    """Many tokens read copies that are filled up; one token would read in place, which spills."""
    kernels = compiled(lower_training(90, 65, "bfloat16"))
    assert all(search.misfit(kernel, "bfloat16") is None for kernel in kernels)
    with pytest.raises(NotImplementedError, match=r"65 and 65 numbers .* multiples of 8"):
        lower_decode(90, 65, "bfloat16")


def test_every_option_at_once_compiles(report):
    """Window, soft cap, starts and ALiBi together, and a head size that is not a power of two."""
    alibi = array(N, dtype=jnp.float32)
    lowered = lower_training(90, 80, "float16", alibi=alibi, window=300, soft_cap=30.0)
    kernels = compiled(lowered) + compiled(lower_decode(90, 80, "float16", S=512, window=512))
    report(kernels, 80, "float16")
    # A few values that the loops do not touch may wait on the stack; a spill inside would be more.
    assert all(kernel.stack <= 32 for kernel in kernels)


@pytest.mark.parametrize("blocks", [1, 90, 2048, 5000])
def test_splits_for_any_number_of_blocks(blocks):
    size = split_size(90, blocks, 4096)
    assert size == 4096 or blocks * 4096 / size <= 2048


def test_no_array_of_queries_by_keys():
    """A training step lowers to the three kernels, and its arrays grow linearly in T."""
    lowered = lower_training(90, 64, "bfloat16")
    assert lowered.as_text().count("@triton_kernel_call") == 3
    shapes = array_shapes(lowered)
    assert (B, T, N, 64) in shapes
    assert not any(shape.count(T) > 1 for shape in shapes)


def test_decode_updates_the_blocks_in_place():
    """The kernel's results are its operands' buffers, and no other operand is a block."""
    text = lower_decode(90, 64, "bfloat16").as_text()
    call = next(line for line in text.splitlines() if "@triton_kernel_call" in line)
    aliases = call[call.index("output_operand_aliases") :]
    for i in range(2):
        assert f"output_tuple_indices = [{i}], operand_index = {i}" in aliases
    block = f"tensor<{B}x2x{K}x8192x64xbf16>"
    operands = call[call.rindex(": (") : call.rindex("->")]
    assert operands.count(block) == 2


@pytest.mark.parametrize("architecture", [75, 103])
def test_unknown_architecture(architecture):
    with pytest.raises(NotImplementedError, match="compute capability"):
        launch("forward", architecture, 64, jnp.bfloat16)


def test_without_a_gpu_and_without_a_target():
    if jax.default_backend() == "gpu":
        pytest.skip("this process has a GPU")
    x = jnp.zeros((1, 1, 1, 32))
    with pytest.raises(NotImplementedError, match="runs on CUDA GPUs, and this is a cpu"):
        attend(x, x, x, Where(jnp.zeros((1, 1), jnp.int32)), Shared(), options=Options(1.0))


def test_the_table_is_as_the_search_writes_it():
    assert pathlib.Path(table.__file__).read_text().endswith(search.render(table.TABLE))


def test_the_search_takes_the_first_launch_that_fits(capsys):
    """The first would hold 128 x 256 sums, among others, in the registers of four warps."""
    launches = [Launch(128, 64, 4, 1), Launch(64, 32, 4, 1), Launch(32, 32, 4, 1)]
    ((taken, kernel),) = search.fitting("forward", 90, "bfloat16", 256, launches)
    assert taken == launches[1]
    assert kernel.name == "forward_kernel"
    assert search.misfit(kernel, "bfloat16") is None
    assert "spilled" in capsys.readouterr().out
