"""How fast it is, against the limits of the machine and against a peer, measured in one run.

    python -m experiments.benchmark --suite=train,prefill,decode --preset=gpt2
    python -m experiments.benchmark --suite=... --json=FILE --plot=FILE
    python -m experiments.benchmark --peer=PYTHON    also the same cases in torch and transformers,
                                                     run by the Python that has them installed

Each figure is the median of repeated runs after one that does not count; compiling is apart.
"""

import datetime
import json
import pathlib
import platform
import subprocess
import tempfile

from absl import flags

from experiments import cli

PEER = pathlib.Path(__file__).parent / "peers" / "transformers_gpt2.py"
SUITES = ("train", "prefill", "decode", "capacity", "compile")
_SUITE = flags.DEFINE_list("suite", ["train", "prefill", "decode"], f"Of {', '.join(SUITES)}.")
_PRESET = flags.DEFINE_string("preset", "gpt2", "Shape of the model; see transformer.presets.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each case.", lower_bound=1)
_PEER = flags.DEFINE_string("peer", None, "A Python with torch and transformers, to compare with.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_PLOT = flags.DEFINE_string("plot", None, "File for a plot of them, PNG.")


def main(argv):
    del argv
    from transformer.config import presets

    unknown = [name for name in _SUITE.value if name not in SUITES]
    if unknown:
        cli.fail(f"--suite has no {', '.join(unknown)}; choose of {', '.join(SUITES)}.")
    if _PRESET.value not in presets:
        cli.fail(f"--preset={_PRESET.value} does not exist; choose one of {', '.join(presets)}.")
    if _PEER.value and _PRESET.value != "gpt2":
        cli.fail("--peer runs GPT-2 124M; use it with --preset=gpt2.")

    import jax

    from experiments.suites import model, timing

    config = presets[_PRESET.value]
    limits = timing.measure_limits(config.compute_dtype)
    rows = []
    for name in _SUITE.value:
        for figure in getattr(model, name)(config, _REPEATS.value):
            rows.append(_row(figure, limits))
            print(f"{figure.suite} {figure.case}: {rows[-1]['tokens_per_second']:.1f} tokens/s")
        if _PEER.value and name in ("train", "prefill", "decode"):
            _add_peer(rows, name)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "preset": _PRESET.value,
        "dtype": config.dtype,
        "limits": {"bytes_per_second": limits.bandwidth, "flops_per_second": limits.flops},
        "rows": rows,
    }
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(report, file, indent=1)
    if _PLOT.value:
        plot(report, _PLOT.value)
    print_table(report)


def _row(figure, limits):
    return {
        "suite": figure.suite,
        "case": figure.case,
        "tokens_per_second": figure.tokens / figure.median,
        "slowest": figure.tokens / figure.seconds[-1],
        "fastest": figure.tokens / figure.seconds[0],
        "compile_seconds": figure.compile_seconds,
        "flops": figure.flops,
        "bytes": figure.bytes,
        "share_of_limit": figure.share(limits),
    }


def _add_peer(rows, suite):
    """Runs one suite of the peer and notes its rates beside ours."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [_PEER.value, str(PEER)]
        options = [f"--cases={suite}", f"--json={file.name}", f"--repeats={_REPEATS.value}"]
        with cli.user_errors(OSError, subprocess.CalledProcessError):
            subprocess.run(command + options, check=True, stdout=subprocess.DEVNULL)
        peer = json.load(file)
    for row in rows:
        rate = peer.get(f"{row['suite']} {row['case']}")
        if rate:
            row["peer_tokens_per_second"] = rate["tokens_per_second"]
            row["ratio"] = row["tokens_per_second"] / rate["tokens_per_second"]


def print_table(report):
    """Prints the figures as a table for people."""
    from rich.console import Console
    from rich.table import Table

    limits = report["limits"]
    table = Table(
        title=f"{report['preset']}, {report['dtype']}, {report['device']}: reads "
        f"{limits['bytes_per_second'] / 1e9:.0f} GB/s, multiplies "
        f"{limits['flops_per_second'] / 1e12:.2g} TFLOP/s"
    )
    headings = (
        "case",
        "tokens/s",
        "slowest to fastest",
        "of the limit",
        "compile s",
        "peer",
        "ratio",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in report["rows"]:
        table.add_row(
            f"{row['suite']} {row['case']}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['slowest']:.1f} to {row['fastest']:.1f}",
            f"{row['share_of_limit']:.0%}",
            f"{row['compile_seconds']:.1f}",
            f"{row['peer_tokens_per_second']:.1f}" if "ratio" in row else "-",
            f"x {row['ratio']:.2f}" if "ratio" in row else "-",
        )
    Console().print(table)


def plot(report, path):
    """Writes a bar chart of the rates, the peer's beside ours where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    figure, axes = plt.subplots(1, len(rows), figsize=(2.2 * len(rows) + 1, 3.5), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        names = ["Unison"] + (["peer"] if "ratio" in row else [])
        rates = [row["tokens_per_second"], row.get("peer_tokens_per_second")][: len(names)]
        axis.bar(names, rates, color=["tab:blue", "tab:gray"][: len(names)])
        axis.set_title(f"{row['suite']}\n{row['case']}", fontsize=9)
    axes[0][0].set_ylabel("tokens/s")
    figure.suptitle(f"{report['preset']}, {report['dtype']}, {report['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
