"""The same tokenizer for Hugging Face software (transformers, lm-eval, vLLM), with identical ids."""

from itertools import pairwise
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer

if TYPE_CHECKING:
    from nanochat.tokenizer.tokenizer import Tokenizer


def huggingface_tokenizer(tokenizer: "Tokenizer") -> HuggingFaceTokenizer:
    """Build a `tokenizers.Tokenizer` that gives the same ids as `tokenizer`, with `<|bos|>` in front.

    The `<|bos|>` is added by the post-processor, because evaluation tools rely on the tokenizer for it:
    without it they score the model on text it never saw the start of. `add_special_tokens=False` leaves it
    out.

    Text that spells a special token is plain text here, as in `Tokenizer.encode`. The file format cannot
    store that choice: whoever loads `tokenizer.json` gets special ids for such text, which chat templates
    need, and must set `encode_special_tokens = True` (in transformers: `split_special_tokens=True`) before
    encoding what users typed.

    Unlike `Tokenizer.encode` it refuses text with surrogates.

    Raises:
        ValueError: a token of the vocabulary is not the merge of two earlier ones.
    """
    characters = byte_characters()

    def spelled(token: bytes) -> str:
        return "".join(characters[value] for value in token)

    vocabulary = {spelled(token): rank for rank, token in enumerate(tokenizer.mergeable_tokens)}
    merges = [(spelled(left), spelled(right)) for left, right in recovered_merges(tokenizer.mergeable_tokens)]
    result = HuggingFaceTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tokenizer.special_ids])
    result.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.bos_id)]
    )
    result.encode_special_tokens = True
    return result


def byte_characters() -> list[str]:
    """The visible character that stands for each byte value in Hugging Face's byte-level vocabularies.

    The convention comes with GPT-2: Latin-1's printable characters stand for themselves, the other bytes for
    the characters from U+0100 on, in order.
    """
    characters = []
    next_code_point = 0x100
    for value in range(256):
        if chr(value).isprintable() and chr(value) != " ":
            characters.append(chr(value))
        else:
            characters.append(chr(next_code_point))
            next_code_point += 1
    return characters


def recovered_merges(mergeable_tokens: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in rank order; single bytes have none.

    tiktoken's format keeps only the result of every merge. Merging a token's own bytes with the tokens before
    it must end in two parts, and those are the pair.

    Raises:
        ValueError: it does not, so the ranks do not come from byte-pair training.
    """
    ranks = {token: rank for rank, token in enumerate(mergeable_tokens)}
    merges = []
    for rank, token in enumerate(mergeable_tokens):
        if len(token) == 1:
            continue
        parts = [bytes([value]) for value in token]
        while len(parts) > 2:
            candidates = [(ranks.get(left + right, rank), i) for i, (left, right) in enumerate(pairwise(parts))]
            best_rank, i = min(candidates)
            if best_rank >= rank:
                raise ValueError(f"token {rank} ({token!r}) is not the merge of two earlier tokens")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges
