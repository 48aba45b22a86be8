"""Tokens that come one by one become text, and stop where they should."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.completion import Writer
from transformer.inference.drawn import Drawn

TOKENIZER = byte_tokenizer()
END = TOKENIZER.end_of_document


@settings(max_examples=200)
@given(
    st.text("abé€", max_size=30),
    st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3),
    st.binary(max_size=2),
)
@example("aab", ["ab"], b"")
def test_pieces_join_to_what_comes_before_the_first_stop(text, stops, tail):
    data = text.encode() + tail
    if not data:
        return
    writer = Writer(TOKENIZER, stops, {END}, len(data))
    pieces, pushed = [], 0
    for token in data:
        pieces.append(writer.push(Drawn(token, -1.0)))
        pushed += 1
        if writer.completion:
            break
    whole = data[:pushed].decode(errors="replace")
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert writer.completion.finish_reason == ("stop" if ends else "length")
    assert writer.completion.text == "".join(pieces) == whole[: min(ends, default=None)]
    assert writer.completion.tokens == list(data[:pushed])
    assert not any(stop in data[: pushed - 1].decode(errors="replace") for stop in stops)
