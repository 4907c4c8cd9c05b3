"""Conversations of one's own: a file with a JSON object per line, in the form that corpus/conversation.py describes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanochat.corpus.conversation import Conversation, conversation_from_json
from nanochat.errors import DataError
from nanochat.tasks.splits import split_by_key
from nanochat.tasks.task import Problem, Split, Task

VERSION = 1
PREFIX = "jsonl="
TEST_SHARE = 0.05


def own_jsonl(path: Path) -> Task:
    """The conversations of a file. About one in twenty, and at least one, is set aside for the test.

    What a conversation says decides its side, so equal ones are on one, and more of them can be added to the file.
    """
    return Task(f"{PREFIX}{path}", "talk", lambda split: _problems(path, split))


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Read a file line by line. A byte order mark, Windows line ends and blank lines do no harm.

    Raises:
        DataError: the file is missing, or a line is not a conversation; the message says which and why.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield _conversation(line, f"{path} line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "check the path after jsonl=") from None


def _conversation(line: bytes, where: str) -> Conversation:
    try:
        conversation = conversation_from_json(json.loads(line.decode("utf-8-sig").rstrip()))
        if conversation.messages[-1].role != "assistant":
            raise ValueError("the last message is by the user: there is no answer to learn")
    except json.JSONDecodeError as error:
        fault = f"it is not JSON ({error.msg} at column {error.colno})"
    except UnicodeDecodeError:
        fault = "it is not UTF-8"
    except ValueError as error:
        fault = str(error)
    else:
        return conversation
    raise DataError(f"{where}: {fault}", "mend or remove that line")


def _problems(path: Path, split: Split) -> Sequence[Problem]:
    conversations = list(read_conversations(path))
    distinct = len(set(map(repr, conversations)))
    if distinct < 2:
        raise DataError(
            f"{path} holds {distinct} different conversations", "add some: at least one is kept for the test"
        )
    return [Problem(conversation) for conversation in split_by_key(conversations, repr, split, TEST_SHARE)]
