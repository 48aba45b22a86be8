"""Random numbers of tests: new each time, and drawn again where a failure is looked into."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

TEST = """
def test_it(rng, seed):
    raise AssertionError(f"drawn: {rng.integers(2**40)}")
"""


def failing_test(folder, *options):
    """What pytest prints of a test that fails with a random number."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_a_failure_says_how_to_draw_its_numbers_again(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(TEST)
    first = failing_test(tmp_path)
    [seed] = re.findall(r"^--seed=(\d+) draws them again$", first, re.MULTILINE)
    drawn = lambda text: re.findall(r"^E .*drawn: (\d+)", text, re.MULTILINE)
    assert drawn(first) and drawn(failing_test(tmp_path, f"--seed={seed}")) == drawn(first)
    assert drawn(failing_test(tmp_path, f"--seed={int(seed) + 1}")) != drawn(first)
