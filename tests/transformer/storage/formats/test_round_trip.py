"""What `save` writes, transformers reads: equal logits for every architecture.

Set PEER_PYTHON to a Python with experiments/peers/requirements.txt installed.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from transformer import load, save

FIXTURES = sorted(Path(__file__).with_name("fixtures").iterdir())
READ = """
import sys
import numpy as np, torch, transformers

for directory in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(directory + "/tokens.npy").astype(np.int64))
    with torch.no_grad():
        np.save(directory + "/logits.npy", model.eval()(tokens[None]).logits[0].numpy())
"""


def test_transformers_reads_what_is_written(reference, tmp_path):
    python = os.environ.get("PEER_PYTHON")
    if not python:
        pytest.skip("PEER_PYTHON names no Python that has torch and transformers")
    saved = {}
    for fixture in FIXTURES:
        path = tmp_path / fixture.name
        save(load(fixture), path, format="huggingface")
        np.save(path / "tokens.npy", reference(fixture)[0])
        saved[fixture] = path
    # Without PYTHONPATH, where transformers would take our kernels for a library of that name.
    command = [python, "-E", "-c", READ, *map(str, saved.values())]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert not result.returncode, result.stderr
    for fixture, path in saved.items():
        logits = reference(fixture)[1]
        # The same program in the same type: what is not equal is the order of sums.
        np.testing.assert_allclose(
            np.load(path / "logits.npy"), logits, rtol=0, atol=1e-5, err_msg=fixture.name
        )
