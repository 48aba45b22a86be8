"""Conversations: messages made a text by a model's own template, and that text made token ids."""

import functools
import json
from collections.abc import Mapping, Sequence

import jinja2

from transformer.data.sandbox import Sandbox, limits
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


def read_messages(text: str) -> list[Mapping[str, str]]:
    """Reads the messages of a conversation, an object of JSON that has them as "messages".

    Raises:
      ValueError: the text is something else.
    """
    try:
        return json.loads(text)["messages"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f'a conversation must be an object of JSON with "messages", and not {text[:60]!r}.'
        ) from error


def taught_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and which of them the assistant writes.

    A reply is encoded by itself, as it is when the model writes it, and is the assistant's up to
    the token that ends it. What follows the last reply is left out.

    Raises:
      TemplateError: see `render`; or the assistant says nothing, or the template writes what was
        said before otherwise when something follows.
    """
    _check(messages)
    tokens, own, text = [], [], ""
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:n], reply=True)
        whole = render(tokenizer, messages[: n + 1], reply=False)
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise TemplateError(
                f"the chat template writes what stands before message {n} otherwise where it is "
                "answered; such a conversation can be taught only up to its first reply."
            )
        asked = tokenizer.encode(prompt[len(text) :], special=True)
        reply = tokenizer.encode(whole[len(prompt) :], special=True)
        end = next((k + 1 for k, id in enumerate(reply) if id in tokenizer.ends), len(reply))
        tokens += asked + reply
        own += [False] * len(asked) + [True] * end + [False] * (len(reply) - end)
        text = whole
    if not tokens:
        raise TemplateError("the assistant says nothing in these messages.")
    return tokens, own


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, reply: bool = True
) -> str:
    """The text of a conversation, as the model was trained on, special tokens by their names.

    A template is a program of whoever published the model. It runs in jinja2's sandbox, which keeps
    it from everything but the messages, and has little time and little memory.

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
        with limits():
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
    if not isinstance(messages, Sequence) or not messages:
        raise TemplateError("there are no messages; give a list of at least one.")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise TemplateError(f"message {n} must have a role and a content: {message!r}")
        if message["role"] not in ROLES:
            raise TemplateError(
                f"message {n} has the role {message['role']!r}; choose one of {', '.join(ROLES)}."
            )
        if not isinstance(message["content"], str):
            raise TemplateError(f"the content of message {n} must be a text.")


@functools.lru_cache(maxsize=8)
def _compile(source):
    try:
        return Sandbox().from_string(source)
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
        raise TemplateError(f"the chat template cannot be read: {error}") from error
