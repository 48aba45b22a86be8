"""Figures for people and for programs, as rows, lines, tables and a plot."""

import math

from experiments.run import cli
from experiments.suites.timing import Figure, KernelFigure, Limits


def row(figure: Figure, limits: Limits, numerics: str = "fast") -> dict:
    """Makes a JSON object of a figure; its rates are those of the median run."""
    entry = {
        "suite": figure.suite,
        "case": figure.case,
        "numerics": numerics,
        "seconds": figure.median,
        "fastest_seconds": figure.seconds[0],
        "slowest_seconds": figure.seconds[-1],
        "compile_seconds": figure.compile_seconds,
        "flops": figure.flops,
        "bytes": figure.bytes,
        "bound": "memory" if figure.memory_bound(limits) else "compute",
        "flops_per_second": figure.flops / figure.median,
        "bytes_per_second": figure.bytes / figure.median,
        "share_of_limit": figure.share(limits),
        "limits": vars(limits),
    }
    if isinstance(figure, KernelFigure):
        error = figure.error  # JSON has no nan
        error = "nan" if error is not None and math.isnan(error) else error
        return entry | {"kernel": figure.kernel, "error": error}
    return entry | {"tokens_per_second": figure.tokens / figure.median}


def add_costs(rows: list[dict]) -> None:
    """Notes in the rows of exact numerics how many times as long they took as the fast ones."""
    name = lambda row: (row["suite"], row["case"])
    fast = {name(row): row["seconds"] for row in rows if row["numerics"] == "fast"}
    for row in rows:
        if row["numerics"] == "exact" and name(row) in fast:
            row["cost"] = row["seconds"] / fast[name(row)]


def line(row: dict) -> str:
    """Returns a line about a figure, for people who wait for the table."""
    rate = _work_rate(row) if "kernel" in row else f"{row['tokens_per_second']:.1f} tokens/s"
    kernel = f", {row['kernel']}" if "kernel" in row else ""
    return f"{_case(row)}{kernel}: {rate}"


def print_tables(figures: dict, limits: Limits) -> None:
    """Prints a table of the models and one of the kernels, where there are figures of them."""
    models = [row for row in figures["rows"] if "kernel" not in row]
    kernels = [row for row in figures["rows"] if "kernel" in row]
    more = _PEER_COLUMNS if any("ratio" in row for row in models) else {}
    if any("cost" in row for row in models):
        more = _COST_COLUMN | more
    for rows, name, columns in (
        (
            models,
            _title(figures),
            _MODEL_COLUMNS | more,
        ),
        (kernels, f"kernels, {figures['dtype']}", _KERNEL_COLUMNS),
    ):
        if rows:
            title = f"{name}, {figures['device']}, {figures['date']}: {limits}"
            cli.print_table(
                title, list(columns), [[text(row) for text in columns.values()] for row in rows]
            )


def _title(figures):
    """What was measured: a model, its type, and what of it is kept otherwise."""
    kept = [f"{name} in {figures[name]}" for name in ("weights", "cache") if figures[name]]
    return ", ".join([figures["model"], figures["dtype"], *kept])


def _work_rate(row):
    if row["bound"] == "compute":
        return f"{row['flops_per_second'] / 1e12:.3g} TFLOP/s"
    return f"{row['bytes_per_second'] / 1e9:.3g} GB/s"


def _spread(row):
    return f"{row['slowest_seconds'] / row['fastest_seconds'] - 1:.0%}"


def _share(row):
    return f"{row['share_of_limit']:.0%}"


def _compile_seconds(row):
    return f"{row['compile_seconds']:.1f} s"


def _case(row):
    exact = ", exact" if row["numerics"] == "exact" else ""
    return f"{row['suite']} {row['case']}{exact}"


def _if_there(row, name, text):
    value = row.get(name)
    return "-" if value is None else value if isinstance(value, str) else text.format(value)


_MODEL_COLUMNS = {
    "case": _case,
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "spread": _spread,
    "of limit": _share,
    "compile": _compile_seconds,
}
_COST_COLUMN = {"of fast": lambda row: _if_there(row, "cost", "x {:.2f}")}
_PEER_COLUMNS = {
    "peer": lambda row: _if_there(row, "peer_tokens_per_second", "{:.1f}"),
    "ratio": lambda row: _if_there(row, "ratio", "x {:.2f}"),
}
_KERNEL_COLUMNS = {
    "case": _case,
    "kernel": lambda row: row["kernel"],
    "rate": _work_rate,
    "spread": _spread,
    "of limit": _share,
    "compile": _compile_seconds,
    "error": lambda row: _if_there(row, "error", "{:.1e}"),
}


def plot(figures: dict, path: str) -> None:
    """Writes bar charts into a PNG, one for each case, with rivals and peer side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {}
    for row in figures["rows"]:
        bars = cases.setdefault(_case(row), {})
        if "kernel" in row:
            bars[row["kernel"]] = row["share_of_limit"]
        else:
            bars["Unison"] = row["tokens_per_second"]
            if "ratio" in row:
                bars["peer"] = row["peer_tokens_per_second"]
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3 * columns, 3 * lines), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    for axis, (case, bars) in zip(axes.flat, cases.items(), strict=False):
        own = ("Unison", "triton", "xla")
        axis.bar(list(bars), bars.values(), color=[f"C{0 if name in own else 7}" for name in bars])
        axis.set_title(case, fontsize=8)
        axis.set_ylabel("tokens/s" if "Unison" in bars else "share of the limit", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{figures['device']}, {figures['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
