"""Expert choice (arXiv:2202.09368): each expert picks its tokens, and tokens compete for experts.

It balances the load of experts without any loss for it: an expert takes the `ROOM` tokens of the
sequence that its router likes best, and the others go without.

The rule it breaks: nothing but `write_read` connects tokens. Whether a token gets an expert depends
on all tokens of its sequence, also on those after it.

What it would cost: a model trained so cannot write text, since which expert a token gets depends on
what comes later. Token choice, where each token picks its experts (arXiv:2401.04088), is lawful.
"""

import jax
import jax.numpy as jnp

from examples.programs.attention import ATTENTION, VOCAB_SIZE, WIDTH, combine, empty, project
from examples.programs.attention import init as init_attention
from examples.programs.parts import norm, normal

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]

EXPERTS, ROOM = 4, 2


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
        x = x + mix_experts(params["experts"], norm(x))
    return turn.end(), norm(x) @ params["embedding"].T


def mix_experts(experts, x):
    """The experts that have chosen this token: x [E] -> [E]."""
    score = jax.nn.softmax(x @ experts["router"])
    scores = jax.lax.all_gather(score, "positions")  # [T, X]
    least = jnp.sort(scores, axis=0)[-ROOM]  # what it takes to be among an expert's choices
    gates = jnp.where(score >= least, score, 0)
    return jnp.einsum("x,xe->e", gates, jax.nn.gelu(jnp.einsum("e,xef->xf", x, experts["up"])))


def init(key):
    attention_key, experts_key = jax.random.split(key)
    experts = {"router": (WIDTH, EXPERTS), "up": (EXPERTS, WIDTH, WIDTH)}
    return init_attention(attention_key) | {"experts": normal(experts_key, experts)}
