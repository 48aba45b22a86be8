"""Starts programs in copies of one process that has imported what takes long to import.

A line of JSON on stdin asks for one: its source, its arguments, folder and environment, and the
files that take what it prints. A line on stdout answers with its exit status. A copy begins where
a new Python does once these imports are done: no device of JAX has been looked for yet, so
XLA_FLAGS count. Only what Python and JAX read when they are imported, variables as PYTHONIOENCODING
and JAX_PLATFORMS, are those of this process.
"""

import gc
import importlib
import json
import os
import sys
import types

SLOW = (
    "experiments.run.prepare",
    "grain",
    "matplotlib.figure",
    "orbax.checkpoint",
    "rich.console",
    "rich.table",
    "tensorboardX",
    "transformer",
)


def asked_for() -> dict:
    """Returns in a new process, with what it is asked to run; this one ends with stdin."""
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    sys.exit()


def become(request):
    """Takes the place of a new process."""
    for number, path in enumerate((os.devnull, request["out"], request["err"])):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["folder"]
    sys.argv = ["-c", *request["arguments"]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(request["source"], vars(main))


if __name__ == "__main__":
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()  # memory that the search for garbage touches is no longer shared with the copies
    become(asked_for())
