"""The vocabulary."""

from tyro.conf import OmitArgPrefixes

from nanochat.config import TokenizerConfig
from nanochat.workspace import Workspace


def tokenizer_train(config: OmitArgPrefixes[TokenizerConfig]) -> None:
    """Train a tokenizer on base_data.

    Args:
        config: its settings.
    """
    from nanochat.data_stages import tokenizer_stage

    workspace = Workspace.from_environment()
    tokenizer_stage(config, workspace)
    tokenizer_eval()


def tokenizer_eval() -> None:
    """Measure the tokenizer: bytes per token by kind of text, next to GPT-2's and GPT-4's where those are on disk."""
    from nanochat.data_stages import corpus_samples
    from nanochat.tokenizer.evaluate import SAMPLES, evaluate_tokenizer, render
    from nanochat.tokenizer.tokenizer import Tokenizer

    workspace = Workspace.from_environment()
    tokenizer = Tokenizer.load(workspace.tokenizer)
    samples = {**SAMPLES, **corpus_samples(workspace)}
    print(render(evaluate_tokenizer(tokenizer, samples, workspace.encodings)))
