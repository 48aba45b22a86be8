"""The public attention op, and the choice of the backend that runs it."""

import importlib

import jax
import jax.numpy as jnp

from kernels.options import Options

BACKENDS = {"reference": "kernels.reference", "xla": "kernels.xla"}


def backend_module(backend: str):
    """The module that implements a backend; "auto" is the best one for the platform.

    Raises:
      ValueError: `backend` is not one of `BACKENDS`.
    """
    if backend == "auto":
        backend = "xla"
    if backend not in BACKENDS:
        raise ValueError(
            f"attention backend {backend!r} does not exist; choose one of "
            f"{', '.join(['auto', *BACKENDS])}."
        )
    return importlib.import_module(BACKENDS[backend])


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    q_starts: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    alibi: jax.Array | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
):
    """Causal attention by position: a query at position i reads the keys at start..i.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H]; N must be a multiple of K.
      q_positions: [B or 1, T] int32; None: 0..T-1. Negative marks padding, which reads nothing.
      kv_positions: [B or 1, S] int32; None: 0..S-1. Negative marks an empty cell.
      q_starts: [B or 1, T] int32, the first position a query may read; None: 0.
      window: a query sees its last `window` positions, its own included; None: all.
      soft_cap: cap * tanh(score / cap) on the scaled scores; None: off.
      sinks: [N] logits that join the softmax's denominator; None: none.
      alibi: [N] slopes, score -= slope * (i - p); constants, without a gradient.
      scale: factor on q.k; None: 1/sqrt(H).
      backend: "auto" or one of `BACKENDS`.
      return_lse: also return the log-sum-exp of the scores, [B, T, N] float32.

    Returns:
      z [B, T, N, H] in q's dtype (zero where a query reads nothing), or (z, lse).

    Raises:
      ValueError: the shapes do not fit together, or the backend is unknown.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"attention takes q [B, T, N, H] and k, v [B, S, K, H]; got q {q.shape}, k {k.shape}, "
            f"v {v.shape}."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads: "
            "the first must be a multiple of the second."
        )
    if q_positions is None:
        q_positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    options = Options(q.shape[-1] ** -0.5 if scale is None else scale, window, soft_cap)
    z, lse = backend_module(backend).attend(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        q_positions,
        kv_positions,
        q_starts,
        sinks,
        alibi,
        options=options,
    )
    return (z, lse) if return_lse else z
