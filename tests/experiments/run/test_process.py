"""A run as a process."""

import pytest

from experiments.run.process import exclusive


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(BlockingIOError, match="another process is training"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass
