"""What the rest of the house may rely on when it encodes and decodes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

quick = settings(max_examples=150, deadline=None)
texts_with_specials = st.lists(st.one_of(st.text(), st.sampled_from(SPECIAL_TOKENS))).map("".join)


@quick
@given(text=texts_with_specials)
def test_every_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@quick
@given(text=texts_with_specials)
def test_no_text_can_produce_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    assert all(token_id < tokenizer.bos_id for token_id in tokenizer.encode(text))


@quick
@given(text=st.text(st.one_of(st.characters(categories=["Cs"]), st.sampled_from("ab \n🙂"))))
def test_surrogates_are_joined_or_replaced_and_never_crash(tokenizer: Tokenizer, text: str) -> None:
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == mended


def test_a_surrogate_pair_is_its_character_and_a_lone_one_costs_only_itself(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42a\ud83db\ude42")) == "🙂a\ufffdb\ufffd"


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "x" + "\u3000" * 1_100_000, "a" * 1_100_000])
def test_a_run_longer_than_the_regex_engine_can_take_is_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_text_without_such_a_run_is_encoded_as_one(tokenizer: Tokenizer) -> None:
    text = ("word " * 9 + "\n" * 50 + " " * 1000) * 600
    assert len(text) > 500_000
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


@quick
@given(
    batch=st.lists(st.text(max_size=20), max_size=200),
    num_threads=st.integers(1, 4),
)
def test_a_batch_is_encoded_as_its_texts_are_on_any_number_of_threads(
    tokenizer: Tokenizer, batch: list[str], num_threads: int
) -> None:
    assert tokenizer.encode_batch(batch, num_threads) == [tokenizer.encode(text) for text in batch]


@quick
@given(text=st.text())
def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


def test_token_bytes_has_a_row_for_every_id_and_nothing_for_special_tokens(tokenizer: Tokenizer) -> None:
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.shape == (tokenizer.vocab_size,)
    assert token_bytes.dtype == np.int64
    special = [tokenizer.special_id(name) for name in SPECIAL_TOKENS]
    assert token_bytes[special].sum() == 0
    assert (np.delete(token_bytes, special) > 0).all()


@quick
@given(text=st.text())
def test_bytes_of_single_ids_join_to_the_whole_so_a_reply_can_be_streamed(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)) == text.encode()


def test_the_nine_special_tokens_have_the_last_ids_in_their_published_order(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special_id(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(tokenizer.vocab_size - 9, tokenizer.vocab_size))
    assert tokenizer.bos_id == ids[0]
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(KeyError):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(KeyError):
        tokenizer.special_id("<|nobody|>")


def test_a_vocabulary_with_a_repeated_token_or_a_missing_byte_is_refused() -> None:
    every_byte = [bytes([value]) for value in range(256)]
    with pytest.raises(ValueError, match="twice"):
        Tokenizer([*every_byte, b"ab", b"ab"], r"\w+|\W+", digit_group=2)
    with pytest.raises(ValueError, match="256"):
        Tokenizer([*every_byte[1:], b"ab"], r"\w+|\W+", digit_group=2)
