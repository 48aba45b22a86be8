"""Log-probabilities: one function for the sampler, for `score` and for the loss."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.exact import functions
from kernels.exact.total import has_kernel_for, powers
from kernels.tracing.linear import linear_call


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def cross_entropy(
    logits: jax.Array, targets: jax.Array, exact: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Computes cross entropy and log-sum-exp of logits.

    Args:
      logits: [..., V] float32 (or wider).
      targets: [...] int32 in 0..V-1.
      exact: whether a row's bits are the same whatever rows are beside it.

    Returns:
      nll [...] in nats, the log-sum-exp minus the target's logit, which is minus the target's
      log-probability; and the log-sum-exp [...].
    """
    lse = log_sum_exp(logits, exact)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return lse - target, lse


def log_sum_exp(x: jax.Array, exact: bool = False) -> jax.Array:
    """log(sum(exp(x))) over the last axis, where -inf is a term of 0."""
    if not exact and not has_kernel_for(x):
        return jax.nn.logsumexp(x, axis=-1)
    peak, whole = powers(x)
    return peak + (functions.log(whole) if exact else jnp.log(whole))


@cross_entropy.defjvp
def _cross_entropy_jvp(exact, primals, tangents):
    logits, targets = primals
    nll, lse = cross_entropy(logits, targets, exact)
    tangents = linear_call(_tangent, _transpose, (logits, targets, lse), tangents[0])
    return (nll, lse), tangents


def _tangent(residuals, dlogits):
    logits, targets, lse = residuals
    dlse = jnp.sum(jnp.exp(logits - lse[..., None]) * dlogits, axis=-1)
    return dlse - jnp.take_along_axis(dlogits, targets[..., None], axis=-1)[..., 0], dlse


# Left to JAX, the gradient would be a sum of two arrays [..., V], one of them a scatter into zeros.
def _transpose(residuals, cotangents):
    logits, targets, lse = residuals
    dnll, dlse = (x[..., None] for x in cotangents)
    softmax = jnp.exp(logits - lse[..., None])
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    return softmax * (dnll + dlse) - jnp.where(is_target, dnll, 0)
