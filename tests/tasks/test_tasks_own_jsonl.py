"""One's own conversations are checked line by line, and some are set aside for the test."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import DataError
from nanochat.tasks.own_jsonl import own_jsonl, read_conversations


def line(*contents: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return json.dumps({"messages": messages})


def write(folder: Path, *lines: str, newline: str = "\n", start: bytes = b"") -> Path:
    path = folder / "own.jsonl"
    path.write_bytes(start + "".join(f"{each}{newline}" for each in lines).encode())
    return path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line("hello", ""), "message 2 is empty"),
        (line("hello"), "the last message is by the user: there is no answer to learn"),
        ('{"messages": [', r"it is not JSON \(.* at column \d+\)"),
        ('{"text": "hello"}', "a conversation must be an object with a list `messages` of objects"),
        ('{"messages": [{"role": "bot", "content": "hi"}]}', "message 1 has role 'bot', not user or assistant"),
        ('{"messages": []}', "a conversation has no messages"),
        ("[[]]", "a conversation must be"),
        ("17", "a conversation must be"),
    ],
)
def test_the_first_bad_line_is_named_with_its_fault(tmp_path: Path, bad: str, message: str) -> None:
    path = write(tmp_path, line("one", "1"), "", line("two", "2"), bad, "nonsense")
    with pytest.raises(DataError, match=rf"own.jsonl line 4: {message}.* — mend or remove that line$"):
        own_jsonl(path).problems("train")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, line("one", "1"))
    path.write_bytes(path.read_bytes() + b'{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: it is not UTF-8"):
        list(read_conversations(path))


def test_a_missing_file_and_a_folder_are_said_in_a_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=r"cannot be read \(.*\) — check the path after jsonl="):
            own_jsonl(path).problems("train")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n\n"])
def test_windows_line_ends_marks_and_blank_lines_do_no_harm(tmp_path: Path, newline: str, start: bytes) -> None:
    path = write(tmp_path, line("one", "1"), "  ", line("zwei", "zwölf"), newline=newline, start=start)
    assert [each.messages[1].text for each in read_conversations(path)] == ["1", "zwölf"]


@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=80))
def test_every_conversation_is_on_one_side_and_each_side_has_some(answers: list[str]) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        task = own_jsonl(write(Path(folder), *(line("question", answer) for answer in answers)))
        if len(set(answers)) == 1:
            with pytest.raises(DataError, match="holds 1 different conversations"):
                task.problems("test")
            return
        train, test = ([problem.answer for problem in task.problems(split)] for split in ("train", "test"))
    assert sorted(train + test) == sorted(answers)
    assert train
    assert test
    assert not set(train) & set(test)


def test_about_one_in_twenty_is_for_the_test(tmp_path: Path) -> None:
    task = own_jsonl(write(tmp_path, *(line(f"question {number}", "answer") for number in range(2000))))
    assert 70 < len(task.problems("test")) < 130
