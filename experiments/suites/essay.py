"""What the claims of the essay are measured by: a trained model, looked at block by block.

Every measure gives one number for each block and document, so that a mean has an interval of
confidence over documents.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import t

from transformer.insight import contributions, intervene, scale, stream, trace
from transformer.insight.residual import block_layers
from transformer.memory.latent import Latent
from transformer.memory.softmax import Softmax
from transformer.modes.depth import depth
from transformer.modes.schedule import recompute, run
from transformer.numerics.log_softmax import cross_entropy
from transformer.program.init import init_cache
from transformer.program.params import unscanned
from transformer.program.program import program, unembed

RIDGE = 1e-2  # of the probes, on cells of variance 1


@dataclass(frozen=True)
class Measure:
    """One measure, of each block and document.

    name: what it is. unit: of its numbers. values: [blocks, documents].
    """

    name: str
    unit: str
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """[blocks]."""
        return self.values.mean(1)

    @property
    def interval(self) -> np.ndarray:
        """[blocks], half the width of the 95 % interval of the mean, over documents."""
        return half_interval(self.values)


def half_interval(values: np.ndarray):
    """Half the width of Student's 95 % interval of the mean of values [..., D] -> [...]."""
    count = values.shape[-1]
    return t.ppf(0.975, count - 1) * values.std(-1, ddof=1) / np.sqrt(count)


def measures(config, params, documents: Sequence) -> list[Measure]:
    """All measures of one model.

    Args:
      config, params: the model.
      documents: [D, T] int, at least 4 of them; the probes are trained on the first half.
    """
    documents = jnp.asarray(np.asarray(documents), jnp.int32)
    f, cache = program(config), init_cache(config, documents.shape[1])
    seen = [_looked(f, params, cache, tokens) for tokens in documents]
    by_block = lambda name: np.stack([one[name] for one in seen], 1)
    count = len(seen[0]["own"])
    losses = lambda read: np.asarray(_losses(f, params, cache, documents, np.float32(read)))
    cells = [one["cells"] for one in seen]
    plain, at = losses(np.ones(count)), np.arange(count)
    rise = lambda reads: np.stack([losses(reads(block)) - plain for block in at])
    return [
        Measure("loss without the reads of this block", "nats more", rise(lambda b: at != b)),
        Measure(
            "loss with reads of the blocks up to this one only",
            "nats more",
            rise(lambda b: at <= b),
        ),
        Measure("loss with reads from this block on only", "nats more", rise(lambda b: at >= b)),
        Measure("how far back it is read", "tokens", by_block("distance")),
        Measure("weight on the token's own cell", "share", by_block("own")),
        Measure("the lens before it agrees with the model", "share", by_block("agrees")),
        *_probes([np.stack(x) for x in zip(*cells, strict=True)], np.asarray(documents)),
    ]


@partial(jax.jit, static_argnums=0)
def _losses(f, params, cache, documents, read):
    """The loss of each document where the reads of block b are multiplied by read[b]."""
    g = intervene(f, [scale(block, None, read[block], of="read") for block in range(len(read))])

    def loss(tokens):
        return cross_entropy(run(g, params, cache, tokens)[1][:-1], tokens[1:])[0].mean()

    return jax.lax.map(loss, documents)


@partial(jax.jit, static_argnums=0)
def _looked(f, params, cache, tokens):
    """What one document shows of each block."""
    seen = trace(f, params, cache, tokens)
    at = seen.positions
    shares = jnp.stack([_shares(seen, block) for block in range(len(seen.cells))])
    distance = (shares * (at[:, None] - at)).sum(-1).mean(1)
    own = jnp.diagonal(shares, axis1=1, axis2=2).mean(1)
    before = jax.vmap(jax.vmap(lambda x: unembed(f, params, x)))(stream(f, params, seen).before)
    agrees = (before.argmax(-1) == seen.logits.argmax(-1)).mean(1)
    layers = jnp.array(block_layers(f, params, seen))
    flat = lambda x: x.reshape(len(at), -1)
    cells = [jnp.concatenate(list(map(flat, jax.tree.leaves(cell))), 1) for cell in seen.cells]
    return {"distance": distance, "own": own, "agrees": agrees[layers], "cells": cells}


def _shares(seen, block):
    """How much of what each token read of a block came from which cell: [T, T], sums of 1.

    In attention the weights, the mean over heads. In other memories, which have none, the size of
    what came from the cell along what was read. Where a block is read again, the mean over reads.
    """
    every = [_shares_of(seen, x) for x in seen.instructions if x.block == block]
    return sum(every) / len(every)


def _shares_of(seen, reading):
    block, read = reading.block, reading.read
    if isinstance(reading.memory, Softmax | Latent):
        return seen.weights(block, read=read).mean(0)
    own = lambda t: jax.tree.map(lambda x: x[t], reading.z)
    of = lambda t: contributions(seen, block, t, own(t), read=read)
    parts = jax.lax.map(of, seen.positions)
    return jnp.abs(parts) / jnp.maximum(jnp.abs(parts).sum(-1, keepdims=True), 1e-30)


def _probes(cells, documents) -> list[Measure]:
    """What a linear probe reads from the cells of each block [D, T, C]: share of right answers."""
    half = len(documents) // 2
    found = []
    for name, shift in (("its own token", 0), ("the token before", -1), ("the token after", 1)):
        inside = slice(max(0, -shift), documents.shape[1] - max(0, shift))
        targets = np.roll(documents, -shift, 1)[:, inside]
        right = [_probe(x[:, inside], targets, half) for x in cells]
        found.append(Measure(f"a linear probe of its cells finds {name}", "share", np.stack(right)))
    return found


