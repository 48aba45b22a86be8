"""Log-probabilities: one function for the sampler, for `score` and for the loss."""

import jax
import jax.numpy as jnp

from kernels.tracing.linear import linear_call


@jax.custom_jvp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes cross entropy and log-sum-exp of logits.

    Args:
      logits: [..., V] float32 (or wider).
      targets: [...] int32 in 0..V-1.

    Returns:
      nll [...] in nats, the log-sum-exp minus the target's logit, which is minus the target's
      log-probability; and the log-sum-exp [...].
    """
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return lse - target, lse


@cross_entropy.defjvp
def _cross_entropy_jvp(primals, tangents):
    logits, targets = primals
    nll, lse = cross_entropy(logits, targets)
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
