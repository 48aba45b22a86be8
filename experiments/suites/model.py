"""Suites of a whole model: a training step, prefill, decoding, and what they cost to compile.

Each takes a config, the number of timed runs, and the backend of attention and the numerics as in
`program`; it yields figures.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.suites.timing import Figure, compiled, timed
from transformer.config import Config
from transformer.data.batches import Batch
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.decode import capacity_for
from transformer.inference.generate import generate as complete
from transformer.modes.schedule import run
from transformer.program.init import init_cache, init_params
from transformer.program.program import program
from transformer.storage.model import Model
from transformer.training.flops import flops_per_token
from transformer.training.loss import compute_logits, row_cache
from transformer.training.optimizer import OptimizerConfig, make_optimizer
from transformer.training.step import init_state, make_train_step

PROMPT, NEW = 512, 32  # tokens before decoding begins, and tokens decoded


def train(config: Config, repeats: int, attention: str, numerics: str):
    """A training step with AdamW, on 4 x 256 tokens on a CPU and 32 x 1024 on anything else."""
    batch, optimizer = _batch(config), make_optimizer(OptimizerConfig(name="adamw"), 1000)
    state = init_state(config, optimizer, jax.random.key(0))
    size = _bytes(state.params)
    step = make_train_step(config, optimizer, numerics=numerics, attention=attention)
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
    yield Figure(
        "train", f"{rows} x {length}", count, timed(call, repeats), seconds, flops, 10 * size
    )


def parts(config: Config, repeats: int, attention: str, numerics: str):
    """How far a training step has come after what time: the logits, the loss, its gradient, all."""
    f, batch = program(config, numerics=numerics, attention=attention), _batch(config)
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
        times = timed(lambda run_=run_: run_(params, batch), repeats)
        moved = products * _bytes(params)
        yield Figure("parts", f"to the {name}", count, times, seconds, flops, moved)
    for figure in train(config, repeats, attention, numerics):
        yield Figure(**(vars(figure) | {"suite": "parts", "case": "to the new state"}))


def _batch(config):
    rows, length = (4, 256) if jax.default_backend() == "cpu" else (32, 1024)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, rows, length), dtype=np.int32)
    return Batch(tokens[0], tokens[1], None, np.ones((rows, length), np.float32))


def prefill(config: Config, repeats: int, attention: str, numerics: str):
    """A prompt of 512 tokens in the parallel mode, all logits computed."""
    f, params = program(config, numerics=numerics, attention=attention), _params(config)
    cache = init_cache(config, 2 * PROMPT)
    tokens = _tokens(config, PROMPT)
    program_, seconds = compiled(lambda p, c, t: run(f, p, c, t), params, cache, tokens)
    flops = PROMPT * flops_per_token(config, PROMPT) / 3  # the backward pass is two thirds
    times = timed(lambda: program_(params, cache, tokens), repeats)
    yield Figure("prefill", f"{PROMPT}", PROMPT, times, seconds, flops, _bytes(params))


def decode(config: Config, repeats: int, attention: str, numerics: str):
    """32 tokens, one after the other, behind a prompt of 512; one sequence, and eight."""
    for batch in (1, 8):
        size = capacity_for(PROMPT + NEW)
        case = f"after {PROMPT}, batch {batch}"
        yield _decode(config, case, batch, size, PROMPT, repeats, attention, numerics)


def generate(config: Config, repeats: int, attention: str, numerics: str):
    """`generate` as a user calls it: prompts of 512 tokens and 32 new ones, in all."""
    model = Model(config, _params(config), byte_tokenizer())
    for batch in (1, 8):
        prompts = np.split(np.asarray(_tokens(config, batch * PROMPT)), batch)
        how = {"numerics": numerics, "attention": attention}
        call = partial(complete, model, prompts, max_new_tokens=NEW, **how)
        begin = time.perf_counter()
        drawn = [len(completion.tokens) for completion in call()]  # some may end a document
        first = time.perf_counter() - begin
        times = timed(call, repeats)
        # Prompts need no logits.
        logits = 6 * config.width * config.vocab_size * batch * PROMPT
        flops = ((batch * PROMPT + sum(drawn)) * flops_per_token(config, PROMPT) - logits) / 3
        moved = max(drawn) * _step_bytes(config, model.params, batch, PROMPT + NEW // 2)
        case = f"{PROMPT} + {NEW}, batch {batch}"
        yield Figure("generate", case, sum(drawn), times, first - times[0], flops, moved)


def capacity(config: Config, repeats: int, attention: str, numerics: str):
    """Decoding at one length with room for little more, and for much more."""
    for size in (512, 16384):
        case = f"after 448, capacity {size}"
        yield _decode(config, case, 1, size, 448, repeats, attention, numerics)


def compile(config: Config, repeats: int, attention: str, numerics: str):
    """Training steps of 10 and of 100 scanned layers; the figure is the time to compile them."""
    for num_layers in (10, 100):
        scanned = config.replace(num_layers=num_layers, scan_layers=True)
        for figure in train(scanned, repeats, attention, numerics):
            yield Figure(**(vars(figure) | {"suite": "compile", "case": f"{num_layers} layers"}))


def _decode(config, case, batch, size, start, repeats, attention, numerics):
    f, params = program(config, numerics=numerics, attention=attention), _params(config)

    def generate(params, cache, token):
        def step(carry, i):
            cache, token = carry
            cache, logits = f(params, cache, token, i)
            return (cache, jnp.argmax(logits).astype(jnp.int32)), None

        return jax.lax.scan(step, (cache, token), start + jnp.arange(NEW))[0]

    state = init_cache(config, size), _tokens(config, 1)[0]
    if batch > 1:
        generate = jax.vmap(generate, in_axes=(None, 0, 0))
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)).copy(), state)
    moved = NEW * _step_bytes(config, params, batch, start + NEW // 2)
    flops = batch * NEW * flops_per_token(config, start) / 3
    program_, seconds = compiled(generate, params, *state, donate=(1, 2))

    def call():
        nonlocal state
        state = program_(params, *state)
        return state

    return Figure("decode", case, batch * NEW, timed(call, repeats), seconds, flops, moved)


def _step_bytes(config, params, batch, length):
    """The least that one decode step reads: parameters, and the cells of each sequence."""
    cache = jax.eval_shape(lambda: init_cache(config, length))
    return _bytes(params) + batch * _bytes(cache)


def _params(config):
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(config.compute_dtype), params)


def _tokens(config, count):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, config.vocab_size, count, dtype=np.int32))


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
