"""Conversations as data: what is read is what was meant, and what is not a conversation is refused by name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversations import conversations, some_text, texts
from nanochat.corpus.conversation import (
    Conversation,
    Message,
    Part,
    assistant,
    conversation_from_json,
    user,
)

HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi"}


def as_json(conversation: Conversation, prefer_strings: bool = True) -> list[dict[str, Any]]:
    def content(message: Message) -> str | list[dict[str, str]]:
        if prefer_strings and [part.kind for part in message.parts] == ["text"]:
            return message.parts[0].text
        return [{"type": part.kind, "text": part.text} for part in message.parts]

    return [{"role": message.role, "content": content(message)} for message in conversation.messages]


@given(conversations(), st.booleans())
def test_a_conversation_comes_back_from_all_of_its_json_forms(conversation: Conversation, prefer_strings: bool) -> None:
    messages = json.loads(json.dumps(as_json(conversation, prefer_strings)))
    assert conversation_from_json({"messages": messages}) == conversation
    assert conversation_from_json({"id": 3, "messages": messages, "source": "mine"}) == conversation
    assert conversation_from_json(messages) == conversation


@given(conversations(), st.booleans(), some_text)
def test_a_system_message_becomes_the_beginning_of_the_first_question_and_changes_nothing_else(
    conversation: Conversation, prefer_strings: bool, system: str
) -> None:
    messages = [{"role": "system", "content": system}, *as_json(conversation, prefer_strings)]
    first, *others = conversation_from_json(messages).messages
    assert first == user(f"{system}\n\n{conversation.messages[0].text}")
    assert tuple(others) == conversation.messages[1:]


@given(conversations())
def test_an_empty_system_message_is_as_good_as_none(conversation: Conversation) -> None:
    assert conversation_from_json([{"role": "system", "content": ""}, *as_json(conversation)]) == conversation


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "an object with a list `messages`"),
        ("Hello", "an object with a list `messages`"),
        ({}, "an object with a list `messages`"),
        ({"messages": HELLO}, "an object with a list `messages`"),
        ([HELLO, "Hi"], "an object with a list `messages` of objects"),
        ([], "a conversation has no messages"),
        ([{"role": "system", "content": "Be brief."}], "a conversation has no messages"),
        ([{"role": "system", "content": None}, HELLO], "content of the system message must be a string"),
        ([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, HELLO], "content of the system"),
        ([{"role": "system", "content": "Be brief."}, HI], "by the assistant, it is the user's turn"),
        ([HI], "message 1 is by the assistant, it is the user's turn"),
        ([HELLO, HELLO], "message 2 is by the user, it is the assistant's turn"),
        ([HELLO, HI, HI], "message 3 is by the assistant"),
        ([HELLO, {"role": "system", "content": "Be brief."}], "message 2 has role 'system', not user or assistant"),
        ([HELLO, {"role": "tool", "content": "42"}], "message 2 has role 'tool'"),
        ([{"role": ["user"], "content": "Hello"}], r"message 1 has role \['user'\]"),
        ([{"content": "Hello"}], "message 1 has role None"),
        ([{"role": "user"}], "content of message 1 must be a string or a list of parts"),
        ([HELLO, {"role": "assistant", "content": 42}], "content of message 2 must be a string or a list"),
        ([HELLO, {"role": "assistant", "content": ["Hi"]}], "message 2 has a part whose type is not one of text, py"),
        ([HELLO, {"role": "assistant", "content": [{"text": "Hi"}]}], "message 2 has a part whose type"),
        ([HELLO, {"role": "assistant", "content": [{"type": "image", "text": "Hi"}]}], "message 2 has a part whose"),
        ([HELLO, {"role": "assistant", "content": [{"type": ["text"], "text": "Hi"}]}], "message 2 has a part whose"),
        ([HELLO, {"role": "assistant", "content": [{"type": "python"}]}], "message 2 has a part without text"),
        ([HELLO, {"role": "assistant", "content": [{"type": "text", "text": 42}]}], "message 2 has a part without"),
        ([{"role": "user", "content": ""}], "message 1 is empty"),
        ([HELLO, {"role": "assistant", "content": []}], "message 2 is empty"),
        ([HELLO, {"role": "assistant", "content": [{"type": "python", "text": ""}]}], "message 2 is empty"),
        ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "message 1 is by the user and may hold one"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}] * 2}], "may hold one text only"),
    ],
)
def test_what_is_not_a_conversation_is_refused_with_the_message_that_is_wrong(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation_from_json(value)


@given(texts, texts)
def test_a_person_reads_neither_calls_nor_what_the_tool_answered(before: str, after: str) -> None:
    message = assistant(before, Part("python", "6*7"), Part("python_output", "42"), after)
    assert message.text == before + after
