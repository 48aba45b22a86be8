"""Chats with a model: `python -m experiments.chat --model=PATH`.

PATH is a published model that has a chat template: a directory, a file of GGUF, or hf://owner/name.
Replies are printed as they come. An empty line or Ctrl-D ends the conversation, and Ctrl-C a reply;
with --prompt there is one reply, and the program ends.
"""

import sys

from absl import flags

from experiments.run import cli

_MODEL = flags.DEFINE_string("model", None, "What `transformer.load` takes.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "One message, to which there is one reply.")
_SYSTEM = flags.DEFINE_string("system", None, "What the model is told at the start.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: as in the file.")
_WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "Keep matrices in int8.")
_CACHE = flags.DEFINE_enum("cache", None, ["int8"], "Keep keys and values in int8.")
# The fields of `transformer.inference.options.Options` that make sense here.
_OPTIONS = (
    flags.DEFINE_integer("max_new_tokens", 512, "Tokens of a reply, at most."),
    flags.DEFINE_float("temperature", 0.7, "0 takes the most likely token."),
    flags.DEFINE_integer("top_k", None, "Draw from the k most likely tokens."),
    flags.DEFINE_float("top_p", 0.95, "Draw from the likeliest tokens that hold this share."),
    flags.DEFINE_float("min_p", None, "Draw from tokens this likely against the likeliest."),
    flags.DEFINE_integer("seed", 0, "The same seed draws the same replies."),
    flags.DEFINE_multi_string("stop", [], "Text that ends a reply; may be repeated."),
)


def main(argv):
    """Loads the model, and replies to one message or to all that are typed."""
    del argv
    # Here and not above, so that --help needs no import of jax.
    from transformer.inference.conversation import Conversation, Steps
    from transformer.storage.checkpoint import CheckpointError
    from transformer.storage.model import load

    with cli.user_errors(ValueError, OSError, CheckpointError):
        options = {flag.name: flag.value for flag in _OPTIONS}
        steps = Steps(keep=True, **options)
        model = load(
            _MODEL.value,
            dtype=_DTYPE.value,
            weights=_WEIGHTS.value or "panels",
            cache=_CACHE.value,
            prepare=steps.compile,
        )
        conversation = Conversation(model, system=_SYSTEM.value, steps=steps, **options)
    if _PROMPT.value is not None:
        with cli.user_errors(ValueError):
            _print(conversation.reply(_PROMPT.value))
        return
    while message := _ask():
        try:
            _print(conversation.reply(message))
        except ValueError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _ask():
    """The next message; empty at the end of the input."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def _print(pieces):
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.start(main)
