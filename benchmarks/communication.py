"""What ranks send each other in a step, and how long a step takes if they send it in one way or another.

    python benchmarks/communication.py [--depths 12 20 26] [--ranks 8 16]
    torchrun --nproc-per-node 8 benchmarks/communication.py --depth 12 [--device cpu|cuda]

The first counts, on no device: banks, bytes that a rank sends for gradients (in fp32 and bf16) and for weights, what
padding adds to them, how much longer the rank with the most matrices works in Muon than the mean, and the bytes into
each node where nodes have 8 ranks, at one level and at two.

The second measures the ways in turns, in one process per rank, with gloo or NCCL: gradients sent after the backward
pass or during it, in fp32 or bf16, and among all ranks at once or, on several nodes (`--ranks-per-node` plays them on
one), first within each. `with nothing sent` is the same step of each rank by itself, so what is above it is what
communication costs, but for the Muon work that ranks share.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nanochat.config import TrainBaseConfig
from nanochat.model.attention import Attention, sdpa_attention
from nanochat.model.attention_choice import choose_attention
from nanochat.model.gpt import GPT
from nanochat.optim import MuonGroup, ParameterGroup, ScheduleConfig, ShardedOptimizer, schedule_at
from nanochat.optim.optimizer import ALIGNMENT, BANK_ELEMENTS, cut_adamw, cut_muon
from nanochat.runtime import Nodes, Runtime, barrier, form_nodes, start_runtime
from nanochat.training.groups import parameter_groups
from nanochat.training.recipe import base_shape, make_recipe

RANKS_PER_NODE = 8
WARM_UP_STEPS = 3
SCHEDULE = schedule_at(0, 1000, ScheduleConfig())


def groups_of(
    depth: int, vocab_size: int, runtime: Runtime, attention: Attention = sdpa_attention
) -> tuple[GPT, list[ParameterGroup]]:
    config = TrainBaseConfig(depth=depth)
    shape = base_shape(config, vocab_size)
    with runtime.device:
        model = GPT(shape, runtime.compute_dtype, attention)
    return model, parameter_groups(model, config, make_recipe(config, shape, dataset_tokens=10**11))


def count(depth: int, ranks: int, vocab_size: int, bank_elements: int) -> dict[str, Any]:
    """The bytes of one step, by the optimizer's own cut."""
    _, groups = groups_of(depth, vocab_size, Runtime(torch.device("meta"), torch.float32))
    numbers, padded, banks = 0, 0, 0
    # Of a matrix of s × l, its share of Muon's work: products of s × l × s and s × s × s.
    all_work, longest_work = 0.0, 0.0
    for group in groups:
        numbers += sum(parameter.numel() for parameter in group.parameters.values())
        if not isinstance(group, MuonGroup):
            cut = cut_adamw(group.parameters, ranks, bank_elements)
            padded += sum(
                -(-sum(p.numel() for p in bank.values()) // (ranks * ALIGNMENT)) * ranks * ALIGNMENT for bank in cut
            )
        else:
            cut = cut_muon(group.parameters, ranks, bank_elements)
            for bank in cut:
                shape = next(iter(bank.values())).shape
                per_rank = -(-len(bank) // ranks)
                padded += per_rank * ranks * shape.numel()
                work = min(shape) ** 2 * (2 * max(shape) + min(shape))
                all_work += len(bank) * work
                longest_work += per_rank * work
        banks += len(cut)
    sent = padded * (ranks - 1) / ranks
    nodes = ranks / RANKS_PER_NODE
    return {
        "depth": depth,
        "ranks": ranks,
        "banks": banks,
        "gradients_fp32_MB": 4 * sent / 1e6,
        "gradients_bf16_MB": 2 * sent / 1e6,
        "weights_MB": 4 * sent / 1e6,
        "padding": padded / numbers - 1,
        "muon_imbalance": longest_work * ranks / all_work - 1,
        "into_node_one_level_MB": 4 * sent / 1e6 if nodes > 1 else 0.0,
        "into_node_two_levels_MB": 4 * padded * (nodes - 1) / nodes / 1e6 if nodes > 1 else 0.0,
    }


@dataclass(frozen=True)
class Way:
    """One way to send."""

    name: str
    overlaps: bool
    reduce_dtype: torch.dtype = torch.float32
    has_two_levels: bool = False
    is_alone: bool = False


WAYS = (
    Way("with nothing sent", False, is_alone=True),
    Way("after the backward, fp32", False),
    Way("during the backward, fp32", True),
    Way("during the backward, bf16", True, torch.bfloat16),
    Way("during, two levels, fp32", True, has_two_levels=True),
    Way("during, two levels, bf16", True, torch.bfloat16, has_two_levels=True),
)


@contextlib.contextmanager
def ranks_hidden(hidden: bool) -> Iterator[None]:
    """Let an optimizer be built as if there were one rank."""
    is_initialized = dist.is_initialized
    if hidden:
        dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = is_initialized


def make_step(way: Way, asked: argparse.Namespace, runtime: Runtime, nodes: Nodes | None) -> Callable[[], None]:
    """One optimizer step of two micro-batches, of a model of its own."""
    torch.manual_seed(0)
    shape = base_shape(TrainBaseConfig(depth=asked.depth), asked.vocab_size)
    attention = choose_attention("auto", shape, runtime)
    model, groups = groups_of(asked.depth, asked.vocab_size, runtime, attention.function)
    model.init_weights()
    compiled = runtime.device.type == "cuda" and asked.compile != "off"
    with ranks_hidden(way.is_alone):
        optimizer = ShardedOptimizer(
            groups,
            work_dtype=runtime.compute_dtype,
            compile_muon=compiled,
            reduce_dtype=way.reduce_dtype,
            nodes=nodes if way.has_two_levels else None,
            bank_elements=asked.bank_elements,
        )
    forward: Callable[..., torch.Tensor] = model
    if compiled and asked.compile == "whole":
        forward = torch.compile(model, dynamic=False)
    elif compiled:
        for block in model.get_submodule("transformer.h").children():
            block.compile(dynamic=False)
    forward = attention.around(forward)
    torch.manual_seed(runtime.rank)
    rows = torch.randint(asked.vocab_size, (asked.device_batch_size, asked.sequence_len + 1), device=runtime.device)

    def step() -> None:
        for is_last in (False, True):
            if is_last and way.overlaps:
                optimizer.reduce_during_backward()
            forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).backward()  # type: ignore[no-untyped-call]
        with ranks_hidden(way.is_alone):
            norm = optimizer.reduce_gradients()
        optimizer.step(SCHEDULE, norm.isfinite())

    return step


def measure(asked: argparse.Namespace) -> None:
    """Time each way in turns and print the medians, of the slowest rank's steps."""
    with start_runtime(asked.device) as runtime:
        nodes = runtime.nodes or (form_nodes(asked.ranks_per_node) if asked.ranks_per_node else None)
        ways = [way for way in WAYS if nodes is not None or not way.has_two_levels]
        steps = {way.name: make_step(way, asked, runtime, nodes) for way in ways}
        seconds: dict[str, list[float]] = {way.name: [] for way in ways}
        for repeat in range(WARM_UP_STEPS + asked.repeats):
            for name, step in steps.items():
                if runtime.device.type == "cuda":
                    torch.cuda.synchronize(runtime.device)
                barrier()
                began = time.perf_counter()
                step()
                if runtime.device.type == "cuda":
                    torch.cuda.synchronize(runtime.device)
                barrier()
                if repeat >= WARM_UP_STEPS:
                    seconds[name].append(time.perf_counter() - began)
        if not runtime.is_main:
            return
        device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "CPU"
        print(
            f"d{asked.depth}, {runtime.world_size} ranks, {device}, torch {torch.__version__}, {asked.repeats} repeats"
        )
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        base = medians["after the backward, fp32"]
        for name, median in medians.items():
            print(f"{name:<28}{median * 1e3:12.1f} ms{median / base:8.2f}")
        print(json.dumps({"settings": vars(asked), "world_size": runtime.world_size, "seconds": medians}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 16, 20, 24, 26])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--bank-elements", type=int, default=BANK_ELEMENTS)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--sequence-len", type=int, default=2048)
    parser.add_argument("--device-batch-size", type=int, default=8)
    parser.add_argument("--ranks-per-node", type=int, default=0, help="play nodes of so many ranks")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", choices=("blocks", "whole", "off"), default="blocks", help="on a GPU")
    asked = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        measure(asked)
        return
    cases = itertools.product(asked.depths, asked.ranks)
    found = [count(depth, ranks, asked.vocab_size, asked.bank_elements) for depth, ranks in cases]
    print("per rank and step, in MB; into a node of 8 ranks, for gradients in fp32:")
    print("depth ranks banks gradients  in bf16   weights padding  Muon +  one level  two levels")
    for row in found:
        depth = row["depth"]
        print(
            f"{f'd{depth}':5}{row['ranks']:6}{row['banks']:6}{row['gradients_fp32_MB']:10.0f}"
            f"{row['gradients_bf16_MB']:9.0f}{row['weights_MB']:10.0f}{row['padding']:8.1%}{row['muon_imbalance']:8.1%}"
            f"{row['into_node_one_level_MB']:11.0f}{row['into_node_two_levels_MB']:12.0f}"
        )
    print("steps: skipped, this process is one rank — start it with torchrun")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
