"""Conversations: messages made a text by a model's own template, and that text made token ids."""

import datetime
import json
from collections.abc import Mapping, Sequence

import jinja2
from jinja2 import ext, sandbox

from transformer.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
_LONGEST = 10_000_000  # characters of a text that a template makes


class TemplateError(ValueError):
    """A chat template that is missing, damaged, refuses the messages, or does what it must not."""


def chat_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, reply: bool = True
) -> list[int]:
    """The token ids of a conversation.

    Args:
      tokenizer: has the model's chat template.
      messages: each has a "role", one of `ROLES`, and a "content", a text.
      reply: whether the beginning of the assistant's next message follows.

    Raises:
      TemplateError: see `render`.
    """
    return tokenizer.encode(render(tokenizer, messages, reply=reply), special=True)


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, reply: bool = True
) -> str:
    """The text of a conversation, as the model was trained on, special tokens by their names.

    A template is a program of whoever published the model. It runs in jinja2's sandbox, which keeps
    it from everything but the messages, and the text that it makes is limited.

    Args:
      tokenizer, messages, reply: as in `chat_tokens`.

    Raises:
      TemplateError: the tokenizer has no template, the messages are not of that form, or the
        template cannot be read, refuses them, or tries what it must not.
    """
    if tokenizer.chat_template is None:
        raise TemplateError("the tokenizer has no chat template; give the model a text to go on.")
    _check(messages)
    template = _compile(tokenizer.chat_template)
    parts, length = [], 0
    try:
        for part in template.generate(
            messages=[dict(message) for message in messages],
            add_generation_prompt=reply,
            **tokenizer.names,
        ):
            parts.append(part)
            length += len(part)
            if length > _LONGEST:
                raise TemplateError(f"the chat template makes more than {_LONGEST} characters.")
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template says: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        if isinstance(error, TemplateError):
            raise
        raise TemplateError(f"the chat template fails: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise TemplateError("the chat template does not come to an end.") from error
    return "".join(parts)


def _check(messages):
    if not messages:
        raise TemplateError("there are no messages; give at least one.")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise TemplateError(f"message {n} must have a role and a content: {message!r}")
        if message["role"] not in ROLES:
            raise TemplateError(
                f"message {n} has the role {message['role']!r}; choose one of {', '.join(ROLES)}."
            )
        if not isinstance(message["content"], str):
            raise TemplateError(f"the content of message {n} must be a text.")


def _compile(source):
    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TemplateError(f"the chat template cannot be read: {error}") from error


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Products and powers are checked, which could fill the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator, left, right):
        small = all(isinstance(x, int | float) and abs(x) <= 2**32 for x in (left, right))
        if not small or operator == "**":
            raise sandbox.SecurityError(f"{operator} of large values is not allowed")
        return super().call_binop(context, operator, left, right)


def _environment():
    """jinja2's sandbox, with what transformers gives to templates."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value, indent=None):
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message):
    raise jinja2.TemplateError(message)
