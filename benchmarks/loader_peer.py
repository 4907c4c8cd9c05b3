"""The peer's side of `loader.py`, in a process whose `nanochat` is a checkout of karpathy/nanochat.

Started by `loader.py`; prints one line of JSON.
"""

import base64
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import tiktoken
import torch


class CountingTokenizer:
    """The peer's own tokenizer class over our vocabulary, counting what passes through it.

    It has the two methods by which the peer's loader uses a tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = [line.split() for line in (folder / "ranks.tiktoken").read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        special = {name: len(ranks) + index for index, name in enumerate(config["special_tokens"])}
        encoding = tiktoken.Encoding("bench", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens=special)
        self._inner = importlib.import_module("nanochat.tokenizer").RustBPETokenizer(encoding, "<|bos|>")
        self.documents = 0
        self.tokens = 0

    def get_bos_token_id(self) -> int:
        """The peer's name for our `bos_id`."""
        return int(self._inner.get_bos_token_id())

    def encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        """Encode a batch of texts."""
        encoded: list[list[int]] = self._inner.encode(texts, **options)
        self.documents += len(encoded)
        self.tokens += sum(map(len, encoded))
        return encoded


def main() -> None:
    tokenizer_folder, rows, sequence_len, num_documents, num_batches, repeats = sys.argv[1:]
    batch, length = int(rows), int(sequence_len)
    loader_module = importlib.import_module("nanochat.dataloader")

    def start() -> tuple[CountingTokenizer, Any]:
        tokenizer = CountingTokenizer(Path(tokenizer_folder))
        make = loader_module.tokenizing_distributed_data_loader_with_state_bos_bestfit
        return tokenizer, make(tokenizer, batch, length, "train", device="cpu")

    _, batches = start()
    for _ in range(3):
        next(batches)
    rates, cpu_rates = [], []
    for _ in range(int(repeats)):
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(int(num_batches)):
            next(batches)
        tokens = int(num_batches) * batch * length
        rates.append(tokens / (time.perf_counter() - began))
        cpu_rates.append(tokens / (time.process_time() - cpu_began))

    # One epoch: until every document has gone into the packer. What still waits in its buffer is not waste.
    tokenizer, batches = start()
    delivered = 0
    while tokenizer.documents < int(num_documents):
        next(batches)
        delivered += batch * (length + 1)
    waiting = sum(map(len, batches.gi_frame.f_locals["doc_buffer"]))
    waste = 1 - delivered / (tokenizer.tokens - waiting)
    result = {
        "rate": statistics.median(rates),
        "cpu_rate": statistics.median(cpu_rates),
        "crop_fraction": waste,
        "waiting_tokens": waiting,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
