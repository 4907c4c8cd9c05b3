"""What a scripted model says, each token followed by the next one of the script or of its parts; what is computed."""

from itertools import pairwise

from torch import Tensor

from nanochat.chat.engine import Engine
from nanochat.model.kv_cache import Chunk, Token
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


def watch_passes(engine: Engine) -> list[tuple[int, int]]:
    """The rows and the tokens per row of each pass through the model from here on."""
    passes: list[tuple[int, int]] = []
    compute = engine.network.next_logits

    def watch(step: Chunk | Token) -> Tensor:
        passes.append((step.tokens.size(0), step.tokens.size(1)))
        return compute(step)

    engine.network.next_logits = watch  # type: ignore[method-assign]
    return passes


CALL = ("<|assistant_start|>", "<|python_start|>", "6*7", "<|python_end|>")
AFTER_CALL = ("<|output_end|>", "fine.", "<|assistant_end|>")
