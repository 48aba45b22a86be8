"""Settings of the whole suite, made before JAX starts, and what is printed after it."""

import os

from hypothesis import Phase, settings

# Half of a test is compiling. Without LLVM's optimisation that takes a third of the time; XLA's
# own passes, which the tests that read compiled programs look at, are the same.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
).strip()

# An example compiles for seconds: no deadline, and a failing one is reported as it was found, since
# shrinking it would compile hundreds of others.
settings.register_profile(
    "unison", deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
settings.load_profile("unison")


def pytest_terminal_summary(terminalreporter):
    """Prints what each compiled kernel asks of a GPU: the properties "kernel" of the reports."""
    reports = [x for outcome in ("passed", "failed") for x in terminalreporter.getreports(outcome)]
    lines = [line for x in reports for name, line in x.user_properties if name == "kernel"]
    if lines:
        terminalreporter.section("compiled kernels")
        terminalreporter.write_line("\n".join(sorted(lines)))
