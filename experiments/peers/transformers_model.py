"""A model in torch and transformers, eager: what `experiments.benchmark` is compared with.

    pip install -r experiments/peers/requirements.txt
    python experiments/peers/transformers_model.py --json=peer.json
    python experiments/peers/transformers_model.py --cases=prefill,decode --model=DIRECTORY

Same shapes and the same work as `python -m experiments.benchmark`: a training step of 4 x 256
tokens with AdamW, prefill of 512 tokens with all logits, and decoding with the cache after 512
tokens at batch 1 and 8, in float32. Without --model it is GPT-2 124M with random weights; the time
does not depend on them.

Run it by its path, not with -m: transformers would take this project's `kernels` for a library of
the same name that it uses when it finds it.
"""

import torch
import transformers
from absl import app, flags
from figures import CASES, NEW, PROMPT, THREADS, report, timed

_MODEL = flags.DEFINE_string("model", None, "A directory of transformers; default: GPT-2 124M.")


def main(argv):
    del argv
    torch.set_num_threads(THREADS.value)
    torch.manual_seed(0)
    report({"torch": torch.__version__, "transformers": transformers.__version__}, _cases(_load()))


def _load():
    if _MODEL.value is None:
        return transformers.GPT2LMHeadModel(transformers.GPT2Config())
    return transformers.AutoModelForCausalLM.from_pretrained(_MODEL.value, dtype=torch.float32)


def _cases(model):
    vocab_size = model.config.vocab_size
    if "train" in CASES.value:
        yield "train 4 x 256", 4 * 256, _train(model.train(), vocab_size)
    model.eval()
    with torch.no_grad():
        if "prefill" in CASES.value:
            tokens = torch.randint(vocab_size, (1, PROMPT))
            seconds = timed(lambda: model(tokens, use_cache=True))
            yield f"prefill {PROMPT}", PROMPT, seconds
        if "decode" in CASES.value:
            for batch in (1, 8):
                seconds = _decode(model, batch, vocab_size)
                yield f"decode after {PROMPT}, batch {batch}", batch * NEW, seconds


def _train(model, vocab_size):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(vocab_size, (4, 256))

    def step():
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return timed(step)


def _decode(model, batch, vocab_size):
    prompt = torch.randint(vocab_size, (batch, PROMPT))

    def decode(out):
        for _ in range(NEW):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

    return timed(decode, lambda: model(prompt, use_cache=True))


if __name__ == "__main__":
    app.run(main)
