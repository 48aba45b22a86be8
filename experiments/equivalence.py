"""The claim, measured: every way of running the same tokens gives the same logits.

    python -m experiments.equivalence                     a small model with fresh parameters
    python -m experiments.equivalence --preset=gpt2       another shape
    python -m experiments.equivalence --workdir=runs/demo a trained model
    python -m experiments.equivalence --numerics=exact    every bit is equal, in more ways; one of
                                                          them needs several devices
    python -m experiments.equivalence --trace             where the first bits part
    python -m experiments.equivalence --ways=sequential,batched   some of the ways

Each row is one way to run the same program over the same tokens, compared with the parallel mode.
"""

import dataclasses
import json

from absl import flags

from experiments.run import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a trained model.")
_PRESET = flags.DEFINE_string(
    "preset", None, "Shape of a fresh model, tiny by default; see transformer.presets."
)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens; default: half the maximum, at most 128.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the tokens, and of fresh parameters.", lower_bound=0, upper_bound=2**32 - 1
)
_ATTENTION = flags.DEFINE_string("attention", "auto", "Backend of `kernels.attention`.")
_NUMERICS = flags.DEFINE_enum(
    "numerics", "fast", ["fast", "exact"], "Exact: all ways give the same bits."
)
_TRACE = flags.DEFINE_bool(
    "trace", False, "Name the first cell, query or read whose bits differ in the sequential mode."
)
_WAYS = flags.DEFINE_list("ways", None, "Which ways, by their names in the table; default: all.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Type of activations; default: the model's own."
)
_JSON = flags.DEFINE_bool("json", False, "One JSON object per row instead of a table.")


def _model():
    import jax

    from transformer.presets import presets
    from transformer.program.init import init_params
    from transformer.storage.model import load

    if _WORKDIR.value is not None:
        if _PRESET.value is not None:
            raise ValueError("--workdir is a trained model and --preset a fresh one; give one.")
        model = load(_WORKDIR.value)
        return model.config, model.params
    preset = _PRESET.value or "tiny"
    if preset not in presets:
        raise ValueError(f"--preset={preset} does not exist; choose one of {', '.join(presets)}.")
    config = presets[preset]
    return config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(_SEED.value))


def _names(config):
    """The ways that --ways asks for, in the order of the table."""
    from transformer.modes.compare import ways

    every = list(ways(config, _ATTENTION.value, _NUMERICS.value))
    unknown = set(_WAYS.value or []) - set(every)
    if unknown:
        raise ValueError(
            f"--ways={','.join(sorted(unknown))} does not exist; choose from {', '.join(every)}."
        )
    asked = {"parallel", *(_WAYS.value or every)}  # the first is what others are compared with
    return [name for name in every if name in asked]


def main(argv):
    del argv
    import numpy as np

    from experiments.suites.equivalence import first_parting, times
    from kernels.backends.choice import check_backend
    from transformer.modes.compare import compare
    from transformer.storage.checkpoint import CheckpointError

    with cli.user_errors(ValueError, OSError, CheckpointError):
        check_backend(_ATTENTION.value)
        config, params = _model()
        config = config.replace(dtype=_DTYPE.value or config.dtype)
        names = _names(config)
    most = config.max_length // 2
    length = min(128, most) if _LENGTH.value is None else _LENGTH.value
    if not 2 <= length <= most:
        cli.fail(
            f"--length={length}; it must be between 2 and {most}, half the model's maximum, "
            "because twice as many tokens are timed."
        )
    tokens = np.random.default_rng(_SEED.value).integers(0, config.vocab_size, 2 * length)
    tokens = tokens.astype(np.int32)
    how = {"attention": _ATTENTION.value, "numerics": _NUMERICS.value}
    if _TRACE.value:
        with cli.user_errors(NotImplementedError):
            print(parting(first_parting(config, params, tokens[:length], **how)))
        return
    with cli.user_errors(NotImplementedError):
        rows = compare(config, params, tokens[:length], names=names, **how)
        short = times(config, params, tokens[:length], names=names, **how)
        long = times(config, params, tokens, names=names, **how)
    timed = [
        {
            **dataclasses.asdict(row),
            "microseconds_per_token": short[row.way] / length * 1e6,
            "growth": long[row.way] / short[row.way],
        }
        for row in rows
    ]
    if _JSON.value:
        for row in timed:
            print(json.dumps(row))
    else:
        print_table(timed, length)


def parting(first) -> str:
    """What `first_parting` found, in words."""
    if first is None:
        return "all bits are equal, of every cell, query and read and of the logits"
    where = "the logits" if first.block is None else f"the {first.what} of block {first.block}"
    return (
        f"bits part first in {where}, at token {first.token}; "
        f"the largest difference there is {first.difference:.1e}"
    )


def print_table(rows, length) -> None:
    """Prints the rows of `compare`, with their times, as a table for people."""
    cli.print_table(
        f"{length} tokens: largest differences from the parallel mode",
        ("way", "logits", "equal bits", "gradients", "us / token", "T -> 2T"),
        [
            (
                row["way"],
                f"{row['logit_difference']:.1e}",
                f"{row['equal_bits']:.1%}",
                "-" if row["gradient_difference"] is None else f"{row['gradient_difference']:.1e}",
                f"{row['microseconds_per_token']:,.0f}",
                f"x {row['growth']:.1f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    cli.start(main)
