"""What a scripted model says: each token is followed by the next one of the script, or of one of its parts."""

from itertools import pairwise

from nanochat.tokenizer.tokenizer import Tokenizer


def tokens_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Special tokens by name, anything else byte by byte."""
    single = {bytes([value]): tokenizer.mergeable_tokens.index(bytes([value])) for value in range(256)}
    tokens = []
    for piece in pieces:
        special = tokenizer.special_ids.get(piece)
        tokens += [special] if special is not None else [single[bytes([value])] for value in piece.encode()]
    return tokens


def successors(tokenizer: Tokenizer, *scripts: tuple[str, ...]) -> dict[int, int]:
    """Which token follows which."""
    following: dict[int, int] = {}
    for script in scripts:
        for token, after in pairwise(tokens_of(tokenizer, *script)):
            assert following.setdefault(token, after) == after, "a token of a script has one successor only"
    return following


CALL = ("<|assistant_start|>", "<|python_start|>", "6*7", "<|python_end|>")
AFTER_CALL = ("<|output_end|>", "fine.", "<|assistant_end|>")
