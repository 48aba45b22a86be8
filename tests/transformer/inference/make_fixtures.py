"""Makes the fixtures of this folder: what transformers makes of logits, and its beam search.

It needs packages that the tests do not, in an environment of its own:

    pip install torch==2.13.0 transformers==5.24.0
    python tests/transformer/inference/make_fixtures.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
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
FIXTURES = Path(__file__).parent / "fixtures"
np.savez_compressed(FIXTURES / "processors.npz", **arrays)

# 4 beams of a model that the tests of formats have; 24 and 37 end them.
PUBLISHED = Path(__file__).parents[1] / "storage" / "formats" / "fixtures" / "llama"
model = AutoModelForCausalLM.from_pretrained(PUBLISHED).eval()
beams = {"prompts": np.array([[3, 9, 27, 33], [40, 2, 7, 11], [5, 6, 7, 8]], np.int32)}
for penalty in (0.5, 2.0):
    for n, prompt in enumerate(beams["prompts"]):
        found = model.generate(
            torch.tensor(prompt[None]).long(),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=[24, 37],
            pad_token_id=0,
            length_penalty=penalty,
            output_scores=True,
            return_dict_in_generate=True,
        )
        beams[f"tokens {penalty} {n}"] = found.sequences[:, len(prompt) :].numpy().astype(np.int32)
        beams[f"scores {penalty} {n}"] = found.sequences_scores.numpy()
np.savez_compressed(FIXTURES / "beams.npz", **beams)
