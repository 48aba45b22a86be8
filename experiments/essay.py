"""The essay's claims about cells, measured on a trained model.

    python -m experiments.essay --workdir=runs/demo --out=essay
    python -m experiments.essay --workdir=runs/demo --out=essay --documents=40 --length=256
    python -m experiments.essay --model=SmolLM2.gguf --out=essay --documents=8 --length=64

It takes models of any kinds of layers. It writes essay.md, a report in which every claim is a
sentence that a measurement supports or refutes; essay.json with the figures; and essay.png.
Intervals are of 95 %, over documents that were held out of training.
"""

import json
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
_STEPS = flags.DEFINE_integer("steps", 150, "Of the small task's training.", lower_bound=2)
_LENGTHS = flags.DEFINE_list("lengths", ["32", "64", "128"], "Numbers of tokens that are timed.")


def main(argv):
    del argv
    if (_WORKDIR.value is None) == (_MODEL.value is None):
        cli.fail("give one of --workdir=DIR and --model=PATH.")

    from experiments.suites import essay
    from transformer.data.corpus import read_corpus
    from transformer.data.split import split
    from transformer.storage.checkpoint import CheckpointError
    from transformer.storage.model import load

    with cli.user_errors(ValueError, OSError, CheckpointError):
        model = load(_WORKDIR.value or _MODEL.value)
        documents = split(read_corpus(_TEXT.value), _FRACTION.value)[1]
        rows = rows_of(model.tokenizer, documents, _DOCUMENTS.value, _LENGTH.value)
        out = Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        measures = essay.measures(model.config, model.params, rows)
        learned = essay.feedback_beside_plain(_STEPS.value)
        lengths = [int(length) for length in _LENGTHS.value]
        times = essay.times(model.config, model.params, lengths)
        counts = essay.operations(model.config, model.params, lengths)
        claims = judge(measures, learned, times, counts, lengths)
        report = report_of(measures, claims)
        (out / "essay.md").write_text(report)
        (out / "essay.json").write_text(figures(measures, learned, times, counts, lengths, claims))
        plot(measures, learned).savefig(out / "essay.png", dpi=120)
    print(report)


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


def judge(measures, learned, times, counts, lengths) -> list[tuple[str, bool, str]]:
    """The claims: (sentence, whether the measurement supports it, the figures behind that)."""
    of = {measure.name: measure for measure in measures}

    def ends(name):
        """Means of the first and the last block, and whether their intervals are apart."""
        measure = of[name]
        first, last = measure.mean[0], measure.mean[-1]
        apart = abs(last - first) > measure.interval[0] + measure.interval[-1]
        said = f"{first:.3f} ± {measure.interval[0]:.3f} in the first block, "
        return last - first, apart, f"{said}{last:.3f} ± {measure.interval[-1]:.3f} in the last"

    claims = []

    def grows(sentence, name, sign=1):
        change, apart, said = ends(name)
        claims.append((sentence, bool(apart and sign * change > 0), f"{name}: {said}"))

    grows(
        "Late cells say more than early ones about the token that comes next.",
        "a linear probe of its cells finds the token after",
    )
    grows(
        "Early cells say more than late ones about their own token.",
        "a linear probe of its cells finds its own token",
        sign=-1,
    )
    grows("Late blocks are read from further back.", "how far back it is read")
    grows(
        "What is written last cannot be processed much further: the later the block, the nearer "
        "the lens is to the prediction.",
        "the lens after it agrees with the model",
    )
    up_to, on = (
        of[name].mean
        for name in (
            "loss with reads of the blocks up to this one only",
            "loss with reads from this block on only",
        )
    )
    middle = len(up_to) // 2
    claims.append(
        (
            "Early blocks are weak and late ones strong: a model that may read only its late half "
            "loses less than one that may read only its early half.",
            bool(on[middle] < up_to[middle - 1]),
            f"{on[middle]:.3f} nats more with the late half, {up_to[middle - 1]:.3f} with the "
            "early half",
        )
    )
    plain, feedback = learned
    claims.append(
        (
            "The late block cannot be read early but at the price of depth: the feedback "
            "transformer is deeper, and slower per step.",
            feedback.depth > plain.depth and feedback.seconds > plain.seconds,
            f"depth {feedback.depth} against {plain.depth}, {1e3 * feedback.seconds:.1f} ms a step "
            f"against {1e3 * plain.seconds:.1f}; loss after {len(plain.losses)} steps "
            f"{feedback.losses[-1]:.3f} against {plain.losses[-1]:.3f}",
        )
    )
    cached, recomputed, parallel = (
        times[name][-1] for name in ("one by one", "without a cache", "parallel")
    )
    operations = {name: count[-1] / 1e9 for name, count in counts.items()}
    claims.append(
        (
            "A cache saves the work of recomputing, and all tokens at once are faster than one by "
            "one.",
            parallel < cached < recomputed,
            f"{lengths[-1]} tokens: {parallel:.4f} s and {operations['parallel']:.3g} Gflop at "
            f"once, {cached:.4f} s and {operations['one by one']:.3g} one by one, "
            f"{recomputed:.4f} s and {operations['without a cache']:.3g} without a cache",
        )
    )
    return claims


