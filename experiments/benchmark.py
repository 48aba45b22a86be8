"""How fast it is, against the limits of the machine and against a peer, measured in one run.

    python -m experiments.benchmark --suite=train,prefill,decode --preset=gpt2
    python -m experiments.benchmark --suite=attention,decode_attention,train,generate
    python -m experiments.benchmark --model=PATH     a published model instead of random parameters
    python -m experiments.benchmark --numerics=fast,exact    what equal bits cost
    python -m experiments.benchmark --suite=... --json=FILE --plot=FILE
    python -m experiments.benchmark --peer=PYTHON    also the same cases in a peer, run by a Python
                                                     that has it: llama.cpp for a file of GGUF, for
                                                     all else transformers

Each figure is the median of repeated runs after a first one, which does not count; the time to
compile is a figure of its own. The suites of attention compare every kernel with float64 on the
same inputs before they time it.
"""

import datetime
import json
import pathlib
import platform
import subprocess
import tempfile

from absl import flags

from experiments.run import cli

PEERS = pathlib.Path(__file__).parent / "peers"
PEER_SUITES = ("train", "prefill", "decode")
MODEL_SUITES = (*PEER_SUITES, "parts", "generate", "capacity", "compile")
KERNEL_SUITES = ("attention", "decode_attention")
SUITES = (*MODEL_SUITES, *KERNEL_SUITES)
_SUITE = flags.DEFINE_list("suite", list(PEER_SUITES), f"Some of {', '.join(SUITES)}.")
_PRESET = flags.DEFINE_string("preset", "gpt2", "Shape of the model; see transformer.presets.")
_MODEL = flags.DEFINE_string(
    "model", None, "What `transformer.load` takes; default: random parameters of the preset."
)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the model.")
_WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "Keep the model's matrices in int8.")
_CACHE = flags.DEFINE_enum("cache", None, ["int8"], "Keep the model's keys and values in int8.")
_ATTENTION = flags.DEFINE_string("attention", "auto", "Backend of attention in the model suites.")
_NUMERICS = flags.DEFINE_list(
    "numerics",
    ["fast"],
    "fast, exact or both, in the model suites: each case in one after another.",
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed runs of each case, and of the limits.", lower_bound=1
)
_PEER = flags.DEFINE_string(
    "peer", None, "A Python with experiments/peers/requirements.txt installed, to compare with."
)
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_PLOT = flags.DEFINE_string("plot", None, "File for a plot of them, PNG.")


def main(argv):
    """Runs the suites that the flags ask for, and prints, writes and plots the figures."""
    del argv
    from transformer.presets import presets

    _check_flags(presets)
    import jax

    from experiments.suites import report, timing
    from transformer.files import naming

    config, make_params = _subject(presets)
    measure = lambda: timing.measure_limits(config.compute_dtype, _REPEATS.value)
    limits = before = measure()
    print(f"{jax.devices()[0].device_kind}: {limits}", flush=True)
    notices = cli.print_notices()
    rows, peer = [], _PEER.value
    for name in _SUITE.value:
        measured = []
        with cli.user_errors(NotImplementedError):
            for numerics, figure in _figures(name, config, make_params):
                measured.append((figure, numerics))
                print(report.line(report.row(figure, before, numerics)), flush=True)
        # Before and after each suite: a machine that is shared with others may read twice as fast
        # in another minute.
        after = measure()
        beside = before.best(after)
        rows += [report.row(figure, beside, numerics) for figure, numerics in measured]
        limits, before = limits.best(after), after
        if peer and name in PEER_SUITES:
            try:
                _add_peer(rows, peer, name)
            except (OSError, PeerError) as error:
                print(f"the peer is not run: {error}", flush=True)
                peer = None
    report.add_costs(rows)
    figures = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "model": _MODEL.value or _PRESET.value,
        "weights": _WEIGHTS.value,
        "cache": _CACHE.value,
        "dtype": config.dtype,
        "attention": _ATTENTION.value,
        "notices": notices,
        "limits": vars(limits),
        "rows": rows,
    }
    with cli.user_errors(OSError, status=1):
        if _JSON.value:
            with naming(_JSON.value):
                pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=1))
        if _PLOT.value:
            with naming(_PLOT.value):
                report.plot(figures, _PLOT.value)
    report.print_tables(figures, limits)


