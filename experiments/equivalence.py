"""The claim, measured: every way of running the same tokens gives the same logits.

    python -m experiments.equivalence                     a small model with fresh parameters
    python -m experiments.equivalence --preset=gpt2       another shape
    python -m experiments.equivalence --workdir=runs/demo a trained model

Each row is one way to run the same program over the same tokens, compared with the parallel mode.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass

from absl import flags

from experiments import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a trained model.")
_PRESET = flags.DEFINE_string("preset", "tiny", "Shape of a fresh model; see transformer.presets.")
_LENGTH = flags.DEFINE_integer("length", None, "Tokens; default: half the maximum, at most 128.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the tokens, and of fresh parameters.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object per row instead of a table.")


@dataclass(frozen=True)
class Row:
    """One way to run the tokens, compared with the parallel mode.

    logit_difference: largest difference of a logit, as a share of the largest logit.
    equal_bits: share of the logits that are equal to the bit.
    gradient_difference: the same as logit_difference for the loss's gradient, over each parameter
      array as a share of the largest gradient; None where the way is not differentiated.
    microseconds_per_token: median of repeated runs after a first one.
    growth: time for 2T tokens over time for T.
    """

    way: str
    logit_difference: float
    equal_bits: float
    gradient_difference: float | None
    microseconds_per_token: float | None = None
    growth: float | None = None


def ways(config, attention="auto"):
    """The ways to run tokens [T]: name -> function (params, tokens) -> logits [T, V]."""
    import jax
    import jax.numpy as jnp

    from transformer.program import init_cache, program
    from transformer.schedule import recompute, run

    f = program(config, attention=attention)

    def one(chunk=None, spare=0, mode=run):
        def way(params, tokens):
            cache = init_cache(config, len(tokens) + spare)
            options = {} if mode is recompute else {"chunk": chunk}
            return mode(f, params, cache, tokens, **options)[1]

        return way

    def batched(params, tokens):
        others = [jnp.roll(tokens, n) for n in (1, 2)]
        return jax.vmap(one(), in_axes=(None, 0))(params, jnp.stack([tokens, *others]))[0]

    return {
        "parallel": one(),
        "sequential": one(chunk=1),
        "chunks of 16": one(chunk=16),
        "chunks of 64": one(chunk=64),
        "batched": batched,
        "larger capacity": one(spare=300),
        "recompute": one(mode=recompute),
    }


def compare(config, params, tokens, attention="auto", names=None) -> list[Row]:
    """Runs the tokens in several ways and compares logits and gradients with the parallel mode.

    Args:
      config, params: the model.
      tokens: [T] int.
      attention: backend of `kernels.attention`.
      names: which of the `ways`, "parallel" first; None: all.

    Returns:
      One row per way, without times.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    def loss(params, tokens, way):
        logits = way(params, tokens)
        logprobs = jax.nn.log_softmax(logits[:-1])
        return -jnp.take_along_axis(logprobs, tokens[1:, None], axis=1).mean(), logits

    rows = []
    every = ways(config, attention)
    for name in every if names is None else names:
        way, gradient = every[name], None
        if name == "recompute":
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
                logit_difference=_difference([logits], [expected]),
                equal_bits=float((logits == expected).mean()),
                gradient_difference=gradient and _difference(gradient, expected_gradient),
            )
        )
    return rows


def _difference(arrays, expected):
    import numpy as np

    scale = max(float(np.abs(x).max()) for x in expected)
    worst = max(float(np.abs(x - y).max()) for x, y in zip(arrays, expected, strict=True))
    return worst / scale


def timed(config, params, tokens, repeats=3):
    """Seconds that each way takes over tokens [T], the median of repeated runs: name -> seconds."""
    import jax

    seconds = {}
    for name, way in ways(config).items():
        way = jax.jit(way)
        jax.block_until_ready(way(params, tokens))
        runs = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(way(params, tokens))
            runs.append(time.perf_counter() - begin)
        seconds[name] = statistics.median(runs)
    return seconds


def _model():
    import jax

    from transformer.config import presets
    from transformer.model import load
    from transformer.program import init_params

    if _WORKDIR.value is not None:
        model = load(_WORKDIR.value)
        return model.config, model.params
    if _PRESET.value not in presets:
        raise ValueError(
            f"--preset={_PRESET.value} does not exist; choose one of {', '.join(presets)}."
        )
    config = presets[_PRESET.value]
    return config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(_SEED.value))


def main(argv):
    del argv
    import numpy as np

    with cli.user_errors(ValueError, OSError):
        config, params = _model()
    most = config.max_length // 2
    length = min(128, most) if _LENGTH.value is None else _LENGTH.value
    if not 2 <= length <= most:
        cli.fail(
            f"--length={length}; it must be between 2 and {most}, half the model's maximum, "
            "because twice as many tokens are timed."
        )
    tokens = np.random.default_rng(_SEED.value).integers(0, config.vocab_size, 2 * length)
    rows = compare(config, params, tokens[:length].astype(np.int32))
    short = timed(config, params, tokens[:length].astype(np.int32))
    long = timed(config, params, tokens.astype(np.int32))
    rows = [
        Row(
            **asdict(row)
            | {
                "microseconds_per_token": short[row.way] / length * 1e6,
                "growth": long[row.way] / short[row.way],
            }
        )
        for row in rows
    ]
    if _JSON.value:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        print_table(rows, length)


def print_table(rows: list[Row], length: int) -> None:
    """Prints the rows as a table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{length} tokens, compared with the parallel mode")
    headings = ("way", "logits differ", "equal bits", "gradients differ", "us / token", "T -> 2T")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        gradient = row.gradient_difference
        table.add_row(
            row.way,
            f"{row.logit_difference:.1e}",
            f"{row.equal_bits:.1%}",
            "-" if gradient is None else f"{gradient:.1e}",
            f"{row.microseconds_per_token:,.0f}",
            f"x {row.growth:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
