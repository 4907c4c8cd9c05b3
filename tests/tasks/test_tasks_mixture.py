"""A mixture holds what its entries ask for, as often as they ask, and knows when it has changed."""

import os
from collections import Counter
from pathlib import Path

import pytest
from hub_copies import write_gsm8k
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import DataError, UsageError
from nanochat.tasks.mixture import Entry, mixture, mixture_fingerprint, parse_mixture
from nanochat.tasks.registry import GENERATED, open_task

NOWHERE = Path("/nowhere")
LINES = '{"messages":[{"role":"user","content":"%d"},{"role":"assistant","content":"yes"}]}\n'


def test_entries_are_read_as_they_are_documented() -> None:
    entries = ["library", "arithmetic:x3", "spelling:200", "jsonl=/data/my:chats.jsonl:x2", "jsonl=a:b"]
    assert parse_mixture(entries) == (
        Entry("library"),
        Entry("arithmetic", times=3),
        Entry("spelling", limit=200),
        Entry("jsonl=/data/my:chats.jsonl", times=2),
        Entry("jsonl=a:b"),
    )


@pytest.mark.parametrize("entry", ["libary", "library:", "library:x", "library:-1", "library:1.5", "jsonl=", ""])
def test_an_entry_that_names_no_task_is_refused_with_the_names_there_are(entry: str) -> None:
    with pytest.raises(UsageError, match=r"there is no task .* — choose of: arc-challenge, .*, jsonl=PATH"):
        parse_mixture([entry])


@pytest.mark.parametrize("entries", [[], ["library:0"], ["library:x0"]])
def test_a_mixture_of_nothing_is_refused(entries: list[str]) -> None:
    with pytest.raises(UsageError, match="nothing"):
        parse_mixture(entries)


@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 30))
def test_counts_are_those_of_the_entries(times: int, limit: int, test_limit: int) -> None:
    whole = [problem.conversation for problem in open_task("identity", NOWHERE).problems("train")]
    repeated = Counter(mixture([f"identity:x{times}"], NOWHERE, "train"))
    assert repeated == Counter(dict.fromkeys(whole, times))
    drawn = list(mixture([f"identity:{limit}"], NOWHERE, "train"))
    assert len(drawn) == len(set(drawn)) == min(limit, len(whole))
    assert set(drawn) <= set(whole)
    assert drawn == list(mixture([f"identity:{limit}"], NOWHERE, "train"))
    tested = list(mixture([f"identity:{test_limit}", f"identity:x{times}"], NOWHERE, "test"))
    assert len(tested) == min(test_limit, 24) + 24


def test_a_limit_draws_from_the_whole_task() -> None:
    position = {
        problem.conversation: index for index, problem in enumerate(GENERATED["arithmetic"][0]().problems("train"))
    }
    drawn = [position[conversation] for conversation in mixture(["arithmetic:400"], NOWHERE, "train")]
    assert 1700 < sum(drawn) / len(drawn) < 2300


def test_tasks_come_one_after_the_other() -> None:
    both = list(mixture(["identity", "arithmetic:5"], NOWHERE, "train"))
    assert both[:-5] == list(mixture(["identity"], NOWHERE, "train"))


def test_the_fingerprint_changes_with_the_entries_and_with_nothing_else() -> None:
    mixtures = [["library"], ["library:x2"], ["library:2"], ["identity"], ["library", "identity"]]
    prints = [mixture_fingerprint(entries, NOWHERE) for entries in mixtures]
    assert len(set(prints)) == len(prints)
    assert prints == [mixture_fingerprint(entries, NOWHERE) for entries in mixtures]
    assert mixture_fingerprint(["library:x1"], NOWHERE) == prints[0]


def test_the_fingerprint_changes_with_the_recipe_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mixture_fingerprint(["identity"], NOWHERE)
    make, version = GENERATED["identity"]
    monkeypatch.setitem(GENERATED, "identity", (make, version + 1))
    assert mixture_fingerprint(["identity"], NOWHERE) != before


def test_the_fingerprint_changes_with_the_content_of_own_conversations_not_with_their_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (first, second):
        path.write_text("".join(LINES % number for number in range(3)))
    before = mixture_fingerprint([f"jsonl={first}"], tmp_path)
    assert mixture_fingerprint([f"jsonl={second}"], tmp_path) == before
    first.write_text(first.read_text().replace("yes", "yea"))
    assert mixture_fingerprint([f"jsonl={first}"], tmp_path) != before
    with pytest.raises(DataError, match="is not there"):
        mixture_fingerprint([f"jsonl={tmp_path / 'c.jsonl'}"], tmp_path)


def test_the_fingerprint_changes_with_the_files_of_a_data_set(tmp_path: Path) -> None:
    write_gsm8k(tmp_path)
    before = mixture_fingerprint(["gsm8k"], tmp_path)
    path = tmp_path / "openai--gsm8k/main/train-00000-of-00001.parquet"
    os.utime(path, (0, 0))
    assert mixture_fingerprint(["gsm8k"], tmp_path) != before
