"""The ways to run the same tokens, compared with the parallel mode."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer.modes.schedule import recompute, run
from transformer.program.init import init_cache
from transformer.program.program import program


@dataclass(frozen=True)
class Row:
    """One way to run the tokens, compared with the parallel mode.

    logit_difference: largest difference of a logit, as a share of the largest logit.
    equal_bits: share of the logits that are equal to the bit.
    gradient_difference: the same for the loss's gradient, of each parameter array as a share of
      that array's largest, and of them the worst. A tenth of the largest gradient of all arrays is
      the least to be a share of: a sum that cancels, as for the bias of keys, has only the rounding
      of its terms. None where the way is not differentiated.
    """

    way: str
    logit_difference: float
    equal_bits: float
    gradient_difference: float | None


# Too slow to differentiate, or a gradient is in them already.
UNDIFFERENTIATED = (
    "recompute",
    "inside the training step",
    "microbatch of 1",
    "split over devices",
)


def ways(config, attention="auto", numerics="fast"):
    """The ways to run tokens [T]: name -> function (params, tokens) -> logits [T, V].

    Exact numerics have more of them, since there the bits of all are compared; one of these takes
    several devices.
    """
    f = program(config, numerics=numerics, attention=attention)

    def one(chunk=None, spare=0, mode=run):
        def way(params, tokens):
            cache = init_cache(config, len(tokens) + spare)
            options = {} if mode is recompute else {"chunk": chunk}
            return mode(f, params, cache, tokens, **options)[1]

        return way

    def batched(params, tokens, chunk=None):
        rows = _among_others(tokens)
        return jax.vmap(one(chunk), in_axes=(None, 0))(params, rows)[0]

    def reused(params, tokens):
        """The first third was run before, for another sequence that begins alike."""
        prefix = max(1, len(tokens) // 3)
        cache, first = run(f, params, init_cache(config, len(tokens)), tokens[:prefix])
        _, rest = run(f, params, cache, tokens[prefix:], start=prefix, chunk=16)
        return jnp.concatenate([first, rest])

    def trained(params, tokens, accumulate=False, devices=1):
        """The logits of the first row, where the gradient of the loss of all rows is computed."""

        def loss(params, rows):
            logits = jax.vmap(one(), in_axes=(None, 0))(params, rows)
            nll, _ = f.numerics.cross_entropy(logits[:, :-1], rows[:, 1:])
            return nll.mean(), logits

        step = jax.value_and_grad(loss, has_aux=True)
        rows = _among_others(tokens, max(3, devices))
        if devices > 1:
            mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))
            rows = jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, P("data")))
        if accumulate:
            (_, logits), gradient = jax.lax.map(lambda row: step(params, row[None]), rows)
        else:
            (_, logits), gradient = step(params, rows)
        # The gradient is a result too, or else it would not be computed.
        logits, _ = jax.lax.optimization_barrier((logits, gradient))
        return logits[0].reshape(len(tokens), -1)

    every = {
        "parallel": one(),
        "sequential": one(chunk=1),
        "chunks of 16": one(chunk=16),
        "chunks of 64": one(chunk=64),
        "batched": batched,
        "larger capacity": one(spare=300),
        "recompute": one(mode=recompute),
    }
    if f.numerics.exact:
        every |= {
            "inside the training step": trained,
            "microbatch of 1": partial(trained, accumulate=True),
            "generated in a batch": partial(batched, chunk=1),
            "reused prefix": reused,
        }
        if jax.device_count() > 1:
            every["split over devices"] = partial(trained, devices=jax.device_count())
    return every


def _among_others(tokens, count=3):
    """The tokens as the first of several rows."""
    return jnp.stack([jnp.roll(tokens, n) for n in range(count)])


def compare(config, params, tokens, attention="auto", numerics="fast", names=None) -> list[Row]:
    """Runs the tokens in several ways and compares logits and gradients with the parallel mode.

    Args:
      config, params: the model.
      tokens: [T] int.
      attention: backend of `kernels.attention`.
      numerics: as in `program`.
      names: which of the `ways`, "parallel" first; None: all.

    Returns:
      One row per way.
    """

    def loss(params, tokens, way):
        logits = way(params, tokens)
        logprobs = jax.nn.log_softmax(logits[:-1])
        return -jnp.take_along_axis(logprobs, tokens[1:, None], axis=1).mean(), logits

    rows = []
    every = ways(config, attention, numerics)
    for name in every if names is None else names:
        way, gradient = every[name], None
        if name in UNDIFFERENTIATED:
            logits = jax.jit(way)(params, tokens)
        else:
            differentiate = jax.jit(jax.grad(lambda p, t, way=way: loss(p, t, way), has_aux=True))
            gradient, logits = differentiate(params, tokens)
            gradient = [np.asarray(g) for g in jax.tree.leaves(gradient)]
        logits = np.asarray(logits)
        if name == "parallel":
            expected, expected_gradient = logits, gradient
        rows.append(
            Row(
                name,
                logit_difference=difference([logits], [expected]),
                equal_bits=float((logits == expected).mean()),
                gradient_difference=gradient and difference(gradient, expected_gradient),
            )
        )
    return rows


def difference(arrays, expected) -> float:
    """The largest difference between two lists of arrays, each as a share of its array's largest.

    A tenth of the largest number of all arrays is the least to be a share of. The result is nan
    where a number is.
    """
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(arrays, expected, strict=True)
        if np.size(y)
    ]
    scales = [np.abs(y).max() for _, y in pairs]
    least = max(scales, default=0) / 10 or 1
    shares = [np.abs(x - y).max() / max(s, least) for (x, y), s in zip(pairs, scales, strict=True)]
    return float(np.max(shares, initial=0))
