"""The peer's side of `decode.py`: karpathy/nanochat's own engine, on a model of the same shape with random weights.

Started by `decode.py` in a process whose `nanochat` is the checkout; the last line it prints is JSON.
"""

import argparse
import json
import time
from typing import Any

import torch

from peer_attention import stand_in


class NoWords:
    """What the peer's engine asks of a tokenizer, with special tokens that a model of random weights never says."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_special(self, name: str) -> int:
        """An id that is no token's."""
        return self.vocab_size

    def get_bos_token_id(self) -> int:
        """The same."""
        return self.vocab_size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=json.loads, required=True)
    parser.add_argument("--batch-sizes", type=json.loads, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--attention", required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    stand_in(asked.attention)

    from nanochat import engine as peer_engine  # type: ignore[attr-defined]  # the checkout's, not ours.
    from nanochat import gpt as peer_gpt  # type: ignore[attr-defined]

    config = asked.config
    shape = peer_gpt.GPTConfig(
        **{name: config[name] for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")},
        window_pattern=config["window_pattern"],
    )
    with torch.device("meta"):
        model: Any = peer_gpt.GPT(shape)
    model.to_empty(device=asked.device)
    model.init_weights()
    # Zero projections would leave attention and MLP with nothing to add.
    for parameter in model.transformer.h.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.eval()
    engine = peer_engine.Engine(model, NoWords(config["vocab_size"]))
    prompt = torch.randint(config["vocab_size"], (asked.prompt_tokens,)).tolist()
    result = {}
    for batch_size in asked.batch_sizes:
        timings = []
        for _ in range(asked.repeats + 1):
            began = time.perf_counter()
            # Each step hands its tokens to Python, so nothing is left to wait for on the device.
            ticks = [
                time.perf_counter() - began
                for _ in engine.generate(prompt, num_samples=batch_size, max_tokens=asked.new_tokens, temperature=0.0)
            ]
            assert len(ticks) == asked.new_tokens
            timings.append((ticks[0], ticks[-1]))
        result[str(batch_size)] = timings[1:]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
