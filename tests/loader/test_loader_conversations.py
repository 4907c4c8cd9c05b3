"""Conversations to token shards: what is read back is what was rendered, and every count is true."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations import conversations
from nanochat.corpus.conversation import Conversation, assistant, user
from nanochat.errors import DataError
from nanochat.files import read_json
from nanochat.loader import conversations as module
from nanochat.loader.conversations import tokenize_conversations
from nanochat.loader.token_shards import Split, TokenDataset
from nanochat.tokenizer.conversation import RenderedConversation, render_conversation
from nanochat.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([value]) for value in range(256)], r"\s+|\S+", digit_group=1)
FIX = "nanochat data conversations sft"


def make(
    out: Path, train: Iterator[Conversation] | list[Conversation], val: list[Conversation], sequence_len: int = 60
) -> dict[str, Any]:
    splits: dict[Split, Any] = {"train": train, "val": val}
    return tokenize_conversations(
        splits, TOKENIZER, out, sequence_len=sequence_len, made_from={"tasks": ["mine"]}, fix=FIX
    )


def exchange(number: int) -> Conversation:
    return Conversation((user(f"What is {number}?"), assistant(f"It is {number}.")))


def rendered(conversations: list[Conversation], sequence_len: int = 60) -> list[RenderedConversation]:
    """Those that can be trained on, in rows of T inputs and the last one's target."""
    every = [render_conversation(TOKENIZER, conversation, sequence_len + 1) for conversation in conversations]
    return [one for one in every if any(one.trained)]


def written(out: Path, split: Split) -> list[tuple[list[int], list[bool]]]:
    dataset = TokenDataset.open(out, split, checksums=True)
    lengths = dataset.lengths.tolist()
    return [
        (dataset.document(i).tolist(), dataset.trained_pieces([(i, 0, length)])[0].astype(bool).tolist())
        for i, length in enumerate(lengths)
    ]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@given(
    st.lists(conversations(), min_size=1, max_size=12),
    st.lists(conversations(), min_size=1, max_size=6),
    st.integers(6, 80),
)
@settings(max_examples=20, deadline=None)
def test_what_is_read_back_is_what_was_rendered_and_is_counted(
    train: list[Conversation], val: list[Conversation], sequence_len: int
) -> None:
    expected = {"train": rendered(train, sequence_len), "val": rendered(val, sequence_len)}
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "tokens"
        if not all(expected.values()):
            with pytest.raises(DataError, match="conversation has an answer within"):
                make(out, train, val, sequence_len)
            return
        totals = make(out, train, val, sequence_len)["totals"]
        documents = {"train": written(out, "train"), "val": written(out, "val")}
    assert documents["train"] == [(one.ids, one.trained) for one in expected["train"]]
    assert sorted(documents["val"]) == sorted((one.ids, one.trained) for one in expected["val"])
    for split, source in (("train", train), ("val", val)):
        assert totals[split] == {
            "documents": len(expected[split]),
            "tokens": sum(len(one.ids) for one in expected[split]),
            "trained_tokens": sum(sum(one.trained) for one in expected[split]),
            "cut": sum(one.is_cut for one in expected[split]),
            "left_out": len(source) - len(expected[split]),
        }


def test_cut_are_documents_and_left_out_is_what_became_none(tmp_path: Path) -> None:
    train = [
        exchange(1),
        Conversation((user("Count"), assistant("1 " * 100))),
        Conversation((*exchange(2).messages, user("And then?" * 100), assistant("Enough."))),
        Conversation((user("Too long " * 100), assistant("Indeed."))),
        Conversation((user("Is nobody there?"),)),
    ]
    counts = make(tmp_path / "tokens", train, [exchange(3)])["totals"]["train"]
    assert (counts["documents"], counts["cut"], counts["left_out"]) == (3, 2, 2)


