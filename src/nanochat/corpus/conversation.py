"""Conversations as data: who says what, and which parts of an answer are tool calls and their output.

The JSON form is the field's, one object with `messages`, each with `role` and `content`:

    {"messages": [{"role": "user", "content": "What is 6 times 7?"},
                  {"role": "assistant", "content": [{"type": "python", "text": "6*7"},
                                                    {"type": "python_output", "text": "42"},
                                                    {"type": "text", "text": "42"}]}]}

An optional first message of role `system` becomes the beginning of the first user message, since the token format has
no place of its own for it.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal["user", "assistant"]
PartKind = Literal["text", "python", "python_output"]


@dataclass(frozen=True)
class Part:
    """A stretch of a message: plain text, an expression for the python tool, or what the tool answered."""

    kind: PartKind
    text: str


@dataclass(frozen=True)
class Message:
    """What one side says in one turn. A user's message is a single part of text."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All that a person reads of it: the text parts, joined."""
        return "".join(part.text for part in self.parts if part.kind == "text")


@dataclass(frozen=True)
class Conversation:
    """Messages by user and assistant in turn, the user's first.

    Raises:
        ValueError: they are not in turn, or one is empty; the message says which.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("a conversation has no messages")
        for index, message in enumerate(self.messages):
            expected: Role = "user" if index % 2 == 0 else "assistant"
            if message.role != expected:
                raise ValueError(f"message {index + 1} is by the {message.role}, it is the {expected}'s turn")
            if not message.parts or not any(part.text for part in message.parts):
                raise ValueError(f"message {index + 1} is empty")
            if message.role == "user" and [part.kind for part in message.parts] != ["text"]:
                raise ValueError(f"message {index + 1} is by the user and may hold one text only")


def user(text: str) -> Message:
    """A user's message."""
    return Message("user", (Part("text", text),))


def assistant(*parts: str | Part) -> Message:
    """An assistant's message; a string is a part of text."""
    return Message("assistant", tuple(Part("text", part) if isinstance(part, str) else part for part in parts))


def conversation_from_json(value: Any) -> Conversation:
    """Read one conversation, `{"messages": [...]}` or the bare list of messages.

    Raises:
        ValueError: it is not one; the message says what is wrong with which message.
    """
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("a conversation must be an object with a list `messages` of objects")
    system = ""
    if messages and messages[0].get("role") == "system":
        first = messages[0].get("content")
        if not isinstance(first, str):
            raise ValueError("the content of the system message must be a string")
        system, messages = first, messages[1:]
    read = []
    for index, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in get_args(Role):
            raise ValueError(f"message {index} has role {role!r}, not user or assistant")
        parts = _parts(content, index)
        if index == 1 and system and parts:
            parts = (Part(parts[0].kind, f"{system}\n\n{parts[0].text}"), *parts[1:])
        read.append(Message(role, parts))
    return Conversation(tuple(read))


def _parts(content: Any, index: int) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part("text", content),)
    if not isinstance(content, list):
        raise ValueError(f"the content of message {index} must be a string or a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in get_args(PartKind):
            raise ValueError(f"message {index} has a part whose type is not one of {', '.join(get_args(PartKind))}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {index} has a part without text")
    return tuple(Part(part["type"], part["text"]) for part in content)
