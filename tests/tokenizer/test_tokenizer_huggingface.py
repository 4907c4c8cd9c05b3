"""Hugging Face software sees the same ids, with <|bos|> first, and special-token text as documented."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer

from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokenizer.huggingface import huggingface_tokenizer, recovered_merges
from nanochat.tokenizer.train import split_pattern


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """What another program gets from the file, with special-token text switched to plain."""
    folder = tmp_path_factory.mktemp("exported") / "tokenizer"
    tokenizer.save(folder)
    result = HuggingFaceTokenizer.from_file(str(folder / "tokenizer.json"))
    result.encode_special_tokens = True
    return result


def test_ids_are_identical_on_ten_thousand_hostile_strings(
    tokenizer: Tokenizer, exported: HuggingFaceTokenizer, hostile: list[str]
) -> None:
    theirs = [encoding.ids for encoding in exported.encode_batch_fast(hostile, add_special_tokens=False)]
    assert len(hostile) > 10_000
    assert theirs == tokenizer.encode_batch(hostile)
    assert exported.decode_batch(theirs, skip_special_tokens=False) == hostile


def test_both_split_alike_at_every_code_point_that_has_a_meaning() -> None:
    """Tokens that join a byte with a letter, digit, space or sign make any difference in splitting show."""
    every_byte = [bytes([value]) for value in range(256)]
    shapes = [b"%ca", b"a%c", b"1%c", b" %c", b"%c\n", b"!%c", b"'%c"]
    joined = dict.fromkeys(shape % value for shape in shapes for value in range(256))
    tokenizer = Tokenizer([*every_byte, *joined], split_pattern(2), digit_group=2)
    # All of planes 0 and 1 and the used part of 14; of the others, which are ideographs, private or
    # unassigned in long stretches, every 61st.
    planes = [
        *range(0xD800),
        *range(0xE000, 0x20000),
        *range(0x20000, 0x110000, 61),
        *range(0xE0000, 0xE1000),
    ]
    contexts = [f"x{chr(i)}a {chr(i)} 1{chr(i)}1 !{chr(i)}\n '{chr(i)}{chr(i)}" for i in planes]
    batch = ["".join(contexts[start : start + 64]) for start in range(0, len(contexts), 64)]
    theirs = huggingface_tokenizer(tokenizer).encode_batch_fast(batch, add_special_tokens=False)
    assert [encoding.ids for encoding in theirs] == tokenizer.encode_batch(batch)


def test_every_text_starts_with_bos_unless_asked_not_to(tokenizer: Tokenizer, exported: HuggingFaceTokenizer) -> None:
    ids = tokenizer.encode("To be scored.")
    assert exported.encode("To be scored.").ids == [tokenizer.bos_id, *ids]
    assert exported.encode("To be scored.", add_special_tokens=False).ids == ids
    assert exported.encode("To be", " scored.").ids[0] == tokenizer.bos_id
    assert exported.encode("").ids == [tokenizer.bos_id]


def test_special_tokens_have_the_same_ids_and_disappear_from_decoded_text(
    tokenizer: Tokenizer, exported: HuggingFaceTokenizer
) -> None:
    assert exported.get_vocab_size() == tokenizer.vocab_size
    assert [exported.token_to_id(name) for name in SPECIAL_TOKENS] == list(tokenizer.special_ids.values())
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.special_id("<|assistant_end|>")]
    assert exported.decode(ids) == "hi"


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_token_text_is_plain_in_our_object_and_special_in_the_plain_file(
    tokenizer: Tokenizer, name: str
) -> None:
    ours = huggingface_tokenizer(tokenizer)
    text = f"say {name} please"
    assert ours.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    from_file = HuggingFaceTokenizer.from_str(ours.to_str())
    assert tokenizer.special_id(name) in from_file.encode(text).ids


def test_the_recovered_merges_are_pairs_of_earlier_tokens(tokenizer: Tokenizer) -> None:
    ranks = {token: rank for rank, token in enumerate(tokenizer.mergeable_tokens)}
    merges = recovered_merges(tokenizer.mergeable_tokens)
    assert [left + right for left, right in merges] == list(tokenizer.mergeable_tokens[256:])
    assert all(max(ranks[left], ranks[right]) < ranks[left + right] for left, right in merges)


def test_a_token_that_no_merge_makes_is_refused() -> None:
    every_byte = tuple(bytes([value]) for value in range(256))
    with pytest.raises(ValueError, match=r"token 257 \(b'abcd'\)"):
        recovered_merges((*every_byte, b"ab", b"abcd"))


def test_the_saved_file_is_what_the_function_builds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == huggingface_tokenizer(tokenizer).to_str()
