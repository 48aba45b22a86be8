"""The gated delta rule in plain JAX: one token at a time, and many tokens as products of matrices.

Gated DeltaNet (Yang et al., arXiv:2412.06464). Each head has a state S [Hk, Hv], which maps keys to
values. A token with query q, key k, value v, log decay g and write strength beta does

    S <- exp(g) S
    S <- S + beta k (v - S^T k)^T        what S holds under k moves towards v
    z  = S^T q

Within a chunk of C tokens S need not be formed. The token t adds k_t u_t^T, which later tokens see
decayed, so the rows u_t of U [C, Hv] solve a triangular system,

    (I + A) U = diag(beta) (V - diag(d) K S),    A[t, s] = beta_t D[t, s] k_t^T k_s  for s < t,

where S is the state at the start, d[t] its decay up to t, and D[t, s] the decay from s to t. The
rest is products with S and U (arXiv:2406.06484, section 3; the decay as in arXiv:2412.06464).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels.exact import functions, sums
from kernels.exact.products import batched
from kernels.exact.total import total
from kernels.tracing.partition import vary_like

CHUNK = 64  # tokens at once: a power of two
# Stands for a log decay of -inf. Its exponential is 0 in float64 too, and 0 times it is not nan.
FORGET = -1e4

# Full precision on every device: the state is a long sum, and errors in the inverse would grow.
_product = partial(jnp.matmul, precision="highest")


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
    state, q, k, v, g, beta = _prepare(state, i, q, k, v, g, beta)
    # What the new state holds under q is read from the old one, together with what that holds under
    # k: one pass, after which the state can change in place. At 0 the old state may be nan, so
    # neither what is read from it counts, nor the gradients of k and q by it.
    read = jnp.where(i == 0, 0, jnp.stack([k, q], 1))
    product, rounded = (batched, sums.rounded) if exact else (_product, lambda x: x)
    inner = total(q * k)[:, None] if exact else (q * k).sum(1, keepdims=True)
    held, asked = jnp.moveaxis(product(read, state), 1, 0)
    decay = functions.exp(g) if exact else jnp.exp(g)

    def kept(x):
        return rounded(jnp.where(i == 0, 0, x * decay.reshape(g.shape + (1,) * (x.ndim - 1))))

    new = beta[:, None] * (v - kept(held))
    z = kept(asked) + rounded(inner * new)
    state = kept(state) + rounded(k[:, :, None] * new[:, None, :])
    return state, rounded(z.astype(dtype))


def chunk(state, i, q, k, v, g, beta):
    """T tokens of one sequence, equal to a scan of `step` up to rounding, and far faster.

    Tokens go through in chunks of 64, or of fewer where T is small. Gradients compute a chunk anew
    from the state at its start, so they keep one state a chunk.

    Args:
      state: [N, Hk, Hv], as in `step`.
      i: [T] integers, the positions. Padding, -1, may stand anywhere, and so may 0, at which a
        packed document begins.
      q, k: [T, N, Hk].
      v: [T, N, Hv].
      g, beta: [T, N].

    Returns:
      The state after the last token, and z [T, N, Hv] in the type of q.

    Raises:
      ValueError: as in `step`.
    """
    dtype, length = q.dtype, len(i)
    size = min(CHUNK, 1 << (length - 1).bit_length())
    state, *tokens = _prepare(state, i, q, k, v, g, beta)
    state = jnp.where(i[0] == 0, 0, state)

    def split(x):  # [T, N, ...] -> [T / C, N, C, ...]; zeros are padding
        x = jnp.pad(x, [(0, -length % size)] + [(0, 0)] * (x.ndim - 1))
        return jnp.moveaxis(x.reshape(-1, size, *x.shape[1:]), 1, 2)

    advance = jax.checkpoint(_advance, prevent_cse=False)
    state, z = jax.lax.scan(advance, vary_like(state, tokens), [split(x) for x in tokens])
    z = jnp.moveaxis(z, 2, 1)
    return state, z.reshape(-1, *z.shape[2:])[:length].astype(dtype)


def _prepare(state, i, q, k, v, g, beta):
    """All in the state's type. Padding becomes zeros, which change and read nothing."""
    heads, key_size, value_size = state.shape
    if jnp.finfo(state.dtype).bits < 32:
        raise ValueError(f"the state must be float32 or float64, but it is {state.dtype}.")
    tokens = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    sizes = {"q": (key_size,), "k": (key_size,), "v": (value_size,), "g": (), "beta": ()}
    for name, x in tokens.items():
        expected = (*i.shape, heads, *sizes[name])
        if x.shape != expected:
            raise ValueError(
                f"{name} must be {expected}, for positions of shape {i.shape} and a state of shape "
                f"{state.shape}, but it is {x.shape}."
            )
        real = (i >= 0).reshape(i.shape + (1,) * (x.ndim - i.ndim))
        tokens[name] = jnp.where(real, x.astype(state.dtype), 0)
    tokens["g"] = jnp.where((i == 0)[..., None], FORGET, jnp.maximum(tokens["g"], FORGET))
    return state, *tokens.values()


def _advance(state, tokens):
    """One chunk: q, k [N, C, Hk], v [N, C, Hv], g, beta [N, C] -> (state, z [N, C, Hv])."""
    q, k, v, g, beta = tokens
    size = g.shape[-1]
    # The log decay from s to t is g[s + 1] + ... + g[t], summed as such: the difference of two
    # running sums would lose the digits of a slow decay after a fast one.
    later = np.tri(size, k=-1, dtype=bool)  # [r, s]: r > s
    log_decay = _product(jnp.tri(size, dtype=g.dtype), jnp.where(later, g[..., None], 0))
    decay = jnp.tril(jnp.exp(log_decay))  # [N, C, C]
    from_start = jnp.exp(log_decay[..., :1] + g[..., :1, None])  # [N, C, 1]
    beta = beta[..., None]

    system = jnp.tril(beta * decay * _product(k, k.mT), -1)
    new = _product(_inverse(system), beta * (v - from_start * _product(k, state)))
    z = from_start * _product(q, state) + _product(decay * _product(q, k.mT), new)
    to_end = decay[..., -1, :, None]
    return from_start[..., -1:, :] * state + _product((to_end * k).mT, new), z


@jax.custom_jvp
def _inverse(a):
    """The inverse of I + a, for a [..., C, C] strictly lower triangular, C a power of two.

    By halves: [[P, 0], [R, Q]] has the inverse [[P', 0], [-Q' R P', Q']], where P' and Q' are the
    inverses of P and Q. It is as accurate as substitution, whereas the powers in the product
    (I - a)(I + a^2)(I + a^4)... overflow once keys are alike.
    """
    size = a.shape[-1]
    if size == 1:
        return jnp.ones_like(a)
    half = size // 2
    upper, lower = _inverse(jnp.stack([a[..., :half, :half], a[..., half:, half:]]))
    corner = -_product(_product(lower, a[..., half:, :half]), upper)
    top = jnp.concatenate([upper, jnp.zeros_like(upper)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, lower], -1)], -2)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -_product(_product(inverse, *tangents), inverse)