def _probe(x, targets, half):
    """Ridge regression on classes: x [D, T, C], targets [D, T] -> the share right, by document."""
    flat = x[:half].reshape(-1, x.shape[-1])
    mean, scale = flat.mean(0), flat.std(0) + 1e-6
    normed = lambda x: np.concatenate([(x - mean) / scale, np.ones((*x.shape[:-1], 1))], -1)
    inputs, classes = normed(flat), np.unique(targets[:half])
    one_hot = (targets[:half].reshape(-1, 1) == classes).astype(np.float32)
    gram = inputs.T @ inputs / len(inputs) + RIDGE * np.eye(inputs.shape[1])
    matrix = np.linalg.solve(gram, inputs.T @ one_hot / len(inputs))
    guesses = classes[(normed(x[half:]) @ matrix).argmax(-1)]
    return (guesses == targets[half:]).mean(1)


@dataclass(frozen=True)
class Learned:
    """How a program of the examples learned a small task.

    name: of the program. losses: before each step. seconds: of each step but the first, which is
    compiled. depth: in instructions.
    """

    name: str
    losses: list[float]
    seconds: list[float]
    depth: int


def feedback_beside_plain(steps: int, length: int = 24, rows: int = 16) -> list[Learned]:
    """Trains plain attention and the feedback transformer of the examples, on copying.

    A row is random tokens, twice; the loss is that of the second half. The feedback transformer has
    the sequential mode only, and plain attention is trained in the parallel one. They take their
    steps in turn, so that what else the machine does weighs on both.
    """
    from examples.programs import attention
    from examples.programs.unlawful import feedback

    found, training = [], []
    for name, module, chunk in (("plain", attention, None), ("feedback", feedback, 1)):
        params, cache = module.init(jax.random.key(0)), module.empty(length)
        chain = depth(module.program, params, cache, length if chunk is None else 1)
        found.append(Learned(name, [], [], chain if chunk is None else length * chain))
        training.append(_training(module.program, params, cache, chunk, steps, rows))
    for taken in zip(*training, strict=True):
        for learned, (loss, seconds) in zip(found, taken, strict=True):
            learned.losses.append(loss)
            learned.seconds.append(seconds)
    return [replace(x, seconds=x.seconds[1:]) for x in found]


def _training(f: Callable, params, cache, chunk, steps, rows) -> Iterator[tuple[float, float]]:
    """Takes one step after the other: yields the loss before it, and its seconds."""
    half, optimizer = cache.capacity // 2, optax.adam(3e-3)

    def loss(params, key):
        tokens = jax.random.randint(key, (rows, half), 0, 32)
        tokens = jnp.concatenate([tokens, tokens], 1)
        logits = jax.vmap(lambda x: run(f, params, cache, x, chunk=chunk)[1])(tokens)
        return cross_entropy(logits[:, half - 1 : -1], tokens[:, half:])[0].mean()

    @jax.jit
    def step(params, state, key):
        value, slope = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), steps):
        begun = time.perf_counter()
        params, state, value = jax.block_until_ready(step(params, state, key))
        yield float(value), time.perf_counter() - begun


@dataclass(frozen=True)
class Way:
    """One way to run T tokens.

    name: of the way. lengths: numbers of tokens. seconds: for each length those of every round.
    operations: for each length, floating-point ones, as XLA counts them.
    """

    name: str
    lengths: list[int]
    seconds: list[list[float]]
    operations: list[float]


def ways(config, params, lengths: Sequence[int], rounds: int = 7) -> list[Way]:
    """Times and counts running T tokens in parallel, one by one, and without a cache.

    The ways take turns, so that what else the machine does weighs on all. XLA counts the body of a
    loop once; so layers are counted one by one where the model scans them, and what the two ways
    that go token by token do for a token is counted T times.
    """
    apart, layers = unscanned(config, params)
    found = [Way(name, list(lengths), [], []) for name in WAYS]
    for length in lengths:
        operands = params, init_cache(config, length), jnp.arange(length) % config.vocab_size
        lowered = [jax.jit(partial(way, program(config))).lower(*operands) for way in WAYS.values()]
        taken = _seconds(lowered, operands, rounds)
        operands = layers, init_cache(apart, length), operands[-1]
        for way, seconds in zip(found, taken, strict=True):
            counted = jax.jit(partial(WAYS[way.name], program(apart))).lower(*operands)
            repeats = 1 if way.name == PARALLEL else length
            way.seconds.append(seconds)
            way.operations.append(counted.cost_analysis()["flops"] * repeats)
    return found


PARALLEL, CACHED, RECOMPUTED = "parallel", "one by one", "without a cache"
WAYS = {
    PARALLEL: lambda f, *given: run(f, *given)[1],
    CACHED: lambda f, *given: run(f, *given, chunk=1)[1],
    RECOMPUTED: lambda f, *given: recompute(f, *given)[1],
}


def _seconds(lowered, operands, rounds) -> list[list[float]]:
    """What each program takes in each round, after one that is not counted."""
    programs, taken = [x.compile() for x in lowered], [[] for _ in lowered]
    for _ in range(rounds + 1):
        for compiled, seconds in zip(programs, taken, strict=True):
            begun = time.perf_counter()
            compiled(*operands).block_until_ready()
            seconds.append(time.perf_counter() - begun)
    return [seconds[1:] for seconds in taken]
