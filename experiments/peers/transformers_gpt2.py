"""GPT-2 124M in torch and transformers, eager: what `experiments.benchmark` is compared with.

    pip install -r experiments/peers/requirements.txt
    python experiments/peers/transformers_gpt2.py --json=peer.json

Same shapes and the same work as `python -m experiments.benchmark --preset=gpt2`: a training step of
4 x 256 tokens with AdamW, prefill of 512 tokens with all logits, and decoding with the cache after
512 tokens at batch 1 and 8. Random weights; the time does not depend on them.

Run it by its path, not with -m: transformers would take this project's `kernels` for a library of
the same name that it uses when it finds it.
"""

import json
import statistics
import time

import torch
import transformers
from absl import app, flags

_JSON = flags.DEFINE_string("json", None, "File for the figures; printed anyway.")
_THREADS = flags.DEFINE_integer("threads", 2, "Threads torch may use.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each case.", lower_bound=1)
_CASES = flags.DEFINE_list("cases", ["train", "prefill", "decode"], "What to time.")
_DECODED = 32


def main(argv):
    del argv
    torch.set_num_threads(_THREADS.value)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    vocab_size = model.config.vocab_size
    figures = {"torch": torch.__version__, "transformers": transformers.__version__}

    def report(name, tokens, seconds):
        rates = sorted(tokens / s for s in seconds)
        figures[name] = {
            "tokens_per_second": statistics.median(rates),
            "slowest": rates[0],
            "fastest": rates[-1],
        }
        print(
            f"{name}: {statistics.median(rates):.1f} tokens/s ({rates[0]:.1f} to {rates[-1]:.1f})"
        )

    if "train" in _CASES.value:
        report("train 4 x 256", 4 * 256, _train(model.train(), vocab_size))
    model.eval()
    with torch.no_grad():
        if "prefill" in _CASES.value:
            tokens = torch.randint(vocab_size, (1, 512))
            report("prefill 512", 512, _timed(lambda: model(tokens, use_cache=True)))
        if "decode" in _CASES.value:
            for batch in (1, 8):
                seconds = _decode(model, batch, vocab_size)
                report(f"decode after 512, batch {batch}", batch * _DECODED, seconds)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(figures, file, indent=1)


def _timed(call):
    """Seconds of each repeat, after one run that is not counted."""
    call()
    seconds = []
    for _ in range(_REPEATS.value):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _train(model, vocab_size):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(vocab_size, (4, 256))

    def step():
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return _timed(step)


def _decode(model, batch, vocab_size):
    prompt = torch.randint(vocab_size, (batch, 512))

    def decode(past, token):
        for _ in range(_DECODED):
            out = model(token, past_key_values=past, use_cache=True)
            past, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    seconds = []
    for _ in range(_REPEATS.value + 1):
        out = model(prompt, use_cache=True)
        begin = time.perf_counter()
        decode(out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True))
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


if __name__ == "__main__":
    app.run(main)
