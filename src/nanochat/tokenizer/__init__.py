"""Text to token ids and back: trained with rustbpe, applied with tiktoken, exported to Hugging Face."""

from nanochat.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

__all__ = ["SPECIAL_TOKENS", "Tokenizer"]
