"""Chat templates: what transformers renders, and templates that try what they must not."""

import pytest

from transformer.data.chat import (
    TemplateError,
    chat_tokens,
    read_messages,
    render,
    taught_tokens,
)
from transformer.data.tokenizer import END_OF_DOCUMENT, byte_tokenizer

# That of SmolLM2, by way of its publishers.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def with_template(template, **names):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.names = template, names
    return tokenizer


def test_a_published_template():
    assert render(with_template(SMOLLM2), HELLO) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(with_template(SMOLLM2), HELLO, reply=False).endswith("Hello<|im_end|>\n")


def test_special_tokens_are_tokens_and_names_are_given():
    tokenizer = with_template("{{ eos_token }}{{ messages[0].content }}", eos_token=END_OF_DOCUMENT)
    assert chat_tokens(tokenizer, HELLO) == [tokenizer.end_of_document, *b"Hello"]


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello"}]'),
        (
            "{% for m in messages %}{% if m.content == 'x' %}{% break %}{% endif %}y{% endfor %}",
            "y",
        ),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{% set x = namespace(n=2) %}{% set x.n = x.n * 3 %}{{ x.n }}", "6"),
    ],
)
def test_what_templates_use(template, text):
    assert render(with_template(template), HELLO) == text


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template"),
        ("{% if %}", "cannot be read"),
        ("{{ raise_exception('no system here') }}", "says: no system here"),
        ("{{ messages[3].content.x }}", "the chat template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template"),
        ("{{ cycler.__init__.__globals__.os.system('touch /tmp/trapped') }}", "the chat template"),
        ("{{ messages.append(1) }}", "the chat template"),
        ("{{ 'a' * 1000000000 }}", "of large values is not allowed"),
        ("{{ 9 ** 9 ** 9 }}", r"\*\* of large values"),
        ("{% for i in range(1000000000) %}a{% endfor %}", "the chat template"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}abc{% endfor %}{% endfor %}",
            "long|more",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "does not come to an end"),
        ("{% include '/etc/passwd' %}", "the chat template"),
        ("{% break %}", "cannot be read"),
    ],
)
def test_templates_that_do_what_they_must_not_are_stopped(template, message):
    with pytest.raises(TemplateError, match=message):
        render(with_template(template), HELLO)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "there are no messages"),
        ([{"role": "user"}], "message 0 must have a role and a content"),
        ([{"role": "king", "content": "x"}], "message 0 has the role 'king'; choose one of system"),
        ([*HELLO, {"role": "user", "content": 5}], "the content of message 1 must be a text"),
    ],
)
def test_messages_are_checked(messages, message):
    with pytest.raises(TemplateError, match=message):
        render(with_template(SMOLLM2), messages)


TURNS = "{% for m in messages %}<{{ m.content }}>{{ eos_token }}\n{% endfor %}"
TALK = [
    {"role": role, "content": text}
    for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
]


def test_what_the_assistant_says_is_taught():
    template = TURNS + "{% if add_generation_prompt %}<{% endif %}"
    tokenizer = with_template(template, eos_token=END_OF_DOCUMENT)
    for messages in (TALK, [*TALK, {"role": "user", "content": "left out"}]):
        tokens, own = taught_tokens(tokenizer, messages)
        assert tokens == chat_tokens(tokenizer, TALK, reply=False)
        taught = [token for token, is_own in zip(tokens, own, strict=True) if is_own]
        end = tokenizer.end_of_document
        assert taught == [*b"b>", end, *b"d>", end]


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (TURNS, [], "give a list of at least one"),
        (TURNS, "ab", "message 0 must have a role"),
        (TURNS, TALK[:1], "the assistant says nothing"),
        (TURNS, TALK[1:], "there are no messages"),
        ("{{ messages | length }}", TALK, "before message 1 otherwise where it is answered"),
    ],
)
def test_conversations_that_teach_nothing(template, messages, message):
    with pytest.raises(TemplateError, match=message):
        taught_tokens(with_template(template, eos_token=""), messages)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"text": ""}', "[" * 100_000])
def test_what_is_no_conversation(text):
    assert read_messages('{"messages": [1]}') == [1]
    with pytest.raises(ValueError, match='must be an object of JSON with "messages"'):
        read_messages(text)
