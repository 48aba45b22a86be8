"""The gated delta rule for many tokens at once, as products of matrices; see `kernels.delta_rule`.

Within a chunk of C tokens the state S need not be formed. The token t adds k_t u_t^T, which later
tokens see decayed, so the rows u_t of U [C, Hv] solve a triangular system,

    (I + A) U = diag(beta) (V - diag(d) K S),    A[t, s] = beta_t D[t, s] k_t^T k_s  for s < t,

where S is the state at the start, d[t] its decay up to t, and D[t, s] the decay from s to t. The
rest is products with S and U (arXiv:2406.06484, section 3; the decay as in arXiv:2412.06464).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels.tracing.partition import vary_like

CHUNK = 64  # tokens at once: a power of two
# Stands for a log decay of -inf. Its exponential is 0 in float64 too, and 0 times it is not nan.
FORGET = -1e4

# Full precision on every device: the state is a long sum, and errors in the inverse would grow.
product = partial(jnp.matmul, precision="highest")


def chunk(state, i, q, k, v, g, beta):
    """T tokens of one sequence, equal to a scan of `step` up to rounding.

    Tokens go through in chunks of 64, or of fewer where T is small. Gradients compute a chunk anew
    from the state at its start, so they keep one state a chunk.

    Args:
      state: [N, Hk, Hv], as in `kernels.delta_rule.step`.
      i: [T] integers, the positions. Padding, -1, may stand anywhere, and so may 0, at which a
        packed document begins.
      q, k: [T, N, Hk].
      v: [T, N, Hv].
      g, beta: [T, N].

    Returns:
      The state after the last token, and z [T, N, Hv] in the type of q.

    Raises:
      ValueError: as in `kernels.delta_rule.step`.
    """
    dtype, length = q.dtype, len(i)
    size = min(CHUNK, 1 << (length - 1).bit_length())
    state, *tokens = prepare(state, i, q, k, v, g, beta)
    state = jnp.where(i[0] == 0, 0, state)

    def split(x):  # [T, N, ...] -> [T / C, N, C, ...]; zeros are padding
        x = jnp.pad(x, [(0, -length % size)] + [(0, 0)] * (x.ndim - 1))
        return jnp.moveaxis(x.reshape(-1, size, *x.shape[1:]), 1, 2)

    advance = jax.checkpoint(_advance, prevent_cse=False)
    state, z = jax.lax.scan(advance, vary_like(state, tokens), [split(x) for x in tokens])
    z = jnp.moveaxis(z, 2, 1)
    return state, z.reshape(-1, *z.shape[2:])[:length].astype(dtype)


def check(state, i, q, k, v, g, beta):
    """Raises ValueError unless everything fits together."""
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


def prepare(state, i, q, k, v, g, beta):
    """All in the state's type. Padding becomes zeros, which change and read nothing."""
    check(state, i, q, k, v, g, beta)
    tokens = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    for name, x in tokens.items():
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
    log_decay = product(jnp.tri(size, dtype=g.dtype), jnp.where(later, g[..., None], 0))
    decay = jnp.tril(jnp.exp(log_decay))  # [N, C, C]
    from_start = jnp.exp(log_decay[..., :1] + g[..., :1, None])  # [N, C, 1]
    beta = beta[..., None]

    system = jnp.tril(beta * decay * product(k, k.mT), -1)
    new = product(_inverse(system), beta * (v - from_start * product(k, state)))
    z = from_start * product(q, state) + product(decay * product(q, k.mT), new)
    to_end = decay[..., -1, :, None]
    return from_start[..., -1:, :] * state + product((to_end * k).mT, new), z


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
    corner = -product(product(lower, a[..., half:, :half]), upper)
    top = jnp.concatenate([upper, jnp.zeros_like(upper)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, lower], -1)], -2)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -product(product(inverse, *tangents), inverse)
