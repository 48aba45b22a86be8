"""What the gradient computes again instead of keeping it."""

import jax

from kernels.dot import dot_p


def segment(function):
    """Marks what runs between two instructions: `config.remat` may recompute it for the gradient.

    The function's first argument is a `LayerSpec`. The instructions themselves are never
    recomputed: that would keep every state of the cache.
    """
    policies = jax.checkpoint_policies
    ours = lambda primitive, *_, **__: primitive is dot_p
    dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, ours)
    recomputed = {
        "none": function,
        "segments": jax.checkpoint(function, static_argnums=0),
        "dots": jax.checkpoint(function, static_argnums=0, policy=dots),
    }
    # Layers that are alike are traced and lowered once; XLA puts each call in its place.
    traced = {name: jax.jit(run, static_argnums=0) for name, run in recomputed.items()}
    return lambda spec, *operands: traced[spec.config.remat](spec, *operands)
