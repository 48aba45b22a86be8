"""What the programs here have in common and is not their subject: parameters, a norm, a network."""

import jax
import jax.numpy as jnp


def normal(key, shapes):
    """Makes parameters: a pytree of shapes becomes normal numbers of variance 1 / shape[0]."""
    is_shape = lambda x: isinstance(x, tuple)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=is_shape)
    keys = jax.random.split(key, len(leaves))
    arrays = [jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def norm(x):
    """RMSNorm (arXiv:1910.07467) without parameters, over the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def feed_forward(layer, x):
    """The network of one token: x [E] -> [E]."""
    return jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]


def feed_forward_shapes(width):
    """The shapes of what `feed_forward` needs."""
    return {"up": (width, 2 * width), "down": (2 * width, width)}
