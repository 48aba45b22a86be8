"""Conversations: the replies of `generate`, and no position of the history runs twice."""

import jax
import pytest

from transformer import Config, Model, generate
from transformer.data.chat import chat_tokens
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.conversation import Conversation, Steps
from transformer.program.program import program

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONFIG = Config(vocab_size=257, max_length=4096, num_layers=2, width=16, num_heads=2)


@pytest.fixture
def model(random_params):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Model(CONFIG.replace(window=(16, None)), random_params(CONFIG), tokenizer)


def test_replies_are_those_to_the_whole_history_and_cells_are_kept(model):
    conversation = Conversation(model, max_new_tokens=12, temperature=0)
    for text in ("Hello there", "And you?", "é"):
        messages = [*conversation.messages, {"role": "user", "content": text}]
        before = conversation.positions_run
        pieces = list(conversation.reply(text))
        assert conversation.messages[:-1] == messages
        assert conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
        # What is new, its marks, and the last token drawn before: never the history.
        assert conversation.positions_run - before <= len(f"[user]{text}[assistant]".encode()) + 3


def test_the_first_reply_is_what_generate_gives(model):
    conversation = Conversation(model, system="Be brief", max_new_tokens=20, seed=3)
    reply = "".join(conversation.reply("Hello"))
    messages = conversation.messages[:2]
    assert messages[0] == {"role": "system", "content": "Be brief"}
    prompt = chat_tokens(model.tokenizer, messages)
    [completion] = generate(model, [prompt], max_new_tokens=20, seed=3)
    assert reply == completion.text


def test_what_is_compiled_ahead_is_what_replies_run(model):
    """A program is called when it is traced: before the first reply, and never after."""
    traced = []

    class Traced:
        config = model.config

        def __call__(self, *operands):
            traced.append(operands)
            return program(self.config)(*operands)

    options = {"max_new_tokens": 8, "repetition_penalty": 1.1, "program": Traced()}
    steps = Steps(keep=True, **options)  # a program of a user's own is not kept
    steps.compile(model.config, jax.eval_shape(lambda: model.params))
    assert len(traced) == 2  # chunks of text, and the step that draws
    conversation = Conversation(model, steps=steps, **options)
    for text in ("Hello there", "And you?"):
        assert "".join(conversation.reply(text))
    assert len(traced) == 2


def test_steps_that_were_kept_give_the_same_replies(model):
    """Also in a conversation that outgrows the cells that they were compiled for."""
    options = {"max_new_tokens": 8, "seed": 1}
    steps = [Steps(keep=True, **options) for _ in range(2)]
    for each in steps:  # the second finds what the first kept
        each.compile(model.config, jax.eval_shape(lambda: model.params))
    replies = []
    for each in (None, *steps):
        conversation = Conversation(model, steps=each, **options)
        replies.append(["".join(conversation.reply(text)) for text in ("Hello", "And " * 550)])
    assert replies[0] == replies[1] == replies[2]


def test_a_conversation_needs_text_and_room(model, random_params):
    with pytest.raises(ValueError, match="has no tokenizer"):
        Conversation(Model(model.config, model.params, None), max_new_tokens=3)
    short = Model(model.config.replace(max_length=30), model.params, model.tokenizer)
    with pytest.raises(ValueError, match="more than the model's max_length=30; begin a new one"):
        list(Conversation(short, max_new_tokens=8).reply("Hello there, how are you?"))
