"""Training gives the vocabulary asked for, from the text that was meant, and the same one everywhere."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import ExitCode, UsageError
from nanochat.tokenizer.evaluate import SAMPLES
from nanochat.tokenizer.train import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, split_pattern, train_tokenizer

TEXTS = list(SAMPLES.values())


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_same_text_gives_the_same_tokenizer_on_any_number_of_threads(num_threads: int) -> None:
    script = (
        "from nanochat.tokenizer.train import train_tokenizer;"
        "from nanochat.tokenizer.evaluate import SAMPLES;"
        "print(train_tokenizer(list(SAMPLES.values()) * 30, vocab_size=900, max_chars=10**6).fingerprint)"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": str(num_threads), "PYTHONHASHSEED": str(num_threads)}
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    here = train_tokenizer(TEXTS * 30, vocab_size=900, max_chars=10**6)
    assert printed.strip() == here.fingerprint


@settings(max_examples=20, deadline=None)
@given(vocab_size=st.integers(MIN_VOCAB_SIZE, 900), digit_group=st.sampled_from([1, 2, 3]))
def test_the_vocabulary_has_the_size_asked_for_and_every_byte(vocab_size: int, digit_group: int) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=vocab_size, digit_group=digit_group, max_chars=10**6)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.digit_group == digit_group
    assert set(tokenizer.mergeable_tokens) >= {bytes([value]) for value in range(256)}


@pytest.mark.parametrize("digit_group", [1, 2, 3])
def test_no_token_joins_more_digits_than_the_group(digit_group: int) -> None:
    texts = [*map(str, range(100_000, 103_000)), *TEXTS]
    tokenizer = train_tokenizer(texts, vocab_size=400, digit_group=digit_group, max_chars=10**6)
    assert max(len(token) for token in tokenizer.mergeable_tokens if token.isdigit()) == digit_group


@pytest.mark.parametrize("digit_group", [1, 2, 3])
def test_training_and_encoding_split_text_alike(digit_group: int, hostile: list[str]) -> None:
    pattern = split_pattern(digit_group)
    texts = hostile[:10_000]  # Without the very long runs: rustbpe's own encoder takes quadratic time for them.
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), 2000, pattern=pattern)
    tokenizer = train_tokenizer(texts, vocab_size=2009, digit_group=digit_group, max_chars=10**9)
    assert tokenizer.pattern == pattern
    assert trainer.batch_encode(texts) == tokenizer.encode_batch(texts)


def test_too_little_text_is_refused_with_the_largest_size_that_works() -> None:
    with pytest.raises(UsageError) as caught:
        train_tokenizer(TEXTS, vocab_size=60_000, max_chars=10**6)
    found = re.search(r"lower --vocab-size to (\d+)", str(caught.value))
    assert found is not None
    largest = int(found[1])
    assert train_tokenizer(TEXTS, vocab_size=largest, max_chars=10**6).vocab_size == largest
    with pytest.raises(UsageError):
        train_tokenizer(TEXTS, vocab_size=largest + 1, max_chars=10**6)


@pytest.mark.parametrize("nothing", [[], [""], ["a", "b"]])
def test_text_without_any_pair_is_refused_without_advising_an_impossible_size(nothing: list[str]) -> None:
    with pytest.raises(UsageError, match=r"train on more text$"):
        train_tokenizer(nothing, vocab_size=300, max_chars=100)


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, MIN_VOCAB_SIZE - 1, MAX_VOCAB_SIZE + 1])
def test_a_size_that_cannot_be_is_refused_before_any_text_is_read(vocab_size: int) -> None:
    def unread() -> Iterator[str]:
        raise AssertionError("text was read")
        yield ""

    with pytest.raises(UsageError, match="--vocab-size") as caught:
        train_tokenizer(unread(), vocab_size=vocab_size, max_chars=100)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("digit_group", [0, 4, -2])
def test_a_digit_group_outside_one_to_three_is_refused(digit_group: int) -> None:
    with pytest.raises(UsageError, match="--digit-group"):
        train_tokenizer(TEXTS, vocab_size=300, digit_group=digit_group, max_chars=100)


@pytest.mark.parametrize(("max_chars", "doc_cap"), [(0, 10), (10, 0), (-1, 10)])
def test_a_bound_below_one_character_is_refused(max_chars: int, doc_cap: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        train_tokenizer(TEXTS, vocab_size=300, max_chars=max_chars, doc_cap=doc_cap)


def test_an_endless_corpus_is_read_no_further_than_max_chars() -> None:
    read = itertools.count()
    endless = (f"line {next(read)} of {number * 7919}\n" for number in itertools.count())
    train_tokenizer(endless, vocab_size=300, max_chars=20_000)
    assert next(read) < 20_000 / len("line 0 of 0\n")


def test_the_part_of_a_document_beyond_the_cap_and_text_beyond_max_chars_do_not_count() -> None:
    heads = [text[:100] for text in TEXTS]
    expected = train_tokenizer(heads, vocab_size=400, max_chars=10**6).fingerprint
    assert train_tokenizer(TEXTS, vocab_size=400, max_chars=10**6, doc_cap=100).fingerprint == expected
    total = sum(map(len, heads))
    more = [*heads, "never seen " * 1000]
    assert train_tokenizer(more, vocab_size=400, max_chars=total).fingerprint == expected


def test_surrogates_in_the_corpus_do_not_stop_training() -> None:
    tokenizer = train_tokenizer([*TEXTS, "broken \ud83d text \ude42"], vocab_size=400, max_chars=10**6)
    assert tokenizer.vocab_size == 400


def test_an_error_while_reading_the_corpus_arrives_unchanged() -> None:
    def damaged() -> Iterator[str]:
        yield from TEXTS
        raise UsageError("shard_00003.parquet is damaged")

    with pytest.raises(UsageError, match="shard_00003"):
        train_tokenizer(damaged(), vocab_size=300, max_chars=10**6)
