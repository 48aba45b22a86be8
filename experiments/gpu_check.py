"""The first minutes on a GPU: `make gpu-check`, or `python -m experiments.gpu_check --out=DIR`.

Checks the kernels on the device, then times them beside their rivals, and decoding with XLA's
command buffers (CUDA graphs) off, as they are by default, and around the whole loop. Writes DIR,
in which every file has the name of the device: `checks` and the figures as JSON, the plots as PNG.
Ends with status 1 if a check failed; the figures are then not taken.

Where JAX sees no GPU it says so and ends with 1, too. On any device:

    python -m experiments.gpu_check --backend=xla --nofigures
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from absl import flags

from experiments.run import cli

_OUT = flags.DEFINE_string("out", "runs/gpu", "Folder for what is written.")
_BACKEND = flags.DEFINE_string("backend", "triton", "Backend of attention that is checked.")
_FIGURES = flags.DEFINE_bool("figures", True, "Whether kernels and decoding are timed too.")

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "tokamax", "jax-cuda13-plugin")
COMMAND_BUFFERS = {
    "off": "--xla_gpu_enable_command_buffer=",
    "default": "",
    "loop": "--xla_gpu_enable_command_buffer=+WHILE",
}


def main(argv):
    """Checks, times and writes."""
    del argv
    import jax

    from experiments.suites.gpu_checks import checks
    from kernels.backends.choice import check_backend

    with cli.user_errors(ValueError):
        check_backend(_BACKEND.value)
    device = jax.devices()[0].device_kind
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    folder = Path(_OUT.value)
    about = {"device": device, "backend": _BACKEND.value, "versions": _versions()}
    print(f"{device}: " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    found = []
    try:
        for check in checks(_BACKEND.value):
            found.append(check)
            mark = "" if check.passed else f"  FAILED, at most {check.allowed:.1e}"
            print(f"{check.name}: {check.difference:.1e}{mark}", flush=True)
    except NotImplementedError as error:
        missing = "" if jax.default_backend() == "gpu" else f"JAX sees no GPU here, only {device}: "
        cli.fail(f"{missing}{error}", status=1)
    about["checks"] = [check._asdict() | {"passed": check.passed} for check in found]
    with cli.user_errors(OSError, status=1):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}-checks.json").write_text(json.dumps(about, indent=1))
    failed = sum(not check.passed for check in found)
    if failed:
        cli.fail(f"{failed} of {len(found)} checks failed.", status=1)
    if _FIGURES.value:
        jax.clear_caches()
        _time("attention,decode_attention", folder / f"{name}-kernels", "")
        for case, flag in COMMAND_BUFFERS.items():
            _time("decode,generate", folder / f"{name}-decode-buffers-{case}", flag)
    print(f"written to {folder}")


def _versions():
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _time(suites, path, flag):
    """Runs suites of the benchmark in a process of their own, which XLA's flags need."""
    options = f"--suite={suites}", f"--json={path}.json", f"--plot={path}.png"
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has memory of the device too
    }
    result = subprocess.run([sys.executable, "-m", "experiments.benchmark", *options], env=env)
    if result.returncode:
        cli.fail(f"the benchmark of {suites} failed.", status=1)


if __name__ == "__main__":
    cli.start(main)
