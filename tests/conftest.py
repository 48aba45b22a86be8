"""Settings of the whole suite, made before JAX starts, random numbers, and what is printed."""

import gc
import os
import secrets
import sys
import zlib
from importlib.metadata import version
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import Phase, settings

# Most of a test is compiling. Without LLVM's optimisation, with all of a program as one piece, and
# with the older way to make code of a fusion where there still is one, that takes a sixth of the
# time. Which numbers share a multiply-add then depends on what is compiled around them, so equal
# bits are tested without these flags.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
OLDER_FUSIONS = version("jaxlib").startswith("0.10.")
if OLDER_FUSIONS:
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if "UNISON_TESTS_OPTIMISED" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# Nobody looks where in Python an operation of a compiled program was made; saying it takes a sixth
# of the time of lowering one.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Tracing makes many objects that live on; looking for garbage among them took a tenth of the time.
gc.set_threshold(100_000, 50, 10)

LARGE = 1_500_000_000  # bytes of a process that had better forget what it has compiled

# An example compiles for seconds: no deadline, and a failing one is reported as it was found, since
# shrinking it would compile hundreds of others.
settings.register_profile(
    "unison", deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
settings.load_profile("unison")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="repeats the random numbers of a run of the tests")
    parser.addoption("--thorough", action="store_true", help="runs every combination")


def pytest_configure(config):
    """Draws the seed of this run, unless --seed or the process that xdist began gives it.

    And makes a place for what is compiled, which all processes of the run share.
    """
    given = getattr(config, "workerinput", {}).get("seed", config.getoption("--seed"))
    config.seed = secrets.randbits(32) if given is None else given
    if not hasattr(config, "workerinput"):
        # What one process compiles the others of this run need not compile again.
        folder = TemporaryDirectory(prefix="unison-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    config.addinivalue_line("markers", "thorough: a combination that only --thorough runs")


def pytest_collection_modifyitems(config, items):
    """Leaves out what only --thorough runs; what it is about is in combinations that do run."""
    if not config.getoption("--thorough"):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="one of many combinations: --thorough"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["seed"] = node.config.seed


def pytest_report_header(config):
    return f"seed: {config.seed} (--seed={config.seed} draws the same random numbers)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed:
        report.sections.append(("Random numbers", f"--seed={item.config.seed} draws them again"))
    return report


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
    """Modules share small operations; but a process that forgets nothing grows to 5 GB."""
    yield
    if "jax" in sys.modules and _resident() > LARGE:
        sys.modules["jax"].clear_caches()


def _resident() -> int:
    """Bytes of memory that this process holds; where that is not known, more than any limit."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return sys.maxsize


@pytest.fixture(scope="session")
def seed(request) -> int:
    """The seed of this run of the tests, new each time unless --seed gives it."""
    return request.config.seed


@pytest.fixture
def rng(request, seed) -> np.random.Generator:
    """Random numbers of one test, which do not depend on the tests before it."""
    return np.random.default_rng((seed, zlib.crc32(request.node.nodeid.encode())))


@pytest.fixture
def cache_dir(tmp_path):
    """The directory of JAX's persistent cache, for one test."""
    import jax  # not above, so that what is set here counts

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="session")
def compiled_text():
    """compiled_text(lowered) is the program that XLA makes of it for users, as text."""
    # The older fusions go with another choice of passes, which leaves no scatter.
    options = {"xla_cpu_use_fusion_emitters": True} if OLDER_FUSIONS else None
    return lambda lowered: lowered.compile(compiler_options=options).as_text()


def pytest_terminal_summary(terminalreporter):
    """Prints what each compiled kernel asks of a GPU: the properties "kernel" of the reports."""
    reports = [x for outcome in ("passed", "failed") for x in terminalreporter.getreports(outcome)]
    lines = [line for x in reports for name, line in x.user_properties if name == "kernel"]
    if lines:
        terminalreporter.section("compiled kernels")
        terminalreporter.write_line("\n".join(sorted(lines)))