def _check_flags(presets):
    from kernels.backends.choice import check_backend
    from transformer.numerics.numerics import Numerics

    with cli.user_errors(ValueError):
        check_backend(_ATTENTION.value)
        for name in _NUMERICS.value:
            Numerics(name)
    if not _SUITE.value:
        cli.fail(f"--suite is empty; choose some of {', '.join(SUITES)}.")
    unknown = [name for name in _SUITE.value if name not in SUITES]
    if unknown:
        cli.fail(f"--suite has no {', '.join(unknown)}; choose some of {', '.join(SUITES)}.")
    if _PRESET.value not in presets:
        cli.fail(f"--preset={_PRESET.value} does not exist; choose one of {', '.join(presets)}.")
    if _PEER.value and not _MODEL.value and _PRESET.value != "gpt2":
        cli.fail("--peer runs GPT-2 124M, or a --model; use it with --preset=gpt2.")
    if (_DTYPE.value or _WEIGHTS.value or _CACHE.value) and not _MODEL.value:
        cli.fail("--dtype, --weights and --cache are for a --model.")
    if _PLOT.value and pathlib.Path(_PLOT.value).suffix != ".png":
        cli.fail(f"--plot={_PLOT.value}; the plot is a PNG, so its name must end in .png.")
    with cli.user_errors(OSError):  # now, and not when everything is measured
        for path in filter(None, (_JSON.value, _PLOT.value)):
            open(path, "a").close()


def _subject(presets):
    """The config, and a function that gives its parameters."""
    import jax

    from experiments.suites.model import NEW, PROMPT, random_params

    long_enough = lambda config: config.replace(max_length=max(config.max_length, PROMPT + NEW))
    if _MODEL.value:
        from transformer.storage.checkpoint import CheckpointError
        from transformer.storage.model import load

        with cli.user_errors(ValueError, OSError, CheckpointError):
            how = {"dtype": _DTYPE.value, "weights": _WEIGHTS.value, "cache": _CACHE.value}
            model = load(_MODEL.value, **how)
        config = long_enough(model.config)
        if config.positions == "learned" and config != model.config:
            cli.fail(
                f"the suites run {PROMPT + NEW} tokens, and the model has learned only "
                f"{model.config.max_length} positions."
            )
        return config, lambda: model.params
    config = long_enough(presets[_PRESET.value])
    if jax.default_backend() != "cpu":
        config = config.replace(dtype="bfloat16")
    return config, lambda: random_params(config)


def _figures(name, config, make_params):
    """Runs one suite: an iterator over pairs of numerics and figures."""
    if name in MODEL_SUITES:
        from experiments.suites import model

        for numerics in _NUMERICS.value:
            subject = model.Subject(config, make_params, _REPEATS.value, _ATTENTION.value, numerics)
            for figure in getattr(model, name)(subject):
                yield numerics, figure
        return
    from experiments.suites import attention

    for figure in getattr(attention, name)(_REPEATS.value):
        yield "fast", figure


class PeerError(Exception):
    """The peer ended with an error."""


def _add_peer(rows, python, suite):
    """Runs one suite of the peer and notes its rates beside ours."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        # Without PYTHONPATH, where transformers would take our kernels for a library of that name.
        name = "llama_cpp_model" if (_MODEL.value or "").endswith(".gguf") else "transformers_model"
        command = [python, "-E", str(PEERS / f"{name}.py")]
        options = [f"--cases={suite}", f"--json={file.name}", f"--repeats={_REPEATS.value}"]
        options += [f"--model={_MODEL.value}"] if _MODEL.value else []
        result = subprocess.run(command + options, capture_output=True, text=True)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
            raise PeerError(f"{lines[-1]}; {python} needs what {PEERS / 'requirements.txt'} lists.")
        peer = json.load(file)
    for row in rows:
        rate = peer.get(f"{row['suite']} {row['case']}")
        if rate and row["numerics"] == "fast":
            row["peer_tokens_per_second"] = rate["tokens_per_second"]
            row["ratio"] = row["tokens_per_second"] / rate["tokens_per_second"]


if __name__ == "__main__":
    # It says how long compiling takes, so nothing that was compiled before is taken.
    cli.start(main, keep_compiled=False, one_heap=True)
