"""How deep each way to run a sequence is, computed and timed.

    python -m experiments.depth
    python -m experiments.depth --lengths=64,128 --json=FILE --plot=FILE

The depth is the longest chain of instructions that wait for each other (`transformer.depth`), for
programs of two layers each. A lawful program has the depth of its layers in the parallel mode,
whatever the length; everything that goes from token to token has that of its tokens. Times are
those of one sequence on this machine, which has to compute also what would not have to wait: the
parallel mode takes longer for more tokens, but not by a chain of them.
"""

import datetime
import json
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

from absl import flags

from experiments.run import cli

LENGTHS = (64, 128, 256, 512, 1024)
_LENGTHS = flags.DEFINE_list("lengths", [str(n) for n in LENGTHS], "Numbers of tokens.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each case.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_PLOT = flags.DEFINE_string("plot", None, "File for a plot of them, PNG.")
SECONDS = 2  # a case that has taken longer is not run again


@dataclass(frozen=True)
class Case:
    """One way to run one program.

    name: what it is called in the table.
    init: key -> params. empty: capacity -> cache. run: (params, cache, tokens) -> (cache, logits).
    depth: (params, cache, length) -> the depth of that.
    """

    name: str
    init: Callable
    empty: Callable
    run: Callable
    depth: Callable


@dataclass(frozen=True)
class Row:
    """What a case took: the depth in instructions, and the median time in seconds."""

    case: str
    tokens: int
    depth: int
    seconds: float


def cases() -> list[Case]:
    """The ways to run, in the order of the table."""
    import transformer
    from examples.programs import attention, linear_attention, recurrent
    from examples.programs.unlawful import feedback
    from transformer.modes import schedule

    def parallel(f):
        return (
            lambda params, cache, tokens: schedule.run(f, params, cache, tokens),
            lambda params, cache, length: transformer.depth(f, params, cache, length),
        )

    def one_by_one(f):
        """A chain of tokens, each of them as deep as a token alone."""
        return (
            lambda params, cache, tokens: schedule.run(f, params, cache, tokens, chunk=1),
            lambda params, cache, length: length * transformer.depth(f, params, cache, 1),
        )

    def recompute(f):
        """A chain of prefixes, each in the parallel mode."""
        return (
            lambda params, cache, tokens: schedule.recompute(f, params, cache, tokens),
            lambda params, cache, length: sum(
                transformer.depth(f, params, cache, n + 1) for n in range(length)
            ),
        )

    def of_example(name, module, mode):
        return Case(name, module.init, module.empty, *mode(module.program))

    delta = transformer.Config(
        vocab_size=32, max_length=1, num_layers=2, width=32, num_heads=1, layer_kinds="delta",
        delta=transformer.config.Delta(num_key_heads=1, num_value_heads=1),
    )  # fmt: skip
    # No parallel mode exists of the feedback transformer: its depth is that of the program itself.
    feedback_mode = lambda f: (one_by_one(f)[0], parallel(f)[1])
    return [
        of_example("attention, parallel", attention, parallel),
        of_example("attention, sequential", attention, one_by_one),
        of_example("attention, no cache", attention, recompute),
        of_example("feedback transformer", feedback, feedback_mode),
        of_example("recurrent network", recurrent, parallel),
        of_example("linear attention", linear_attention, parallel),
        Case(
            "delta rule in pieces",
            lambda key: transformer.init_params(delta, key),
            lambda capacity: transformer.init_cache(delta, capacity),
            *parallel(transformer.program(delta)),
        ),
    ]


def measure(case: Case, length: int, repeats: int) -> Row:
    """Computes the depth of a case at one length, and times it."""
    import jax
    import numpy as np

    from experiments.suites.timing import compiled, timed

    params, cache = case.init(jax.random.key(0)), case.empty(length)
    tokens = np.random.default_rng(0).integers(0, 32, length, dtype=np.int32)
    run, _ = compiled(case.run, params, cache, tokens)
    seconds = timed(lambda: run(params, cache, tokens), repeats, SECONDS)
    return Row(case.name, length, case.depth(params, cache, length), statistics.median(seconds))


def main(argv):
    del argv
    if not _LENGTHS.value or not all(n.isdecimal() and int(n) for n in _LENGTHS.value):
        cli.fail(
            f"--lengths={','.join(_LENGTHS.value)}; it takes numbers of tokens, at least 1, with "
            "commas between them."
        )
    lengths = sorted(set(map(int, _LENGTHS.value)))
    if _PLOT.value and pathlib.Path(_PLOT.value).suffix != ".png":
        cli.fail(f"--plot={_PLOT.value}; the plot is a PNG, and its name ends in .png.")
    with cli.user_errors(OSError):  # now, not when all is measured
        for path in filter(None, (_JSON.value, _PLOT.value)):
            open(path, "a").close()

    import jax

    rows = [measure(case, length, _REPEATS.value) for case in cases() for length in lengths]
    figures = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": [asdict(row) for row in rows],
    }
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=1)
    if _PLOT.value:
        plot(rows, _PLOT.value)
    print_table("depth in instructions, by tokens", rows, lambda row: f"{row.depth:,}")
    title = f"milliseconds on {figures['device']}, by tokens"
    print_table(title, rows, lambda row: f"{1000 * row.seconds:,.1f}")


def print_table(title: str, rows: list[Row], text: Callable[[Row], str]) -> None:
    """Prints a table: a line for each case, a column for each length."""
    lengths = sorted({row.tokens for row in rows})
    lines = {}
    for row in rows:
        lines.setdefault(row.case, [row.case]).append(text(row))
    cli.print_table(title, ["", *map(str, lengths)], lines.values())


def plot(rows: list[Row], path: str) -> None:
    """Writes two plots side by side, PNG: depth and time by the number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    lines = {}
    for row in rows:
        lines.setdefault(row.case, []).append((row.tokens, row.depth, row.seconds))
    for n, (case, points) in enumerate(lines.items()):
        tokens, depths, seconds = zip(*points, strict=True)
        wide = len(lines) - n  # so that lines of the same values show under each other
        for axis, values in zip(axes, (depths, seconds), strict=True):
            axis.loglog(tokens, values, linewidth=wide, label=case)
    for axis, name in zip(axes, ("depth in instructions", "seconds"), strict=True):
        axis.set_xlabel("tokens")
        axis.set_ylabel(name)
        axis.set_xticks(tokens, labels=map(str, tokens))
        axis.minorticks_off()
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.start(main)
