"""How large a model is and what a token costs it, from its shape alone: login nodes ask, without waiting for torch."""

from nanochat.config import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, ModelConfig
from nanochat.errors import UsageError

# What fp8 kernels ask of every dimension of a matrix.
FP8_MULTIPLE = 16


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; they sum to `total`. `scaling` is what the scaling rules count: matrices + head."""
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    embedded = sum(config.has_value_embedding(layer) for layer in range(config.n_layer))
    # Attention's queries and output, keys and values, and the MLP, which is four times as wide inside.
    block = 2 * width**2 + 2 * width * kv_width + 8 * width**2
    counts = {
        "wte": config.vocab_size * width,
        "value_embeds": config.vocab_size * kv_width * embedded,
        "lm_head": config.vocab_size * width,
        "matrices": config.n_layer * block + embedded * VALUE_GATE_CHANNELS * config.n_kv_head,
        # Two lambdas a layer; the smear's gate and its lambda, and backout's.
        "scalars": 2 * config.n_layer + SMEAR_GATE_CHANNELS + 2 if config.variant == "modern" else 0,
    }
    return {**counts, "total": sum(counts.values()), "scaling": counts["matrices"] + counts["lm_head"]}


def flops_per_token(config: ModelConfig) -> int:
    """Training FLOPs per token, forward and backward.

    6 per matmul weight, and 12 · heads · head dim · visible tokens per layer for attention (PaLM, arXiv 2204.02311,
    appendix B), with the window where a layer has one. Embedding look-ups count nothing.
    """
    matmul_weights = parameter_counts(config)["scaling"] + (SMEAR_GATE_CHANNELS if config.variant == "modern" else 0)
    return 6 * matmul_weights + sum(12 * config.n_embd * window for window in config.windows)


def check_fp8_sizes(config: ModelConfig) -> None:
    """Refuse a shape that would fail in the first step with fp8, or train in bf16 without a word.

    Raises:
        UsageError: the model's width or context is not a multiple of 16.
    """
    for what, size in {"width": config.n_embd, "context": config.sequence_len}.items():
        if size % FP8_MULTIPLE:
            raise UsageError(
                f"--fp8 needs a {what} that is a multiple of {FP8_MULTIPLE}, this is {size}", "leave out --fp8"
            )
