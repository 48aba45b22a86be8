"""The one place that calls jax-triton."""

import jax
import jax_triton
import jax_triton.triton_lib as jt
import triton
from jax.interpreters import mlir
from jaxlib.mlir import ir

from kernels.tracing.partition import vary_like

# Triton writes PTX for the assembler it comes with, and the assembler that runs it may be older:
# that of JAX, or the driver's. With the older of Triton's two, PTX is 8.7 on every architecture.
triton.knobs.nvidia.ptxas_blackwell = triton.knobs.nvidia.ptxas.path


def call(
    kernel,
    *operands,
    outputs,
    programs,
    launch,
    architecture,
    aliases=None,
    contract=True,
    **constants,
):
    """Launches a Triton kernel on arrays, from inside a traced function.

    Args:
      kernel: a `triton.jit` function with parameters: operands, outputs, constants.
      *operands: arrays and Python integers; None stands for an array that the kernel does not
        look at.
      outputs: one `jax.ShapeDtypeStruct` for each output.
      programs: the number of programs, which form a one-dimensional grid.
      launch: a `launches.Launch`; its tiles become the constants BLOCK_M and BLOCK_N if the kernel
        has them.
      architecture: ten times the compute capability, or `launches.INTERPRETER`.
      aliases: {operand: output}, for those that share a buffer; only arrays are counted.
      contract: whether a product and the sum that it feeds may become one instruction, which rounds
        once; where they do is for the compiler to say.
      **constants: the kernel's compile-time constants.

    Returns:
      A list of the outputs.
    """
    tiles = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    arrays = [x for x in operands if isinstance(x, jax.Array)]
    results = jax_triton.triton_call(
        # Not the first array: if that is updated in place, a second use would make XLA copy it.
        *(arrays[-1] if x is None else x for x in operands),
        kernel=kernel,
        out_shape=outputs,
        grid=(programs,),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=architecture,
        enable_fp_fusion=contract,
        input_output_aliases=aliases,
        **{name: size for name, size in tiles.items() if name in kernel.arg_names},
        **constants,
    )
    return vary_like(results, arrays)


def _lower(ctx, *operands, **parameters):
    """jax-triton's lowering, with its call as one of XLA's FFI.

    The interface that jax-triton 0.3.1 calls stays outside of CUDA graphs, and hashes all of the
    kernel under a lock at each launch.
    """
    results = jt.triton_kernel_call_lowering(jt.get_cuda_backend, ctx, *operands, **parameters)
    attributes = results[0].owner.attributes
    attributes["call_target_name"] = ir.StringAttr.get("triton_kernel_call_ffi")
    attributes["mhlo.backend_config"] = ir.DictAttr.get({"opaque": attributes["backend_config"]})
    attributes["backend_config"] = ir.StringAttr.get("")
    attributes["api_version"] = mlir.i32_attr(1)  # as JAX has it beside a dictionary
    return results


mlir.register_lowering(jt.triton_kernel_call_p, _lower, platform="cuda")