def report_of(measures, claims) -> str:
    """The report, Markdown."""
    which = f"--workdir={_WORKDIR.value}" if _MODEL.value is None else f"--model={_MODEL.value}"
    command = f"python -m experiments.essay {which} --out={_OUT.value}"
    command += f" --documents={_DOCUMENTS.value} --length={_LENGTH.value} --steps={_STEPS.value}"
    lines = ["# The claims, measured", "", f"    {command}", "", "## Claims", ""]
    for sentence, supported, figures in claims:
        lines += [f"- **{'Supported' if supported else 'Refuted'}**: {sentence} ({figures}.)"]
    blocks = range(len(measures[0].mean))
    lines += ["", "## By block", "", f"| measure | {' | '.join(map(str, blocks))} |"]
    lines += ["|---" * (len(blocks) + 1) + "|"]
    for x in measures:
        cells = [f"{m:.3f} ± {i:.3f}" for m, i in zip(x.mean, x.interval, strict=True)]
        lines += [f"| {x.name} ({x.unit}) | {' | '.join(cells)} |"]
    return "\n".join([*lines, ""])


def figures(measures, learned, times, counts, lengths, claims) -> str:
    """All figures, JSON."""
    of_measure = lambda x: {
        "name": x.name,
        "unit": x.unit,
        "mean": x.mean.tolist(),
        "half_interval": x.interval.tolist(),
    }
    found = {
        "claims": [dict(zip(("claim", "supported", "figures"), x, strict=True)) for x in claims],
        "measures": list(map(of_measure, measures)),
        "feedback": [asdict(x) for x in learned],
        "seconds": {"tokens": lengths, **times},
        "operations": {"tokens": lengths, **counts},
    }
    return json.dumps(found, indent=1)


def plot(measures, learned):
    """All measures by block, with their intervals, and how the two programs learned."""
    from matplotlib.figure import Figure

    rows = -(-(len(measures) + 1) // 2)
    figure = Figure(figsize=(10, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, 2).ravel()
    for at, x in zip(axes, measures, strict=False):
        at.errorbar(range(len(x.mean)), x.mean, x.interval, marker="s", capsize=3)
        at.set_title(x.name, fontsize=9)
        at.set_xlabel("block", fontsize=8)
        at.set_ylabel(x.unit, fontsize=8)
    last = axes[len(measures)]
    for x in learned:
        last.plot(x.losses, label=f"{x.name}, {1e3 * x.seconds:.1f} ms a step")
    last.set_title("copying, loss by step", fontsize=9)
    last.legend(fontsize=8)
    for at in axes[len(measures) + 1 :]:
        at.remove()
    return figure


if __name__ == "__main__":
    cli.start(main)
