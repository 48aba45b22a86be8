"""Makes fixtures/processors.npz: what the logits processors of transformers make of some logits.

It needs packages that the tests do not, in an environment of its own:

    pip install torch==2.13.0 transformers==5.24.0
    python tests/transformer/inference/make_fixtures.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers.generation import logits_process as theirs

ROWS, V, T = 6, 40, 12

PROCESSORS = {
    "repetition": [theirs.RepetitionPenaltyLogitsProcessor(1.3)],
    "bias": [theirs.SequenceBiasLogitsProcessor({(3,): 2.5, (7,): -1.0})],
    "temperature": [theirs.TemperatureLogitsWarper(0.7)],
    "top_k": [theirs.TopKLogitsWarper(5)],
    "top_p": [theirs.TopPLogitsWarper(0.8)],
    "min_p": [theirs.MinPLogitsWarper(0.2)],
    "all": [
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.SequenceBiasLogitsProcessor({(3,): 2.5, (7,): -1.0}),
        theirs.TemperatureLogitsWarper(0.7),
        theirs.TopKLogitsWarper(9),
        theirs.TopPLogitsWarper(0.8),
        theirs.MinPLogitsWarper(0.1),
    ],
}

rng = np.random.default_rng(0)
logits = rng.normal(0, 3, (ROWS, V)).astype(np.float32)
tokens = rng.integers(0, V, (ROWS, T))
arrays = {"logits": logits, "tokens": tokens.astype(np.int32)}
for name, processors in PROCESSORS.items():
    made = torch.tensor(logits)
    for processor in processors:
        made = processor(torch.tensor(tokens), made)
    arrays[name] = made.numpy()
np.savez_compressed(Path(__file__).parent / "fixtures" / "processors.npz", **arrays)
