"""fastokens is only quicker: whatever the text, the ids are those of `Tokenizer.encode`."""

import os
import sys
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.corpus.builtin import builtin_texts
from nanochat.errors import DataError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokenizer.bulk import THREADS_VARIABLE, BulkEncoder, load_fast
from nanochat.tokenizer.evaluate import SAMPLES
from nanochat.tokenizer.train import train_tokenizer

quick = settings(max_examples=150, deadline=None)
awkward = st.sampled_from(
    [*SPECIAL_TOKENS, "'S", " " * 50, "\r\n", "\u3000", "e\u0301", "\u017f", "12345", "½", "👩\u200d👧"]
)
texts = st.lists(st.one_of(st.text(), awkward)).map("".join)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> BulkEncoder:
    encoder = BulkEncoder(tokenizer)
    assert encoder._fast is not None, "what is tested here is fastokens"
    return encoder


@pytest.fixture(scope="module")
def builtin() -> list[str]:
    return [text.text for text in islice(builtin_texts(), 300)]


def expected(tokenizer: Tokenizer, documents: list[str]) -> tuple[list[int], list[int]]:
    encoded = [[tokenizer.bos_id, *tokenizer.encode(document)] for document in documents]
    return [token for ids in encoded for token in ids], [len(ids) for ids in encoded]


def encoded(encoder: BulkEncoder, documents: list[str]) -> tuple[list[int], list[int]]:
    ids, lengths = encoder.encode(documents)
    assert (ids.dtype, lengths.dtype) == (np.uint16, np.int64)
    return ids.tolist(), lengths.tolist()


@quick
@given(documents=st.lists(texts, max_size=20))
def test_any_text_has_the_same_ids_as_alone(encoder: BulkEncoder, tokenizer: Tokenizer, documents: list[str]) -> None:
    assert encoded(encoder, documents) == expected(tokenizer, documents)


@pytest.mark.parametrize("digit_group", [1, 2, 3])
def test_the_builtin_corpus_and_awkward_text_have_the_same_ids(
    builtin: list[str], hostile: list[str], digit_group: int
) -> None:
    documents = [*builtin, *SAMPLES.values(), *hostile[-3000:]]
    tokenizer = train_tokenizer(documents, vocab_size=1500, digit_group=digit_group, max_chars=300_000)
    fast = BulkEncoder(tokenizer)
    assert fast._fast is not None
    assert encoded(fast, documents) == expected(tokenizer, documents)


def test_texts_that_begin_alike_do_not_borrow_from_each_other(encoder: BulkEncoder, tokenizer: Tokenizer) -> None:
    # fastokens 0.3.2 kept matches of the text before, and one of whitespace depends on what follows it.
    start = "".join(SAMPLES.values()) * 3 + " " * 700
    documents = [start + end for one in ("x", " ", "\n", "\tx", "", "  x", "y") for end in (one, one * 9, "x", one)]
    assert len(start) > 5000
    assert encoded(encoder, documents) == expected(tokenizer, documents)


def test_runs_that_tiktoken_cannot_take_whole_are_cut_at_the_same_places(
    encoder: BulkEncoder, tokenizer: Tokenizer
) -> None:
    documents = ["short", " " * 1_200_001 + "x", "", "a" + "\u3000" * 600_001, "end"]
    assert encoded(encoder, documents) == expected(tokenizer, documents)


@pytest.mark.parametrize("text", ["\ud83d\ude42", "a\ud83db"])
def test_a_surrogate_is_encoded_as_tiktoken_mends_it(encoder: BulkEncoder, tokenizer: Tokenizer, text: str) -> None:
    documents = ["before", text, "after"]
    assert encoded(encoder, documents) == expected(tokenizer, documents)


def test_without_fastokens_the_ids_are_the_same(
    tokenizer: Tokenizer, hostile: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    plain = BulkEncoder(tokenizer)
    assert encoded(plain, hostile) == expected(tokenizer, hostile)
    assert plain._fast is None


def test_a_release_that_encodes_otherwise_is_found_out_and_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_fast(train_tokenizer(SAMPLES.values(), vocab_size=300, max_chars=10**6))
    assert other is not None
    monkeypatch.setattr("nanochat.tokenizer.bulk.load_fast", lambda _: other)
    with pytest.raises(DataError, match=r"^fastokens [\d.]+ and tiktoken [\d.]+ encode .* — pip uninstall fastokens"):
        BulkEncoder(tokenizer).encode(["The harbour was late again.", ""])


def test_a_pattern_that_fastokens_does_not_take_is_left_to_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(SAMPLES.values(), vocab_size=300, max_chars=10**6)
    monkeypatch.setattr(tokenizer, "pattern", "(")
    assert load_fast(tokenizer) is None
    assert encoded(BulkEncoder(tokenizer), ["text"]) == expected(tokenizer, ["text"])


@pytest.mark.parametrize("before", [None, "7"])
def test_the_environment_is_left_as_it_was(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    if before:
        monkeypatch.setenv(THREADS_VARIABLE, before)
    load_fast(tokenizer)
    assert os.environ.get(THREADS_VARIABLE) == before
