"""What the programs share on the command line: a user's error is one line and no traceback."""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program of absl flags; flags that cannot be parsed end it with status 2."""

    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show, text of a model above all, must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def parse(argv):
        # ml_collections reports an unknown field as AttributeError or KeyError.
        with user_errors(flags.Error, AttributeError, KeyError, OSError, SyntaxError):
            try:
                rest = flags.FLAGS(argv)[1:]
            except SystemExit:  # absl has printed the help that was asked for, and exits with 1
                sys.exit()
        if rest:
            fail(f"unexpected argument {rest[0]!r}; options are given as --name=value.")
        return argv[:1]

    def quiet_main(argv):
        # Orbax reports each of its steps there, and tracebacks of errors that it also raises.
        absl_logging.set_verbosity(absl_logging.WARNING)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        main(argv)

    app.run(quiet_main, flags_parser=parse)


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


def fail(message: str, status: int = 2) -> NoReturn:
    """Prints one line to stderr and ends the program."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def tell_attention() -> list[str]:
    """Prints to stdout which backend attention="auto" chooses, once it is known.

    Returns:
      What was printed; it grows.
    """
    told = []

    class Tell(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())
            print(told[-1], flush=True)

    logger = logging.getLogger("kernels.backends.choice")
    logger.addHandler(Tell())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return told


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table; its first column names the rows, the others are figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = Console(width=1000)
    Console(width=wide.measure(table).maximum).print(table)  # lines may leave the screen, not wrap


def _text(error):
    if isinstance(error, AttributeError | KeyError):
        while isinstance(error, AttributeError | KeyError):
            error = error.args[0]  # str() would quote the text once more
        if "get_config" in str(error):
            return "the file of --config has no function get_config, which returns the config."
        return f"unknown config field: {error}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}, is not Python: {error.msg}."
    if "Traceback" in str(error):
        return str(error).strip().splitlines()[-1]
    return str(error)
