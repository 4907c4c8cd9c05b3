"""Problems cut into batches and dealt to the ranks, so that neither changes a result."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.runtime import Runtime, gather_from_ranks, made_progress
from nanochat.tracking.console import Console

Problem = TypeVar("Problem")
Answer = TypeVar("Answer")


def answer_all(
    problems: Sequence[Problem],
    length: Callable[[Problem], int],
    answer: Callable[[list[Problem]], list[Answer]],
    runtime: Runtime,
    batch_size: int,
    *,
    console: Console,
    description: str,
) -> list[Answer]:
    """Have every problem answered by one rank, and give all answers to all ranks.

    A batch holds problems of about the same length, so that little is padding. The ranks take turns at whole batches:
    a batch holds the same problems on any number of ranks, so the answers are the same to the bit. Another batch size
    rounds matmuls differently, which shows only where two answers are as good as each other.

    Args:
        length: how long a problem is, in any unit.
        answer: answers one batch, in its order.
        runtime: this rank's share is batches rank, rank + world size, …
        batch_size: problems per batch.
        console: shows how far this rank is.
        description: what is being answered.

    Returns:
        The answers in the order of the problems.
    """
    # The longest first: if memory does not suffice it shows at once, and the ranks end at about the same time.
    lengths = list(map(length, problems))
    order = sorted(range(len(problems)), key=lambda index: -lengths[index])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[runtime.rank :: runtime.world_size]
    answers: list[tuple[int, Answer]] = []
    with console.progress(description, sum(map(len, mine))) as progress:
        for batch in mine:
            answers += zip(batch, answer([problems[index] for index in batch]), strict=True)
            progress.advance(len(batch))
            made_progress()
    by_index = dict(pair for share in gather_from_ranks(answers) for pair in share)
    return [by_index[index] for index in range(len(problems))]


def check_positive(**counts: int | None) -> None:
    """Refuse counts with which nothing would be examined.

    Raises:
        UsageError: names the flag.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is {count}", f"give {flag} 1 or more")


def right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids (B, T) with zeros after the end of each sequence, where causal attention never looks from before."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], device=device)
