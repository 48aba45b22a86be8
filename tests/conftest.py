"""Settings of the whole suite, made before JAX starts."""

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
