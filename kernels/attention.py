"""Attention for everyone to call: one meaning, which several backends compute."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.backends.choice import attend
from kernels.operands import Shared, Where
from kernels.options import Options


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    kv_length: jax.Array | int | None = None,
    q_starts: jax.Array | None = None,
    segments: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    alibi: jax.Array | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
):
    """Causal attention by position: a query at position i reads the keys at start..i.

    Differentiable in q, k, v and sinks: in reverse mode, and with the backends "xla" and
    "reference" in forward mode too (jax.jvp, jax.linearize, Hessian-vector products).

    Args:
      q: [B, T, N, H] floating.
      k, v: [B, S, K, H] and [B, S, K, Hv]; N must be a multiple of K. The heads of keys and values
        may have different sizes, as in latent attention (arXiv:2405.04434). What cells hold that no
        query sees changes nothing, as long as it is finite: most backends multiply it by 0.
      q_positions: [B or 1, T] integers, the position of each query; by default 0..T-1. A negative
        position marks padding, which reads nothing.
      kv_positions: [B or 1, S] integers, the position of each key; by default 0..S-1. A negative
        position marks an empty cell.
      kv_length: one integer, or [B] of them, one per row: the cells from this one on are empty. By
        default none is.
      q_starts: [B or 1, T] integers, the first position that each query may read; by default 0.
      segments: the ids of documents that are packed one after another, as a pair of arrays
        [B or 1, T] for queries and [B or 1, S] for keys, or as one array for both if T = S. A query
        then reads only the document in which its own position lies. Keys must lie in the order of
        their positions, and neither q_starts nor kv_positions may be given. By default all is one
        document.
      window: how many positions a query sees, its own included; by default all.
      soft_cap: if given, a scaled score becomes soft_cap * tanh(score / soft_cap).
      sinks: [N] logits that join the softmax's denominator, one per query head; by default none.
      alibi: [N] slopes (arXiv:2108.12409): slope * (i - p) is taken from the score of a query at i
        and a key at p. They are constants and have no gradient.
      scale: the factor on q.k, which must be above 0; by default 1 / sqrt(H).
      backend: "auto" or one of `kernels.backends.choice.BACKENDS`.
      return_lse: whether to return the log-sum-exp of the scores too.

    Returns:
      z [B, T, N, Hv] in q's dtype, zero where a query reads nothing; or (z, lse) with lse
      [B, T, N], in float32 or wider: the log-sum-exp of the scores and the sink, -inf where a query
      reads nothing, whether there are sinks or not.

    Raises:
      ValueError: the shapes do not fit together, an option is out of its range, or there is no such
        backend.
      TypeError: an operand is not an array, or holds the wrong kind of numbers, or the window is
        not an integer.
      NotImplementedError: the backend cannot do what is asked, for the reason given.
    """
    _check_heads(q, k, v)
    B, T, N, H = q.shape
    S = k.shape[1]
    # NumPy's arrays and lists stay known while tracing, which some backends need.
    q_positions = np.arange(T)[None] if q_positions is None else q_positions
    q_positions, kv_positions, q_starts = map(_array, (q_positions, kv_positions, q_starts))
    sinks, alibi = (None if x is None else jnp.asarray(x) for x in (sinks, alibi))
    _check_rows("q_positions", q_positions, B, T)
    _check_rows("kv_positions", kv_positions, B, S)
    _check_rows("q_starts", q_starts, B, T)
    for name, x in (("sinks", sinks), ("alibi", alibi)):
        if x is not None and jnp.shape(x) != (N,):
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}; it must be [N={N}], one per query head."
            )
    options = Options(H**-0.5 if scale is None else scale, window, soft_cap)

    q_positions, kv_positions, q_starts = map(_narrow, (q_positions, kv_positions, q_starts))
    if segments is not None:
        if q_starts is not None or kv_positions is not None:
            raise ValueError(
                "segments cannot be combined with q_starts or kv_positions; give only one of them."
            )
        q_starts = _starts(*_segment_pair(segments, B, T, S), q_positions)
    if kv_length is not None:
        length = _lengths(kv_length, B, S)
        if window is None and alibi is None and kv_positions is None:
            q_positions = jnp.minimum(q_positions, length - 1)  # only where the read ends
        else:
            cells = jnp.arange(S, dtype=jnp.int32)[None]
            positions = cells if kv_positions is None else kv_positions
            kv_positions = jnp.where(cells < length, positions, -1)

    where, shared = Where(q_positions, kv_positions, q_starts), Shared(sinks, alibi)
    operands = q, k.swapaxes(1, 2), v.swapaxes(1, 2), where, shared
    z, lse = attend(backend, *operands, options=options, needs_lse=return_lse)
    return (z, lse) if return_lse else z


def _check_heads(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"{name} is a {type(x).__name__}; attention takes arrays.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} holds {x.dtype}; attention takes floating-point numbers.")
    fits = q.ndim == k.ndim == 4 and k.shape[:3] == v.shape[:3] and q.shape[::3] == k.shape[::3]
    if not fits or v.ndim != 4 or 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(
            "attention takes q [B, T, N, H], k [B, S, K, H] and v [B, S, K, Hv], none of them "
            f"empty; got q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads: "
            "the first must be a multiple of the second."
        )


def _array(x):
    return x if x is None or isinstance(x, jax.Array) else np.asarray(x)


def _narrow(x):
    """Positions in int32; those that do not fit become the last one, or -1."""
    if x is None:
        return None
    limits = jnp.iinfo(x.dtype)
    if limits.max > jnp.iinfo(jnp.int32).max:
        x = x.clip(max(limits.min, -1), jnp.iinfo(jnp.int32).max)
    return x.astype(np.int32)


def _check_rows(name, x, rows, length):
    """Raises an error unless x is None or holds integers of shape [rows or 1, length]."""
    if x is None:
        return
    if jnp.shape(x) not in ((rows, length), (1, length)):
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}; it must be [{rows}, {length}], or [1, {length}] if "
            "all rows are alike."
        )
    if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise TypeError(f"{name} holds {jnp.result_type(x)}; they must be integers.")


def _segment_pair(segments, B, T, S):
    if not isinstance(segments, tuple | list):
        if T != S:
            raise ValueError(
                f"segments is one array, but there are {T} queries and {S} keys; give a pair "
                "(segments of queries, segments of keys)."
            )
        segments = segments, segments
    if len(segments) != 2:
        raise ValueError(
            f"segments has {len(segments)} arrays; give a pair (segments of queries, segments of "
            "keys)."
        )
    _check_rows("segments of queries", segments[0], B, T)
    _check_rows("segments of keys", segments[1], B, S)
    return (jnp.asarray(x, jnp.int32) for x in segments)


def _starts(of_queries, of_keys, q_positions):
    """The first position of each query's document, [B or 1, T]."""
    S = of_keys.shape[1]
    begins = jnp.pad(of_keys[:, 1:] != of_keys[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, jnp.arange(S, dtype=jnp.int32), 0), axis=1)
    cells = jnp.clip(q_positions, 0, S - 1)
    rows = max(len(of_keys), len(cells))
    cells = jnp.broadcast_to(cells, (rows, cells.shape[1]))
    first, of_keys = (
        jnp.take_along_axis(jnp.broadcast_to(x, (rows, S)), cells, axis=1) for x in (first, of_keys)
    )
    # A document that has no key yet begins after all of them.
    return jnp.where(of_keys == of_queries, first, jnp.iinfo(jnp.int32).max)


def _lengths(kv_length, B, S):
    """[B or 1, 1] int32, at most S."""
    length = jnp.asarray(kv_length)
    if length.shape not in ((), (1,), (B,)) or not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(
            f"kv_length holds {length.dtype} of shape {length.shape}; it must be one integer, or "
            f"[{B}] of them, one per row."
        )
    return length.clip(0, S).astype(jnp.int32).reshape(-1, 1)
