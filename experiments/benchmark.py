"""How fast it is, against the limits of the machine and against a peer, measured in one run.

    python -m experiments.benchmark --suite=train,prefill,decode --preset=gpt2
    python -m experiments.benchmark --suite=attention,decode_attention,train,generate
    python -m experiments.benchmark --suite=... --json=FILE --plot=FILE
    python -m experiments.benchmark --peer=PYTHON    also the same cases in torch and transformers,
                                                     run by the Python that has them installed

Each figure is the median of repeated runs after one that does not count; compiling is apart. The
suites of attention hold every kernel against float64 on the same inputs before they time it.
"""

import datetime
import json
import pathlib
import platform
import subprocess
import tempfile

from absl import flags

from experiments.run import cli

PEER = pathlib.Path(__file__).parent / "peers" / "transformers_gpt2.py"
PEER_SUITES = ("train", "prefill", "decode")
MODEL_SUITES = (*PEER_SUITES, "generate", "capacity", "compile")
KERNEL_SUITES = ("attention", "decode_attention")
SUITES = (*MODEL_SUITES, *KERNEL_SUITES)
_SUITE = flags.DEFINE_list("suite", list(PEER_SUITES), f"Of {', '.join(SUITES)}.")
_PRESET = flags.DEFINE_string("preset", "gpt2", "Shape of the model; see transformer.presets.")
_ATTENTION = flags.DEFINE_string("attention", "auto", "Backend of attention in the model suites.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each case.", lower_bound=1)
_PEER = flags.DEFINE_string("peer", None, "A Python with torch and transformers, to compare with.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_PLOT = flags.DEFINE_string("plot", None, "File for a plot of them, PNG.")


def main(argv):
    del argv
    from kernels.backends.choice import check_backend
    from transformer.presets import presets

    with cli.user_errors(ValueError):
        check_backend(_ATTENTION.value)
    if not _SUITE.value:
        cli.fail(f"--suite is empty; choose of {', '.join(SUITES)}.")
    unknown = [name for name in _SUITE.value if name not in SUITES]
    if unknown:
        cli.fail(f"--suite has no {', '.join(unknown)}; choose of {', '.join(SUITES)}.")
    if _PRESET.value not in presets:
        cli.fail(f"--preset={_PRESET.value} does not exist; choose one of {', '.join(presets)}.")
    if _PEER.value and _PRESET.value != "gpt2":
        cli.fail("--peer runs GPT-2 124M; use it with --preset=gpt2.")

    if _PLOT.value and pathlib.Path(_PLOT.value).suffix != ".png":
        cli.fail(f"--plot={_PLOT.value}; the plot is a PNG, and its name ends in .png.")
    with cli.user_errors(OSError):  # now, not when all is measured
        for path in filter(None, (_JSON.value, _PLOT.value)):
            open(path, "a").close()

    import jax

    from experiments.suites import report, timing

    config = presets[_PRESET.value]
    if jax.default_backend() != "cpu":
        config = config.replace(dtype="bfloat16")
    limits = timing.measure_limits(config.compute_dtype)
    print(f"{jax.devices()[0].device_kind}: {limits}", flush=True)
    told = cli.tell_attention()
    rows = []
    for name in _SUITE.value:
        with cli.user_errors(NotImplementedError):
            for figure in _figures(name, config):
                rows.append(report.row(figure, limits))
                print(report.line(rows[-1]), flush=True)
        if _PEER.value and name in PEER_SUITES:
            _add_peer(rows, name)
    figures = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "preset": _PRESET.value,
        "dtype": config.dtype,
        "attention": _ATTENTION.value,
        "attention_chosen": told,
        "limits": vars(limits),
        "rows": rows,
    }
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=1)
    if _PLOT.value:
        report.plot(figures, _PLOT.value)
    report.print_tables(figures, limits)


def _figures(name, config):
    """Runs one suite: an iterator of its figures."""
    if name in MODEL_SUITES:
        from experiments.suites import model

        config = config.replace(max_length=max(config.max_length, model.PROMPT + model.NEW))
        return getattr(model, name)(config, _REPEATS.value, _ATTENTION.value)
    from experiments.suites import attention

    return getattr(attention, name)(_REPEATS.value)


def _add_peer(rows, suite):
    """Runs one suite of the peer and notes its rates beside ours."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        # Without PYTHONPATH, where transformers would take our kernels for a library of that name.
        command = [_PEER.value, "-E", str(PEER)]
        options = [f"--cases={suite}", f"--json={file.name}", f"--repeats={_REPEATS.value}"]
        with cli.user_errors(OSError, subprocess.CalledProcessError):
            subprocess.run(command + options, check=True, stdout=subprocess.DEVNULL)
        peer = json.load(file)
    for row in rows:
        rate = peer.get(f"{row['suite']} {row['case']}")
        if rate:
            row["peer_tokens_per_second"] = rate["tokens_per_second"]
            row["ratio"] = row["tokens_per_second"] / rate["tokens_per_second"]


if __name__ == "__main__":
    cli.run(main)
