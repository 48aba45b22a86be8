"""Samples from a model: `python -m experiments.sample --workdir=DIR --prompt=TEXT`.

Text is printed as it comes. Several prompts, or several samples of each, run as one batch and are
printed one after the other; with --json, one object per sample and line.
"""

import dataclasses
import json
import sys

from absl import flags

from experiments.run import cli

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of a training run, or a saved model.", required=True
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "Text to go on from; repeat it for several prompts.", required=True
)
# The fields of `transformer.inference.options.Options` that make sense on a command line.
_OPTIONS = (
    flags.DEFINE_integer("max_new_tokens", 128, "Tokens of a sample, at most."),
    flags.DEFINE_float("temperature", 1.0, "0 takes the most likely token."),
    flags.DEFINE_integer("top_k", None, "Draw from the k most likely tokens."),
    flags.DEFINE_float("top_p", None, "Draw from the likeliest tokens that hold this share."),
    flags.DEFINE_float("min_p", None, "Draw from tokens this likely against the likeliest."),
    flags.DEFINE_float("repetition_penalty", 1.0, "Divides logits of what was there before."),
    flags.DEFINE_float("presence_penalty", 0.0, "Taken off logits of what was written."),
    flags.DEFINE_float("frequency_penalty", 0.0, "The same, for each time that it was."),
    flags.DEFINE_integer("batch_size", None, "Samples that are drawn at once; default: all."),
    flags.DEFINE_integer("seed", 0, "The same seed draws the same samples."),
    flags.DEFINE_multi_string("stop", [], "Text that ends a sample; may be repeated."),
    flags.DEFINE_string("attention", "auto", "Backend of `kernels.attention`."),
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples of each prompt.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object per sample.")


def main(argv):
    """Loads the model and prints the samples."""
    del argv
    # Here and not above, so that --help needs no import of jax.
    from transformer.inference.generate import stream
    from transformer.storage.checkpoint import CheckpointError
    from transformer.storage.model import load

    prompts = [prompt for prompt in _PROMPT.value for _ in range(_NUM_SAMPLES.value)]
    with cli.user_errors(ValueError, OSError, CheckpointError):
        pieces = stream(
            load(_WORKDIR.value),
            prompts,
            **{flag.name: flag.value for flag in _OPTIONS},
        )
    show = _print_json if _JSON.value else _print_text
    try:
        with cli.user_errors(NotImplementedError), cli.user_errors(FloatingPointError, status=1):
            show(prompts, _in_order(pieces, len(prompts)))
    except KeyboardInterrupt:
        print()
        sys.exit(130)


def _in_order(pieces, count):
    """The pieces of the first prompt, then those of the second: what comes early has to wait."""
    waiting = [[] for _ in range(count)]
    turn = 0
    for piece in pieces:
        waiting[piece.index].append(piece)
        while turn < count and waiting[turn]:
            piece = waiting[turn].pop(0)
            yield piece
            turn += piece.completion is not None


def _print_text(prompts, pieces):
    begun = -1
    for piece in pieces:
        if piece.index > begun:
            begun = piece.index
            if len(prompts) > 1:
                print(f"=== {begun + 1} of {len(prompts)} ===")
            print(prompts[begun], end="")
        print(piece.text, end="\n" if piece.completion else "", flush=True)


def _print_json(prompts, pieces):
    for piece in pieces:
        if piece.completion:
            sample = {"prompt": prompts[piece.index], **dataclasses.asdict(piece.completion)}
            print(json.dumps(sample), flush=True)


if __name__ == "__main__":
    cli.start(main)
