"""Suites of a whole model: a training step, prefill, decoding, and what they cost to compile.

Each takes a `Subject` and yields figures.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.suites.timing import Figure, compiled, timed
from transformer.config import Config
from transformer.data.batches import Batch
from transformer.inference.decode import capacity_for
from transformer.inference.generate import generate as complete
from transformer.inference.prepare import lay_out_params
from transformer.inference.sampling import likeliest
from transformer.modes.schedule import run
from transformer.program.init import init_cache, init_params
from transformer.program.params import Params
from transformer.program.program import program
from transformer.storage.model import Model
from transformer.training.flops import flops_per_token
from transformer.training.loss import compute_logits, row_cache
from transformer.training.optimizer import OptimizerConfig, make_optimizer
from transformer.training.step import init_state, make_train_step

PROMPT, NEW = 512, 32  # tokens before decoding begins, and tokens decoded


@dataclass(frozen=True)
class Subject:
    """What a suite runs, and how.

    Attributes:
      config: the architecture.
      make_params: makes the parameters, or reads them; no two suites hold them at a time.
      repeats: the number of timed runs.
      attention, numerics: as in `program`.
    """

    config: Config
    make_params: Callable[[], Params]
    repeats: int
    attention: str
    numerics: str

    @property
    def program(self):
        """The program of the config."""
        return program(self.config, numerics=self.numerics, attention=self.attention)


def random_params(config: Config) -> Params:
    """Fresh parameters in the type that the program computes in."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(config.compute_dtype), params)


def train(subject: Subject):
    """A training step with AdamW, on 4 x 256 tokens on a CPU and 32 x 1024 on anything else."""
    config = subject.config
    batch, optimizer = _batch(config), make_optimizer(OptimizerConfig(name="adamw"), 1000)
    state = init_state(config, optimizer, jax.random.key(0))
    size = _bytes(state.params)
    how = {"numerics": subject.numerics, "attention": subject.attention}
    step = make_train_step(config, optimizer, **how)
    step, seconds = compiled(step, state, batch, donate=0)

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    rows, length = batch.tokens.shape
    count = rows * length
    flops = count * flops_per_token(config, length)
    # Parameters are read forward and backward; gradients are written and read, and Adam reads and
    # writes parameters and two moments.
    times = timed(call, subject.repeats)
    yield Figure("train", f"{rows} x {length}", count, times, seconds, flops, 10 * size)


def parts(subject: Subject):
    """How far a training step has come after what time: the logits, the loss, its gradient, all."""
    config, f, batch = subject.config, subject.program, _batch(subject.config)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    rows, length = batch.tokens.shape
    count = rows * length

    def logits(params, batch):
        return compute_logits(f, params, row_cache(config, batch), batch)

    def loss(params, batch):
        return f.numerics.cross_entropy(logits(params, batch), batch.targets)[0].mean()

    passes = {"logits": (logits, 1), "loss": (loss, 1), "gradient": (jax.value_and_grad(loss), 3)}
    for name, (function, products) in passes.items():
        run_, seconds = compiled(function, params, batch)
        flops = count * flops_per_token(config, length) * products / 3
        times = timed(lambda run_=run_: run_(params, batch), subject.repeats)
        moved = products * _bytes(params)
        yield Figure("parts", f"to the {name}", count, times, seconds, flops, moved)
    for figure in train(subject):
        yield replace(figure, suite="parts", case="to the new state")


def _batch(config):
    rows, length = (4, 256) if jax.default_backend() == "cpu" else (32, 1024)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, rows, length), dtype=np.int32)
    return Batch(tokens[0], tokens[1], None, np.ones((rows, length), np.float32))


def prefill(subject: Subject):
    """A prompt of 512 tokens in the parallel mode, all logits computed."""
    config, f, params = subject.config, subject.program, subject.make_params()
    cache = init_cache(config, 2 * PROMPT)
    tokens = _tokens(config, PROMPT)
    program_, seconds = compiled(lambda p, c, t: run(f, p, c, t), params, cache, tokens)
    flops = PROMPT * flops_per_token(config, PROMPT) / 3  # the backward pass is two thirds
    times = timed(lambda: program_(params, cache, tokens), subject.repeats)
    yield Figure("prefill", f"{PROMPT}", PROMPT, times, seconds, flops, _bytes(params))


def decode(subject: Subject):
    """32 tokens, one after the other, behind a prompt of 512; one sequence, and eight."""
    params = subject.make_params()
    for batch in (1, 8):
        size = capacity_for(PROMPT + NEW)
        yield _decode(subject, params, f"after {PROMPT}, batch {batch}", batch, size, PROMPT)


def generate(subject: Subject):
    """`generate` as a user calls it: prompts of 512 tokens and 32 new ones, in all."""
    config = subject.config
    model = Model(config, subject.make_params(), None)
    for batch in (1, 8):
        prompts = np.split(np.asarray(_tokens(config, batch * PROMPT)), batch)
        how = {"numerics": subject.numerics, "attention": subject.attention}
        call = partial(complete, model, prompts, max_new_tokens=NEW, **how)
        begin = time.perf_counter()
        call()
        first = time.perf_counter() - begin
        times = timed(call, subject.repeats)
        # Prompts need no logits.
        logits = 6 * config.width * config.vocab_size * batch * PROMPT
        flops = (batch * (PROMPT + NEW) * flops_per_token(config, PROMPT) - logits) / 3
        moved = NEW * _step_bytes(config, model.params, batch, PROMPT + NEW // 2)
        case = f"{PROMPT} + {NEW}, batch {batch}"
        yield Figure("generate", case, batch * NEW, times, first - times[0], flops, moved)


def capacity(subject: Subject):
    """Decoding at one length with room for little more, and for much more."""
    params = subject.make_params()
    for size in (512, 16384):
        yield _decode(subject, params, f"after 448, capacity {size}", 1, size, 448)


def compile(subject: Subject):
    """Training steps of 10 and of 100 scanned layers; the figure is the time to compile them."""
    for num_layers in (10, 100):
        scanned = subject.config.replace(num_layers=num_layers, scan_layers=True)
        for figure in train(replace(subject, config=scanned)):
            yield replace(figure, suite="compile", case=f"{num_layers} layers")


def _decode(subject, params, case, batch, size, start):
    config, f = subject.config, subject.program

    def generate(params, cache, token):
        def step(carry, i):
            cache, token = carry
            cache, logits = f(params, cache, token, i)
            return (cache, likeliest(logits).astype(jnp.int32)), None

        return jax.lax.scan(step, (cache, token), start + jnp.arange(NEW))[0]

    moved = NEW * _step_bytes(config, params, batch, start + NEW // 2)
    params = lay_out_params(f, params)
    state = init_cache(config, size), _tokens(config, 1)[0]
    if batch > 1:
        generate = jax.vmap(generate, in_axes=(None, 0, 0))
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)).copy(), state)
    flops = batch * NEW * flops_per_token(config, start) / 3
    program_, seconds = compiled(generate, params, *state, donate=(1, 2))

    def call():
        nonlocal state
        state = program_(params, *state)
        return state

    times = timed(call, subject.repeats)
    return Figure("decode", case, batch * NEW, times, seconds, flops, moved)


def _step_bytes(config, params, batch, length):
    """The least that one decode step reads: parameters, and the cells of each sequence."""
    cache = jax.eval_shape(lambda: init_cache(config, length))
    return _bytes(params) + batch * _bytes(cache)


def _tokens(config, count):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, config.vocab_size, count, dtype=np.int32))


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
