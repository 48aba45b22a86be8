"""What the programs share on the command line."""

import errno
import os
import subprocess
import sys

import pytest

from experiments.run import cli


def test_errors_of_the_user_are_one_line(capsys):
    with pytest.raises(SystemExit) as ended, cli.user_errors(ValueError):
        raise ValueError("two\n  lines")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: two lines\n"
    with pytest.raises(SystemExit) as ended, cli.user_errors(RuntimeError, status=1):
        raise RuntimeError("step 3")
    assert ended.value.code == 1
    with pytest.raises(KeyError), cli.user_errors(ValueError):
        raise KeyError("a bug keeps its traceback")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "error: /a/b: No space left on device; free some space there, and run "),
        (errno.EACCES, "error: /a/b: Permission denied.\n"),
    ],
)
def test_errors_of_the_system_name_the_path(capsys, number, message):
    with pytest.raises(SystemExit), cli.user_errors(OSError):
        raise OSError(number, os.strerror(number), "/a/b")
    assert capsys.readouterr().err.startswith(message)


PROGRAM = """
import logging
from experiments.run import cli

def main(argv):
    {first}
    log = logging.getLogger("transformer.any")
    log.info("known")
    log.warning("careful")
    print("\\N{{SNOWMAN}}")

cli.start(main)
"""


def program(first, *flags, **options):
    command = [sys.executable, "-c", PROGRAM.format(first=first), *flags]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_warnings_are_printed_and_other_notices_where_they_are_wanted():
    result = program("pass", env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": "."})
    assert (result.stdout, result.stderr) == ("\\u2603\n", "warning: careful\n")
    result = program("cli.print_notices()", "--unknown")
    assert result.returncode == 2 and result.stderr.startswith("error: Unknown command line flag")
    result = program("cli.print_notices()")
    assert (result.stdout, result.stderr) == ("known\n\N{SNOWMAN}\n", "warning: careful\n")


def test_a_reader_that_leaves_is_outlived():
    script = PROGRAM.format(first="cli.outlive_readers(); [print('line') for _ in range(10**5)]")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b"warning: careful\n"
    assert process.returncode == 0


def test_a_full_disk_behind_stdout_is_outlived():
    with open("/dev/full", "w") as full:
        script = PROGRAM.format(first="cli.outlive_readers()")
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "warning: careful\n")


def test_tables_fit_80_columns(capsys):
    headings = ["case", *(f"figure {n}" for n in range(6))]
    name = "a name of several words that is too long for one line"
    cli.print_table("A title", headings, [[name, *["123.4"] * 6]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(word in "\n".join(lines) for word in name.split())
    assert any(line.split()[-6:] == ["123.4"] * 6 for line in lines)


def test_what_is_compiled_is_kept(tmp_path):
    program = "\n".join(
        (
            "from experiments.run import cli",
            "def main(argv):",
            "    import jax",
            "    print(jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((9, 9))))",
            "cli.start(main)",
        )
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    kept = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.stdout, done.stderr) == ("729.0\n", "")
        kept.append(sorted(path.name for path in tmp_path.glob("unison/compiled/*-cache")))
    assert kept[0] == kept[1]
    assert kept[0]
