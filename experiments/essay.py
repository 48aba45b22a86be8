"""The essay's claims about cells, measured on a trained model.

    python -m experiments.essay --workdir=runs/demo --out=essay
    python -m experiments.essay --workdir=runs/demo --out=essay --documents=40 --length=256
    python -m experiments.essay --model=SmolLM2.gguf --out=essay --documents=8 --length=64

It takes models of any kinds of layers. It writes essay.md, a report in which every claim is a
sentence that a measurement supports or refutes; essay.json with the figures; and essay.png.
Intervals are of 95 %, over documents that were held out of training.
"""

import json
import shlex
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

from absl import flags

from experiments.run import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a trained model.")
_MODEL = flags.DEFINE_string("model", None, "Instead: any model that `transformer.load` takes.")
_OUT = flags.DEFINE_string("out", "essay", "Directory for the report.")
_TEXT = flags.DEFINE_string("text", None, "Glob of documents; default: Python's own library.")
_FRACTION = flags.DEFINE_float("fraction", 0.05, "The share of them that training held out.")
_DOCUMENTS = flags.DEFINE_integer("documents", 24, "How many are looked at.", lower_bound=4)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens of each.", lower_bound=8)
_STEPS = flags.DEFINE_integer("steps", 150, "Of the small task's training.", lower_bound=3)
_LENGTHS = flags.DEFINE_list("lengths", ["32", "64", "128"], "Numbers of tokens that are timed.")


def main(argv):
    del argv
    source = cli.one_of({"DIR": _WORKDIR, "PATH": _MODEL})
    lengths = whole_numbers(_LENGTHS)

    from experiments.suites import essay
    from experiments.suites.claims import judge
    from transformer.data.corpus import read_corpus
    from transformer.data.split import split
    from transformer.storage.checkpoint import CheckpointError
    from transformer.storage.model import load

    with cli.user_errors(ValueError, OSError, CheckpointError):
        model = load(source.value)
        documents = split(read_corpus(_TEXT.value), _FRACTION.value)[1]
        rows = rows_of(model.tokenizer, documents, _DOCUMENTS.value, _LENGTH.value)
        out = Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        ways = essay.ways(model.config, model.params, lengths)
        learned = essay.feedback_beside_plain(_STEPS.value)
        measures = essay.measures(model.config, model.params, rows)
        claims = judge(measures, learned, ways)
        report = report_of(measures, ways, claims)
        (out / "essay.md").write_text(report)
        (out / "essay.json").write_text(figures(measures, learned, ways, claims))
        plot(measures, learned, ways).savefig(out / "essay.png", dpi=120)
    print(report)


def whole_numbers(flag) -> list[int]:
    """The numbers of a list on the command line, each at least 1."""
    try:
        numbers = [int(x) for x in flag.value]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        cli.fail(f"--{flag.name}={','.join(flag.value)}; give numbers of tokens, as in 32,64.")
    return numbers


def rows_of(tokenizer, documents, count: int, length: int):
    """The first tokens of documents that are long enough: [count, length]."""
    rows = []
    for document in documents:
        tokens = [*tokenizer.document_start, *tokenizer.encode(document.text[: 20 * length])]
        if len(tokens) >= length:
            rows.append(tokens[:length])
        if len(rows) == count:
            return rows
    raise ValueError(
        f"{len(rows)} documents have {length} tokens or more; give --documents at most that, "
        "fewer tokens by --length, or more text by --text."
    )


def report_of(measures, ways, claims) -> str:
    """The report, Markdown."""
    lines = ["# The claims, measured", "", f"    {command()}", "", "## Claims", ""]
    for claim in claims:
        lines += [f"- **{claim.verdict.capitalize()}**: {claim.sentence} ({claim.figures}.)"]
    lines += ["", "## By block", "", *_by_block(measures)]
    lines += ["", "## Ways to run, by number of tokens (the fastest round)", ""]
    said = lambda way: [
        f"{min(seconds):.4f} s, {count / 1e9:.3g} Gflop"
        for seconds, count in zip(way.seconds, way.operations, strict=True)
    ]
    lines += _table(["way", *ways[0].lengths], [[way.name, *said(way)] for way in ways])
    return "\n".join([*lines, ""])


def command() -> str:
    """What was typed, which makes every figure again."""
    return f"python -m experiments.essay {shlex.join(sys.argv[1:])}"


def _by_block(measures):
    said = lambda x: [f"{m:.3f} ± {i:.3f}" for m, i in zip(x.mean, x.interval, strict=True)]
    rows = [[f"{x.name} ({x.unit})", *said(x)] for x in measures]
    return _table(["measure", *range(len(measures[0].mean))], rows)


def _table(header, rows):
    """The lines of a table in Markdown."""
    line = lambda row: f"| {' | '.join(map(str, row))} |"
    return [line(header), "|---" * len(header) + "|", *map(line, rows)]


def figures(measures, learned, ways, claims) -> str:
    """All figures, JSON."""
    of_measure = lambda x: {
        "name": x.name,
        "unit": x.unit,
        "mean": x.mean.tolist(),
        "half_interval": x.interval.tolist(),
    }
    found = {"claims": claims, "feedback": learned, "ways": ways}
    found = {name: list(map(asdict, values)) for name, values in found.items()}
    return json.dumps({**found, "measures": list(map(of_measure, measures))}, indent=1)


def plot(measures, learned, ways):
    """All measures by block with intervals, how two programs learned, and the ways to run."""
    from matplotlib.figure import Figure

    rows = -(-(len(measures) + 4) // 2)
    figure = Figure(figsize=(10, 2.3 * rows), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(command(), 110)), fontsize=8, family="monospace")
    axes = iter(figure.subplots(rows, 2).ravel())

    def panel(title, xlabel, ylabel):
        at = next(axes)
        at.set_title(title, fontsize=9)
        at.set_xlabel(xlabel, fontsize=8)
        at.set_ylabel(ylabel, fontsize=8)
        return at

    for x in measures:
        at = panel(x.name, "block", x.unit)
        at.errorbar(range(len(x.mean)), x.mean, x.interval, marker="s", capsize=3)
        at.xaxis.get_major_locator().set_params(integer=True)
    by_step, by_second = (panel("copying", x, "loss") for x in ("step", "seconds"))
    for x in learned:
        by_step.plot(x.losses, label=x.name)
        by_second.plot([sum(x.seconds[:n]) for n in range(len(x.losses))], x.losses, label=x.name)
    fastest, operations = lambda way: list(map(min, way.seconds)), lambda way: way.operations
    for name, of, unit in (("seconds", fastest, "s"), ("operations", operations, "flop")):
        at = panel(f"running T tokens, {name}", "T", unit)
        for way in ways:
            at.loglog(way.lengths, of(way), marker="o", label=way.name)
        at.set_xticks(ways[0].lengths, ways[0].lengths)
        at.minorticks_off()
        at.legend(fontsize=8)
    by_step.legend(fontsize=8)
    for at in axes:
        at.remove()
    return figure


if __name__ == "__main__":
    cli.start(main)
