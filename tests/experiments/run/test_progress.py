"""What a terminal shows of a run."""

import io

import pytest
from rich.console import Console

from experiments.run.progress import Progress

ROW = {"step": 1009, "loss": 3.12345, "tokens_per_second": 12345.6}


def shown(width):
    """The last state of the line on a terminal of a width, and what is left of its escapes."""
    file = io.StringIO()
    clock = iter(range(10**6))
    console = Console(
        file=file, force_terminal=True, width=width, color_system=None, get_time=lambda: next(clock)
    )
    with Progress(1000, 20_000, console) as progress:
        for step in range(1001, 1010):
            progress.advance(step)
        progress.show(ROW, 0)
    return file.getvalue().replace("\x1b[2K", "").split("\r")[-1].partition("\n")[0]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_a_narrow_terminal_shows_step_total_and_time_left(width):
    line = shown(width)
    assert len(line) <= width
    assert line.startswith("step 1009/20000  ") and " left" in line and "…" not in line
    assert ("loss 3.1235" in line) == (width > 40)
    assert "12,346 tokens/s" in line or width < 80


def test_elsewhere_there_are_plain_lines(capsys):
    with Progress(0, 20_000) as progress:
        progress.advance(1009)
        progress.show(ROW, 5400)
    assert capsys.readouterr().out == (
        "step 1009/20000  loss 3.1235  12,346 tokens/s  1:30:00 left\n"
    )


def test_what_is_said_holds_no_control_characters(capsys):
    with Progress(0, 1) as progress:
        progress.say("a\nc\x1b[31m\r\x07\x9b\u00e9")
    assert capsys.readouterr().out == "a\nc\\x1b[31m\\x0d\\x07\\x9b\u00e9\n"
