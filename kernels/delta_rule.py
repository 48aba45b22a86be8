"""The gated delta rule: tokens one after the other, or in chunks, whichever is faster here.

Gated DeltaNet (Yang et al., arXiv:2412.06464). Each head has a state S [Hk, Hv], which maps keys to
values. A token with query q, key k, value v, log decay g and write strength beta does

    S <- exp(g) S
    S <- S + beta k (v - S^T k)^T        what S holds under k moves towards v
    z  = S^T q

A kernel of a CPU keeps a state in a near cache and takes token after token, in less time than the
products of chunks need there. Elsewhere many tokens run in chunks; in exact numerics one by one.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from kernels.blocks import Blocks
from kernels.cpu.delta_rule import delta_rule as on_cpu
from kernels.cpu.delta_rule_gradient import gradients as gradients_on_cpu
from kernels.delta_chunks import check, chunk, prepare, product
from kernels.dot import has_kernel
from kernels.exact import functions, sums
from kernels.exact.products import batched
from kernels.exact.total import total
from kernels.tracing import primitive
from kernels.tracing.linear import linear_call
from kernels.tracing.partition import vary_like


def run(state, i, q, k, v, g, beta, exact=False):
    """T tokens of one sequence, in the fastest way that there is here.

    Args:
      state, i, q, k, v, g, beta: as in `kernels.delta_chunks.chunk`.
      exact: whether the bits of a token are the same whatever runs beside it.

    Returns:
      The state after the last token, and z [T, N, Hv] in the type of q.

    Raises:
      ValueError: as in `step`.
    """
    operands = state, i, q, k, v, g, beta
    if has_kernel_for(state.dtype):
        check(*operands)
        return tuple(delta_rule_p.bind(*vary_like(operands, operands)))
    if len(i) == 1:
        state, z = step(state, *(x[0] for x in operands[1:]), exact)
        return state, z[None]
    if exact:
        return jax.lax.scan(lambda state, token: step(state, *token, exact), state, operands[1:])
    return chunk(*operands)


def has_kernel_for(dtype) -> bool:
    """Whether a kernel of a CPU runs tokens on states of this type."""
    return has_kernel() and dtype == jnp.float32


def in_place(blocks: Blocks, i, q, k, v, g, beta):
    """`run` by the kernel, for B sequences whose states change where they lie; without a gradient.

    Args:
      blocks: of states.
      i: [B, T]. All others have these leading axes, too.

    Returns:
      The arrays of the blocks, and z.
    """
    wide = lambda x: x.astype(jnp.float32)
    decay = jnp.where((i == 0)[..., None], 0, functions.exp(wide(g)))
    arrays, z = on_cpu(blocks, i.astype(jnp.int32), *map(wide, (q, k, v, decay, beta)))
    return arrays, sums.rounded(z.astype(q.dtype))


def step(state, i, q, k, v, g, beta, exact=False):
    """Writes one token into the state and reads what the state then holds: the definition.

    Args:
      state: [N, Hk, Hv], float32 or float64, in which everything is computed.
      i: scalar integer, the position of the token. A token at 0 begins from a state of zeros; -1 is
        padding, which leaves the state as it was and reads zeros.
      q, k: [N, Hk]. The rule is stable for keys of length 1 at most; normalising is the caller's,
        and so is the scale of q.
      v: [N, Hv].
      g: [N], the logarithm of the decay, from -inf (the state is forgotten) to 0 (it is kept).
      beta: [N], the write strength, in [0, 1].
      exact: whether the bits are the same whatever runs beside it.

    Returns:
      The new state, and z [N, Hv] in the type of q.

    Raises:
      ValueError: shapes do not fit together, or the state is narrower than float32.
    """
    dtype = q.dtype
    state, q, k, v, g, beta = prepare(state, i, q, k, v, g, beta)
    # What the new state holds under q is read from the old one, together with what that holds under
    # k: one pass, after which the state can change in place. At 0 the old state may be nan, so
    # neither what is read from it counts, nor the gradients of k and q by it.
    read = jnp.where(i == 0, 0, jnp.stack([k, q], 1))
    multiply, rounded = (batched, sums.rounded) if exact else (product, lambda x: x)
    inner = total(q * k)[:, None] if exact else (q * k).sum(1, keepdims=True)
    held, asked = jnp.moveaxis(multiply(read, state), 1, 0)
    decay = functions.exp(g) if exact else jnp.exp(g)

    def kept(x):
        return rounded(jnp.where(i == 0, 0, x * decay.reshape(g.shape + (1,) * (x.ndim - 1))))

    new = beta[:, None] * (v - kept(held))
    z = kept(asked) + rounded(inner * new)
    state = kept(state) + rounded(k[:, :, None] * new[:, None, :])
    return state, rounded(z.astype(dtype))


# Primitives, so that sequences which are mapped are parts of one call: their axes come first in all
# operands and results.


def _run(state, *tokens):
    """`run`, by the kernel."""
    i, v = tokens[0], tokens[3]
    joined = map(partial(_join, i.ndim - 1), tokens)
    state, z = in_place(Blocks(state, batched=i.ndim > 1), *joined)
    return [state, z.reshape(v.shape)]


def _run_gradient(state, i, q, k, v, g, beta, dstate, dz):
    """The gradients of all operands but i, by their kernel."""
    moving, join = (state, q, k, v, g, beta), partial(_join, i.ndim - 1)
    i, dstate, dz = map(join, (i, dstate, dz.astype(dstate.dtype)))
    state, q, k, v, g, beta = jax.vmap(prepare)(join(state), i, *map(join, (q, k, v, g, beta)))
    state = jnp.where((i[:, 0] == 0)[:, None, None, None], 0, state)
    real = (i >= 0)[..., None]
    dz = jnp.where(real[..., None], dz, 0)
    *others, of_g, of_beta = gradients_on_cpu(state, q, k, v, jnp.exp(g), beta, dstate, dz)
    results = *others, jnp.where(real, of_g, 0), of_beta
    return [x.reshape(y.shape).astype(y.dtype) for x, y in zip(results, moving, strict=True)]


def _join(count, x):
    """x with one axis in place of the first `count`."""
    return x.reshape(math.prod(x.shape[:count]), *x.shape[count:])


def _chunks(*operands):
    """`chunk`, for sequences of any number of axes."""
    function = chunk
    for _ in operands[1].shape[1:]:
        function = jax.vmap(function)
    return function(*operands)


def _jvp(fun, primals, moving, tangents):
    """Gradients are those of their kernel, and tangents those of chunks: they have no order."""
    del fun

    def tangent(primals, tangents):
        return primitive.jvp_of_moving(_chunks, primals, moving, tangents)[1]

    def transpose(primals, cotangents):
        of_state, *of_tokens = delta_rule_gradient_p.bind(*primals, *cotangents)
        every = of_state, None, *of_tokens
        return [every[n] for n in moving]

    results = delta_rule_p.bind(*primals)
    return results, linear_call(tangent, transpose, list(primals), tangents, tuple(results))


def _gradient_jvp(fun, primals, moving, tangents):
    """How gradients change is left to those of chunks."""
    del fun

    def by_chunks(state, i, *others):
        *tokens, dstate, dz = others
        _, pull = jax.vjp(lambda state, *tokens: _chunks(state, i, *tokens), state, *tokens)
        return pull((dstate, dz))

    _, changes = primitive.jvp_of_moving(by_chunks, primals, moving, tangents)
    return delta_rule_gradient_p.bind(*primals), list(changes)


delta_rule_p = primitive.define(
    "delta_rule", _run, lambda *args: primitive.in_front(delta_rule_p, *args), _jvp
)
delta_rule_gradient_p = primitive.define(
    "delta_rule_gradient",
    _run_gradient,
    lambda *args: primitive.in_front(delta_rule_gradient_p, *args),
    _gradient_jvp,
)