def test_the_manifest_says_what_the_tokens_were_made_from_and_for(tmp_path: Path) -> None:
    manifest = make(tmp_path / "tokens", [exchange(1)], [exchange(2)])
    assert read_json(tmp_path / "tokens" / "manifest.json") == manifest
    assert manifest["made_from"] == {"tasks": ["mine"]}
    assert manifest["sequence_len"] == 60
    about = {
        "fingerprint": TOKENIZER.fingerprint,
        "vocab_size": TOKENIZER.vocab_size,
        "bos_id": TOKENIZER.bos_id,
    }
    assert manifest["tokenizer"] == about


def test_many_conversations_make_several_shards_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = [exchange(number) for number in range(40)], [exchange(number) for number in range(10)]
    make(tmp_path / "whole", iter(train), val)
    monkeypatch.setattr(module, "TOKENS_PER_SHARD", 100)
    make(tmp_path / "shards", iter(train), val)
    longest = max(len(one.ids) for one in rendered(train))
    for split in ("train", "val"):
        paths = sorted((tmp_path / "shards").glob(f"{split}_*.tokens.npy"))
        assert [path.name for path in paths] == [f"{split}_{i:05d}.tokens.npy" for i in range(len(paths))]
        sizes = [len(np.load(path)) for path in paths]
        assert len(sizes) > 1
        assert all(100 <= size < 100 + longest for size in sizes[:-1])
    assert written(tmp_path / "shards", "train") == [(one.ids, one.trained) for one in rendered(train)]
    assert written(tmp_path / "shards", "val") == written(tmp_path / "whole", "val")


def test_a_shard_is_written_before_the_next_conversation_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_SHARD", 1)
    num_written = []

    def source() -> Iterator[Conversation]:
        for number in range(5):
            num_written.append(len(list(tmp_path.rglob("train_*.tokens.npy"))))
            yield exchange(number)

    make(tmp_path / "tokens", source(), [exchange(0)])
    assert num_written == [0, 1, 2, 3, 4]


def failing() -> Iterator[Conversation]:
    yield exchange(1)
    raise KeyboardInterrupt


@pytest.mark.parametrize("existed", [False, True])
def test_a_source_that_breaks_off_leaves_what_was_there_before(
    tmp_path: Path, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tokens"
    if existed:
        make(out, [exchange(7)], [exchange(8)])
    before = contents(out) if existed else None
    monkeypatch.setattr(module, "TOKENS_PER_SHARD", 1)
    with pytest.raises(KeyboardInterrupt):
        make(out, failing(), [exchange(2)])
    assert list(tmp_path.iterdir()) == ([out] if existed else [])
    assert (contents(out) if existed else None) == before


def test_what_was_made_before_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    make(out, [exchange(number) for number in range(3)], [exchange(3)])
    make(out, [exchange(4)], [exchange(5)])
    assert written(out, "train") == [(one.ids, one.trained) for one in rendered([exchange(4)])]
    assert list(tmp_path.iterdir()) == [out]


def test_validation_is_shuffled_the_same_way_every_time_and_training_is_not(tmp_path: Path) -> None:
    source = [exchange(number) for number in range(50)]
    for name in ("first", "second"):
        make(tmp_path / name, source, source)
    train, val = written(tmp_path / "first", "train"), written(tmp_path / "first", "val")
    assert train != val
    assert sorted(train) == sorted(val)
    first, second = (read_json(tmp_path / name / "manifest.json") for name in ("first", "second"))
    assert first["fingerprint"] == second["fingerprint"]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "unusable", [[], [Conversation((user("Who?"),))], [Conversation((user("Why? " * 20), assistant("So.")))]]
)
def test_a_split_without_an_answer_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, split: Split, unusable: list[Conversation]
) -> None:
    train, val = (unusable, [exchange(1)]) if split == "train" else ([exchange(1)], unusable)
    with pytest.raises(DataError, match=rf"no {split} conversation has an answer within 60 tokens — {FIX}"):
        make(tmp_path / "tokens", train, val)
    assert list(tmp_path.iterdir()) == []
