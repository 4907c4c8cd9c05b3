"""Conversations of every shape, their texts now and then spelling special tokens."""

from typing import get_args

from hypothesis import strategies as st

from nanochat.corpus.conversation import Conversation, Message, Part, PartKind, user
from nanochat.tokenizer import SPECIAL_TOKENS

texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(SPECIAL_TOKENS)), max_size=3).map("".join)
some_text = texts.filter(bool)
parts = st.lists(st.builds(Part, st.sampled_from(get_args(PartKind)), texts), min_size=1, max_size=4)
answers = parts.filter(lambda drawn: any(part.text for part in drawn)).map(
    lambda drawn: Message("assistant", tuple(drawn))
)


@st.composite
def conversations(draw: st.DrawFn, max_messages: int = 7) -> Conversation:
    """Also such as end with a question."""
    count = draw(st.integers(1, max_messages))
    return Conversation(tuple(draw(answers) if index % 2 else user(draw(some_text)) for index in range(count)))
