"""Training a vocabulary: byte-pair encoding by rustbpe over a bounded amount of text."""

from collections.abc import Iterable, Iterator

import rustbpe

from nanochat.errors import UsageError
from nanochat.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS) + 1
MAX_VOCAB_SIZE = 2**16  # Token shards store ids as uint16.


def split_pattern(digit_group: int = 2) -> str:
    """The regular expression that cuts text into pieces no token may cross.

    It is GPT-4's (`cl100k_base` in openai/tiktoken) with the number of digits kept together as a parameter.
    GPT-4 keeps 3; a small vocabulary cannot afford 1,000 number tokens. karpathy/nanochat's log of 2026-01-13
    gives, at depth 12 with 32,768 tokens, 0.969, 0.965 and 0.972 bits per byte for 1, 2 and 3.

    rustbpe, tiktoken and Hugging Face's tokenizers each have a regex engine of their own. All three read this
    spelling, and the last two, which must agree on ids, split alike at every code point.

    Args:
        digit_group: 1, 2 or 3.

    Raises:
        UsageError: another number.
    """
    if digit_group not in (1, 2, 3):
        raise UsageError(f"digit group {digit_group} is not supported", "use --digit-group 1, 2 or 3")
    return "|".join(
        (
            r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
            r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word, with the space or sign before it
            rf"\p{{N}}{{1,{digit_group}}}",
            r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # punctuation, with the space before it and line ends after it
            r"\s*[\r\n]",  # blank lines
            r"\s+(?!\S)",  # indentation, but for the last space, which belongs to the next word
            r"\s+",
        )
    )


def check_tokenizer_settings(vocab_size: int, digit_group: int, max_chars: int, doc_cap: int) -> None:
    """Check what can be checked before there is text.

    Raises:
        UsageError: a number is out of range.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UsageError(
            f"vocabulary size {vocab_size:,} is out of range",
            f"use --vocab-size from {MIN_VOCAB_SIZE} (bytes, special tokens and one merge) "
            f"to {MAX_VOCAB_SIZE} (token shards hold 16-bit ids)",
        )
    if max_chars < 1 or doc_cap < 1:
        raise UsageError("--max-chars and --doc-cap must be at least 1", "leave them out for the defaults")
    split_pattern(digit_group)


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    digit_group: int = 2,
    max_chars: int,
    doc_cap: int = 10_000,
    corpus_fingerprint: str | None = None,
) -> Tokenizer:
    """Train a tokenizer; the same texts in the same order give the same one on every machine.

    Args:
        texts: documents. No more of them are read than `max_chars` asks for.
        vocab_size: ids in all, special tokens included.
        digit_group: see `split_pattern`.
        max_chars: characters to train on.
        doc_cap: characters of one document that count, so that a few huge ones cannot shape the vocabulary.
        corpus_fingerprint: recorded with the tokenizer.

    Raises:
        UsageError: a parameter is out of range, or the text holds too few distinct pairs for `vocab_size`
            tokens.
    """
    check_tokenizer_settings(vocab_size, digit_group, max_chars, doc_cap)
    pattern = split_pattern(digit_group)
    trainer = rustbpe.Tokenizer()
    num_mergeable = vocab_size - len(SPECIAL_TOKENS)
    trainer.train_from_iterator(_bounded(texts, max_chars, doc_cap), num_mergeable, pattern=pattern)
    by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda token_and_rank: token_and_rank[1])
    if len(by_rank) < num_mergeable:
        largest = len(by_rank) + len(SPECIAL_TOKENS)
        lower = f", or lower --vocab-size to {largest}" if largest >= MIN_VOCAB_SIZE else ""
        raise UsageError(
            f"the training text is too small for a vocabulary of {vocab_size}: all its merges make {largest}",
            f"train on more text{lower}",
        )
    return Tokenizer(
        [bytes(token) for token, _ in by_rank],
        pattern,
        digit_group=digit_group,
        corpus_fingerprint=corpus_fingerprint,
    )


def _bounded(texts: Iterable[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    """`doc_cap` characters of each text and `max_chars` in all, without surrogates, which rustbpe refuses."""
    left = max_chars
    for text in texts:
        part = text[: min(doc_cap, left)]
        yield part if part.isascii() else part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        left -= len(part)
        if left == 0:
            return
