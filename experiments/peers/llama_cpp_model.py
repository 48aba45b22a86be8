"""A file of GGUF in llama.cpp: what `experiments.benchmark --model=FILE` is compared with.

    pip install -r experiments/peers/requirements.txt
    python experiments/peers/llama_cpp_model.py --model=FILE.gguf --json=peer.json
    python experiments/peers/llama_cpp_model.py --model=FILE.gguf --write=F32.gguf --type=f32

Same shapes and the same work as `python -m experiments.benchmark`: prefill of 512 tokens with all
logits, and greedy decoding after 512 tokens at batch 1, in the type that the file has. With --write
llama.cpp writes the model in another type instead, so that both sides run the same weights.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from absl import app, flags
from figures import CASES, NEW, PROMPT, THREADS, report, timed

_MODEL = flags.DEFINE_string("model", None, "A file of GGUF.", required=True)
_WRITE = flags.DEFINE_string("write", None, "Write the model into this file, and measure nothing.")
_TYPE = flags.DEFINE_enum("type", "f32", ["f32", "f16"], "The type of its numbers there.")
_TYPES = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
}


def main(argv):
    del argv
    llama_cpp.llama_backend_init()
    if _WRITE.value:
        _write(_MODEL.value, _WRITE.value, _TYPES[_TYPE.value])
    else:
        report({"llama_cpp": llama_cpp.__version__}, _Model(_MODEL.value).cases())


def _write(source, path, kind):
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = kind, True
    status = llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(options))
    if status or not Path(path).exists():
        raise app.UsageError(f"llama.cpp cannot write {source} as {path}.")


class _Model:
    """A model with a context of one sequence."""

    def __init__(self, path):
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise app.UsageError(f"llama.cpp cannot read {path}.")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 2 * PROMPT, PROMPT, PROMPT
        options.n_threads = options.n_threads_batch = THREADS.value
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(PROMPT, 0, 1)

    def cases(self):
        """The cases that are asked for, with their seconds."""
        tokens = np.random.default_rng(0).integers(0, self._vocab_size, PROMPT)
        if "prefill" in CASES.value:
            seconds = timed(lambda: self._run(tokens, 0))
            yield f"prefill {PROMPT}", PROMPT, seconds
        if "decode" in CASES.value:
            seconds = timed(self._decode, lambda: self._run(tokens, 0))
            yield f"decode after {PROMPT}, batch 1", NEW, seconds

    def _decode(self, logits):
        for n in range(NEW):
            logits = self._run([logits.argmax()], PROMPT + n)

    def _run(self, tokens, start):
        """Runs tokens from a position on, with the logits of each; returns those of the last."""
        llama_cpp.llama_memory_seq_rm(self._memory, 0, start, -1)
        self._batch.n_tokens = len(tokens)
        for n, token in enumerate(tokens):
            self._batch.token[n], self._batch.pos[n] = int(token), start + n
            self._batch.n_seq_id[n], self._batch.seq_id[n][0] = 1, 0
            self._batch.logits[n] = True
        if llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama.cpp does not run {len(tokens)} tokens.")
        last = llama_cpp.llama_get_logits_ith(self._context, len(tokens) - 1)
        return np.ctypeslib.as_array(last, (self._vocab_size,))


if __name__ == "__main__":
    app.run(main)
