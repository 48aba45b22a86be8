"""Latent attention (arXiv:2405.04434): all heads read one small latent vector a token.

A cell is any pytree. Here it is a pair, the latent that stands for keys and values of every head,
and a key turned by the token's position, which all heads share. The query carries one pair for each
head. The matrices that would make keys of latents are folded into the queries, and those that would
make values of them are applied after the read, so that a read touches latents only.
"""

import jax
import jax.numpy as jnp

from examples.programs.parts import feed_forward, feed_forward_shapes, norm, normal
from transformer import Cache, Cells

VOCAB_SIZE, WIDTH, LAYERS = 32, 32, 2
HEADS, LATENT, ROTARY = 4, 8, 4


def attend(query, cells, visible, shared):
    """Reads latents [S, C] with queries [N, C]: -> [N, C]; rotary keys and queries [.., R]."""
    latents, keys = cells
    content, place = query
    scores = (content @ latents.T + place @ keys.T) / (LATENT + ROTARY) ** 0.5
    return jax.nn.softmax(jnp.where(visible, scores, -1e30)) @ latents


LATENTS = Cells(attend)


def rotate(x, i):
    """Turns the pairs of x [..., R] by angles in proportion to the position (arXiv:2104.09864)."""
    angle = i * 100.0 ** -jnp.linspace(0, 1, ROTARY // 2)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        y = norm(x)
        cell = norm(y @ layer["latent"]), rotate(y @ layer["key"], i)
        content = jnp.einsum("e,enc->nc", y, layer["content"])
        place = jnp.einsum("e,enr->nr", y, layer["place"])
        turn, z = turn.write_read(LATENTS, cell, (content, rotate(place, i)))
        x = x + jnp.einsum("nc,cne->e", z, layer["output"])
        x = x + feed_forward(layer, x)
    return turn.end(), norm(x) @ params["embedding"].T


def init(key):
    layer = {
        "latent": (WIDTH, LATENT),
        "key": (WIDTH, ROTARY),
        "content": (WIDTH, HEADS, LATENT),
        "place": (WIDTH, HEADS, ROTARY),
        "output": (LATENT, HEADS, WIDTH),
    }
    layers = [layer | feed_forward_shapes(WIDTH)] * LAYERS
    return normal(key, {"embedding": (VOCAB_SIZE, WIDTH), "layers": layers})


def empty(capacity):
    return Cache.empty(capacity, [(LATENTS, ((LATENT,), (ROTARY,)))] * LAYERS)
