"""What the programs share on the command line: a user's error is one line, without a traceback."""

import contextlib
import errno
import gc
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from experiments.run.flag_errors import describe
from experiments.run.process import keep_memory

_PACKAGES = ("transformer", "kernels", "experiments")


def start(
    main: Callable[[list[str]], None], *, keep_compiled: bool = True, one_heap: bool = False
) -> None:
    """Runs a program of absl flags; flags that cannot be parsed end it with status 2.

    Args:
      main: the program.
      keep_compiled: whether what JAX compiles is kept for the next run.
      one_heap: as in `keep_memory`, for programs that run long.
    """

    # Imports and tracing make many objects that live on: Python looks for garbage among them after
    # every 700 new ones, which takes an eighth of the time to a first token.
    gc.set_threshold(100_000)
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show, text of a model above all, must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def parse(argv):
        try:
            with flag_errors():
                rest = flags.FLAGS(argv)[1:]
        except SystemExit as ended:  # absl prints the help that was asked for, and exits with 1
            sys.exit(0 if ended.code == 1 else ended.code)
        if rest:
            fail(f"unexpected argument {rest[0]!r}; options are given as --name=value.")
        return argv[:1]

    def quiet_main(argv):
        # Orbax reports each of its steps there, and tracebacks of errors that it also raises;
        # Matplotlib, that it cannot keep a cache.
        absl_logging.set_verbosity(absl_logging.WARNING)
        for name in ("absl", "asyncio", "matplotlib"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        for name in _PACKAGES:
            logging.getLogger(name).addHandler(_notices)
            logging.getLogger(name).propagate = False
        keep_memory(one_heap)
        if keep_compiled:
            _keep_compiled()
        main(argv)

    try:
        app.run(quiet_main, flags_parser=parse)
    except BrokenPipeError:  # `| head` has read enough; Python's own last flush must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _keep_compiled():
    """JAX keeps what it compiles in the user's cache directory, unless its settings say where."""
    import jax  # not above, so that --help needs no import of jax

    from transformer.files import cache_folder

    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = cache_folder() / "compiled"
    with contextlib.suppress(OSError):  # without a place for it there is none
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Not only what takes a second: a start compiles many small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def flag_errors() -> Iterator[None]:
    """Ends the program with one line where the body, which reads flags, finds them wrong.

    The flag of a config reads others where it is defined: that is such a body too.
    """
    # ml_collections reports a field that does not exist in several ways.
    kinds = AttributeError, LookupError, OSError, SyntaxError, ValueError
    try:
        yield
    except BrokenPipeError:
        raise
    except (flags.Error, *kinds) as error:
        fail(describe(error, sys.argv))


@contextlib.contextmanager
def user_errors(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """Ends the program with one line where the body raises one of these errors.

    Args:
      *kinds: what counts as the user's error.
      status: the exit status.
    """
    try:
        yield
    except kinds as error:
        fail(_text(error), status)


def _text(error):
    if isinstance(error, OSError) and error.filename is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some space there, and run the same command again." if full else "."
        return f"{error.filename}: {error.strerror}{remedy}"
    return str(error)


def silence() -> None:
    """Prints nothing to stdout any more, as another process does; errors still go to stderr."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def one_of(choices: Mapping[str, flags.FlagHolder]) -> flags.FlagHolder:
    """The one flag that was given; where none was, or several, the program ends.

    Args:
      choices: the flags by what they take, such as DIR.
    """
    given = [flag for flag in choices.values() if flag.value is not None]
    if len(given) == 1:
        return given[0]
    *first, last = [f"--{flag.name}={takes}" for takes, flag in choices.items()]
    fail(f"give one of {', '.join(first)} and {last}.")


def fail(message: str, status: int = 2) -> NoReturn:
    """Prints one line to stderr and ends the program."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


class _Notices(logging.Handler):
    """Prints warnings to stderr, and what else the user should know to stdout."""

    def __init__(self):
        super().__init__()
        self.printed = []

    def emit(self, record):
        text = record.getMessage()
        self.printed.append(text)
        if record.levelno >= logging.WARNING:
            print(f"warning: {text}", file=sys.stderr, flush=True)
        else:
            print(text, flush=True)


_notices = _Notices()


def print_notices() -> list[str]:
    """Prints not only warnings, but also what is chosen: the backend that attention="auto" is.

    Returns:
      What was printed; it grows.
    """
    for name in _PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)
    return _notices.printed


def outlive_readers() -> None:
    """From now on what cannot be printed is lost, and no error: after `| head` nobody reads it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start
            continue
        stream.flush()
        binary = io.BufferedWriter(_Unread(stream.fileno(), "wb", closefd=False))
        wrapper = io.TextIOWrapper(
            binary, stream.encoding, errors="backslashreplace", line_buffering=True
        )
        setattr(sys, name, wrapper)


class _Unread(io.FileIO):
    """A file that takes what is written also when there is no longer anything behind it."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:  # a pipe without a reader, a terminal that is gone, a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table; its first column names the rows, the others are figures.

    Names are wrapped where the table would be wider than the terminal, or than 80 columns where
    there is none.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
