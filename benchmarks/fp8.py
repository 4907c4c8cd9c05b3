"""The matrix products of a block in fp8 beside bf16 and beside karpathy/nanochat's fp8.

    python benchmarks/fp8.py [--peer CHECKOUT] [--depths 12 20 24] [--micro-batches 2] [--device cpu|cuda]

A block without attention: queries, keys, values, projection, MLP, all compiled, forward and backward, for a step of a
few micro-batches, fp32 weights, gradients accumulated. Ours quantises the weights once in it, the peer in every
micro-batch. bf16 and fp8 take turns in one process; the peer, whose package has the same name, is timed in another one
right after. `of bf16` is the share of our bf16's time, below 100 % is faster. A CPU can compute it, for a look at the
figures' form, but has no fast fp8: take --depths 2 --rows 256 there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS_PER_LAYER = 64


@dataclass(frozen=True)
class Cost:
    """Of one step."""

    seconds: float
    memory_bytes: int | None


class Matrices(nn.Module):
    """The six matrices of a block, each made by `linear(in, out)`."""

    def __init__(self, channels: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(linear(channels, channels) for _ in range(4))
        self.c_fc, self.c_proj = linear(channels, 4 * channels), linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels) → (rows, channels)."""
        normed = F.rms_norm(x, (x.size(-1),), eps=1e-6)
        c_q, c_k, c_v, c_proj = self.inner
        x = x + c_proj(c_q(normed) * c_k(normed) + c_v(normed))
        y: Tensor = x + self.c_proj(F.relu(self.c_fc(F.rms_norm(x, (x.size(-1),), eps=1e-6))).square())
        return y


def step_of(
    matrices: nn.Module, before: Callable[[], None], asked: argparse.Namespace, channels: int
) -> Callable[[], None]:
    """A function that does one step."""
    x = torch.randn(asked.rows, channels, dtype=torch.bfloat16, device=asked.device, requires_grad=True)
    gradient = torch.randn_like(x)
    forward = torch.compile(matrices, dynamic=False)

    def step() -> None:
        before()
        for _ in range(asked.micro_batches):
            forward(x).backward(gradient)
            x.grad = None

    return step


def costs(steps: dict[str, Callable[[], None]], asked: argparse.Namespace) -> dict[str, Cost]:
    """Median seconds and the most memory that a step adds to what is held, the steps taking turns."""
    on_gpu = asked.device == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, int] = {}
    for _ in range(asked.repeats + 2):
        for name, step in steps.items():
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            began = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() - held
            seconds[name].append(time.perf_counter() - began)
    return {name: Cost(statistics.median(found[2:]), memory.get(name)) for name, found in seconds.items()}


def our_costs(channels: int, asked: argparse.Namespace) -> dict[str, Cost]:
    from nanochat.model.fp8 import Fp8Weight
    from nanochat.model.gpt import Linear

    # Depths have shapes of their own, and the compiler gives up on a function at its ninth.
    torch.compiler.reset()
    steps = {}
    for name in ("bf16", "fp8"):
        matrices = Matrices(channels, Linear).to(asked.device)
        linears = [linear for linear in matrices.modules() if isinstance(linear, Linear)]
        copies = [(Fp8Weight(linear.weight, compiled=True), linear.weight) for linear in linears if name == "fp8"]
        for linear, (copy, _) in zip(linears, copies, strict=False):
            linear.fp8 = copy

        def refresh(copies: list[tuple[Fp8Weight, Tensor]] = copies) -> None:
            for copy, weight in copies:
                copy.refresh(weight)

        steps[name] = step_of(matrices, refresh, asked, channels)
    return costs(steps, asked)


def peer_costs(channels: int, asked: argparse.Namespace) -> dict[str, Cost]:
    from nanochat.fp8 import Float8Linear  # type: ignore[import-not-found]  # The peer's package, in its own process.

    matrices = Matrices(channels, lambda width, height: Float8Linear(width, height, bias=False)).to(asked.device)
    return costs({"peer": step_of(matrices, lambda: None, asked, channels)}, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanochat, which is not written to")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 20, 24])
    parser.add_argument("--rows", type=int, default=32 * 2048, help="tokens of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("fp8: skipped, this process sees no GPU — use --device cpu")
    if asked.as_peer:
        found = {depth: peer_costs(CHANNELS_PER_LAYER * depth, asked)["peer"] for depth in asked.depths}
        print(json.dumps({depth: asdict(cost) for depth, cost in found.items()}))
        return
    table = {depth: our_costs(CHANNELS_PER_LAYER * depth, asked) for depth in asked.depths}
    skipped = None if asked.peer else "no --peer checkout given"
    if asked.peer:
        path = os.pathsep.join(filter(None, (str(asked.peer.resolve()), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "NANOCHAT_DTYPE": "bfloat16"}
        command = [sys.executable, __file__, "--as-peer", *sys.argv[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            skipped = f"it failed: {(done.stderr.strip().splitlines() or ['it printed nothing'])[-1]}"
        else:
            for depth, cost in json.loads(done.stdout.splitlines()[-1]).items():
                table[int(depth)]["peer"] = Cost(**cost)
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    print(f"{name}, {asked.micro_batches} × {asked.rows:,} rows, torch {torch.__version__}")
    print(f"{'depth':>6}  {'':8}{'ms/step':>12}{'of bf16':>10}{'TFLOP/s':>10}{'memory':>12}")
    for depth, found in table.items():
        # Twelve C² weights, two FLOPs each per row, forward and twice in backward.
        flops = 72 * (CHANNELS_PER_LAYER * depth) ** 2 * asked.rows * asked.micro_batches
        for side, cost in found.items():
            memory = "" if cost.memory_bytes is None else f"{cost.memory_bytes / 1e9:.2f} GB"
            share = cost.seconds / found["bf16"].seconds
            rate = flops / cost.seconds / 1e12
            print(f"{depth:6}  {side:8}{1000 * cost.seconds:12.2f}{share:10.1%}{rate:10.2f}{memory:>12}")
    if skipped:
        print(f"karpathy/nanochat skipped: {skipped}")
    result = {
        "settings": {name: value for name, value in vars(asked).items() if name not in ("peer", "as_peer")},
        "costs": {depth: {side: asdict(cost) for side, cost in found.items()} for depth, found in table.items()},
        "peer_skipped": skipped,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
