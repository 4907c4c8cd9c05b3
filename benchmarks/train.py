"""Training, ours beside karpathy/nanochat: how fast, and how good a model after the same tokens or the same time.

    python benchmarks/train.py [--peer CHECKOUT] [--minutes 3] [--compile]
    python benchmarks/train.py --device cuda --depth 12 --peer CHECKOUT [--fp8] [--data FOLDER]

Both sides get the same text (the built-in corpus, or shards in --data), token ids, shapes and batch, and on a CPU the
same threads. Each keeps its own default hyperparameters, schedules, initial weights and data order: equal
hyperparameters are not the point, the result is.

- Ours is `nanochat train base` as it is by default in a short run: eager on a CPU, and with --compile also probed
  compiled, as it is by default in a long one; compiled on a GPU, in bfloat16, and with --fp8 also in fp8, and the
  faster of the two is compared.
- The peer is its own `scripts.base_train`: torch.compile of the model and of the optimizer is always on there, and its
  scaling rules choose the learning rates. Its default on a CPU is float32; where the CPU has bfloat16 that is tried
  too, and the faster of the two is compared. On a GPU it is bfloat16, and with --fp8 also its fp8, which takes in the
  head; ours does not. FlashAttention 3, which it would fetch from a hub, is taken from --peer-attention.

Each mode is first probed for a few steps with an empty compiler cache: that gives its speed, its memory and the time
until the first step is done (`cold`). Then the peer trains for --minutes, with the cache its probe left, and ours, in
its default mode, once for each of --equal, each with schedules made for its own number of steps:

- tokens: as many steps as the peer;
- training-time: as long as the peer's steps took, compilation left out;
- wall-clock: as long as the peer took from its start to its last step, start-up and compilation included.

A training is printed as soon as it is done, as a line of JSON, so that a run which is cut off has not been in vain.

All models are scored on the same validation rows with the same sums. `of peak` is the share of what large matrix
products reach on this device in the same run, in the same dtype or, for fp8, in bfloat16; FLOPs are counted as
`nanochat.model.size` does. Last come two tables and one line of JSON with everything. The peer warms up over 40 steps
whatever the horizon, so give it minutes that hold some hundred.
"""

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch

import nanochat
from nanochat.checkpoint.store import load_checkpoint
from nanochat.config import ModelConfig, model_from_depth
from nanochat.corpus.builtin import build_builtin_corpus
from nanochat.corpus.shards import adopt, read_texts
from nanochat.evaluation.bits_per_byte import bits_per_byte
from nanochat.identity import usable_cores
from nanochat.loader.batches import validation_rows
from nanochat.loader.token_shards import TokenDataset
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.model.gpt import GPT
from nanochat.model.size import flops_per_token
from nanochat.runtime import Runtime, cpu_has_fast_bfloat16
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tokenizer.train import train_tokenizer
from nanochat.tracking import keys
from nanochat.tracking.environment import describe_environment
from nanochat.tracking.metrics import read, series
from nanochat.training.session import metrics_path
from nanochat.workspace import Workspace
from peer_attention import best_for_peer

OUR_SOURCE = Path(nanochat.__file__).parents[1]
WARM_UP_STEPS = 3
# Defaults on a CPU and on a GPU: a toy, and what both sides train at full size.
SHAPES: dict[str, tuple[tuple[Any, Any], type, str]] = {
    "head_dim": ((64, 128), int, "channels of an attention head"),
    "sequence_len": ((256, 2048), int, "tokens of a row"),
    "window_pattern": (("L", "SSSL"), str, "L is what the peer's own script for CPUs uses"),
    "device_batch_size": ((16, 32), int, "rows"),
    "total_batch_size": ((4096, 524288), int, "tokens per step"),
}
# Both sides print one line per step: `step 7/300 …loss…`.
STEP_LINE = re.compile(r"step 0*\d+/\d+ .*loss")
PEER_STEP_SECONDS = re.compile(r"\| dt: ([\d.]+)ms")
PEER_SCORE = re.compile(r"Validation bpb: (\S+)")
PEER_MEMORY = re.compile(r"Peak memory usage: ([\d.]+)MiB")
PEER_HAS_FLASH_ATTENTION_3 = "Using Flash Attention 3"
OUR_ATTENTION = re.compile(r"attention: (\w+)")
BUDGETS = ("tokens", "training-time", "wall-clock")


class ProcessFailedError(Exception):
    """A training process ended with an error; the message is the last line it printed."""


@dataclass(frozen=True)
class Shape:
    """What both sides train: the flags of this benchmark that shape the model and its batches."""

    depth: int
    head_dim: int
    sequence_len: int
    window_pattern: str
    device_batch_size: int
    total_batch_size: int


@dataclass(frozen=True)
class Mode:
    """One way to train."""

    side: str
    dtype: str
    compiled: bool
    fp8: bool = False

    def __str__(self) -> str:
        return f"{self.side}, {'fp8' if self.fp8 else self.dtype}, {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Training:
    """One finished training.

    Attributes:
        step_seconds: median over the steps after the warm-up, by the trainer's own clock.
        start_seconds: from the start of the process to the end of the first step, beyond what a step takes: imports,
            data, compilation, warm-up.
        train_seconds: all steps, the first counted as a median one.
        wall_seconds: from the start of the process to the end of the last step.
        memory_bytes: the most memory: of tensors on a GPU, resident on a CPU, which the peer does not tell.
        attention: the kernels that were used.
        bits_per_byte: on the validation rows; None for a probe.
    """

    steps: int
    step_seconds: float
    start_seconds: float
    train_seconds: float
    wall_seconds: float
    memory_bytes: float | None
    attention: str
    bits_per_byte: float | None


@dataclass
class Bench:
    """The folders, settings and data of one run of this benchmark; `peer` is the checkout, if there is one."""

    ours: Workspace
    peer_base: Path
    peer: Path | None
    shape: Shape
    device: torch.device
    threads: int
    peer_attention: str
    rows: np.ndarray = field(init=False)
    tokenizer: Tokenizer = field(init=False)

    def prepare(self, vocab_size: int, eval_rows: int, data: Path | None) -> None:
        """Make corpus, tokenizer, tokens and validation rows, and hand the peer the same in its own format."""
        if data is None:
            build_builtin_corpus(self.ours.base_data)
        else:
            self.ours.base_data.symlink_to(data.resolve())
            adopt(self.ours.base_data)
        texts = read_texts(self.ours.base_data, "train", "run the benchmark again")
        self.tokenizer = train_tokenizer(texts, vocab_size=vocab_size, max_chars=200_000_000)
        self.tokenizer.save(self.ours.tokenizer)
        tokenize_corpus(self.ours.base_data, self.ours.tokenizer, self.ours.tokens, workers=self.threads)
        val = TokenDataset.open(self.ours.tokens, "val")
        self.rows = validation_rows(val, self.shape.sequence_len, eval_rows)

        data, tokenizer = self.peer_base / "base_data_climbmix", self.peer_base / "tokenizer"
        data.mkdir(parents=True)
        tokenizer.mkdir()
        for shard in self.ours.base_data.glob("shard_*.parquet"):
            (data / shard.name).symlink_to(shard)
        encoding = tiktoken.Encoding(
            "bench",
            pat_str=self.tokenizer.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokenizer.mergeable_tokens)},
            special_tokens=self.tokenizer.special_ids,
        )
        (tokenizer / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
        torch.save(torch.from_numpy(self.tokenizer.token_bytes()), tokenizer / "token_bytes.pt")
        np.save(self.peer_base / "rows.npy", self.rows)
        np.save(self.peer_base / "token_bytes.npy", self.tokenizer.token_bytes())

    def train(self, mode: Mode, steps: int, name: str = "") -> Training:
        """Train in a process of its own; `name` asks for a score too, without it the training is a probe."""
        print(f"{mode}: {name or 'probe'}, {steps} steps", file=sys.stderr, flush=True)
        run = f"{name or 'probe'}-{mode.side}-{'fp8' if mode.fp8 else mode.dtype}-{mode.compiled}"
        if mode.side == "ours":
            command, source, base = self._our_command(mode, steps, run), str(OUR_SOURCE), self.ours.root
        else:
            command = self._peer_command(steps, fp8=mode.fp8, scored=name != "")
            source, base = str(self.peer), self.peer_base
        cache = self.ours.cache / f"{mode.side}-{mode.dtype}-{mode.fp8}"
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPYCACHEPREFIX": str(self.ours.cache / "python"),  # A checkout may be read-only, and stays as it is.
            "OMP_NUM_THREADS": str(self.threads),
            "NANOCHAT_BASE_DIR": str(base),
            "NANOCHAT_DTYPE": mode.dtype,
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "HF_HUB_OFFLINE": "1",
        }
        output, arrivals = run_timed(command, environment)
        if mode.side == "ours":
            rows = read(metrics_path(self.ours, run, "base", run))
            durations = series(rows, keys.STEP_SECONDS)[1]
            kind = keys.MEMORY_ALLOCATED if self.device.type == "cuda" else keys.MEMORY_RESERVED
            memory: float | None = max(series(rows, kind)[1]) * 1e9
            score = self._score_ours(mode, steps, run) if name else None
            attention = OUR_ATTENTION.findall(output)[-1]
        else:
            durations = [float(milliseconds) / 1000 for milliseconds in PEER_STEP_SECONDS.findall(output)]
            on_gpu = PEER_MEMORY.findall(output) if self.device.type == "cuda" else []
            memory = float(on_gpu[-1]) * 2**20 if on_gpu else None
            score = float(PEER_SCORE.findall(output)[-1]) if name else None
            attention = "sdpa"
            if PEER_HAS_FLASH_ATTENTION_3 in output:
                attention = "varlen" if self.peer_attention == "varlen" else "fa3"
        if not len(durations) == len(arrivals) == steps:
            raise RuntimeError(f"{len(durations)} timings and {len(arrivals)} lines of {steps} steps")
        median = statistics.median(durations[WARM_UP_STEPS:])
        training = Training(
            steps=steps,
            step_seconds=median,
            start_seconds=arrivals[0] - median,
            train_seconds=sum(durations[1:]) + median,
            wall_seconds=arrivals[-1],
            memory_bytes=memory,
            attention=attention,
            bits_per_byte=score,
        )
        print(json.dumps({"mode": str(mode), "name": name or "probe", **asdict(training)}), flush=True)
        return training

    def _our_command(self, mode: Mode, steps: int, run: str) -> list[str]:
        flags = {
            **{name.replace("_", "-"): value for name, value in asdict(self.shape).items()},
            "run": run,
            "model-tag": run,
            "num-steps": steps,
            "dtype": mode.dtype,
            "compile": "on" if mode.compiled else "off",
            "device": self.device.type,
            "wandb": "disabled",
            "log-every": 1,
            "eval-every": 0,
            "save-every": 0,
            # The checkpoint is scored here, so the trainer's own validation at the end can be short.
            "eval-tokens": self.shape.sequence_len,
        }
        words = ["-m", "nanochat", "train", "base", *(f"--{name}={value}" for name, value in flags.items())]
        return [*words, "--fp8"] if mode.fp8 else words

    def _peer_command(self, steps: int, *, fp8: bool, scored: bool) -> list[str]:
        flags = {
            "depth": self.shape.depth,
            "head-dim": self.shape.head_dim,
            "max-seq-len": self.shape.sequence_len,
            "window-pattern": self.shape.window_pattern,
            "device-batch-size": self.shape.device_batch_size,
            "total-batch-size": self.shape.total_batch_size,
            "num-iterations": steps,
            "device-type": self.device.type,
            "eval-every": steps if scored else -1,
            "core-metric-every": -1,
            "sample-every": -1,
        }
        script = Path(__file__).with_name("train_peer.py")
        arguments = (script, self.peer_base, self.shape.device_batch_size, self.peer_attention)
        words = [*map(str, arguments), *(f"--{name}={value}" for name, value in flags.items())]
        return [*words, "--fp8"] if fp8 else words

    def _score_ours(self, mode: Mode, steps: int, run: str) -> float:
        checkpoint = load_checkpoint(self.ours.checkpoints("base", run), steps, "run the benchmark again")
        dtype = torch.bfloat16 if mode.dtype == "bfloat16" else torch.float32
        model = GPT(ModelConfig(**checkpoint.config["model"]), dtype)
        model.load_state_dict(checkpoint.model)
        model.to(self.device)
        runtime = Runtime(self.device, dtype)
        score = bits_per_byte(model, self.rows, self.tokenizer.token_bytes(), runtime, self.shape.device_batch_size)
        del model
        if self.device.type == "cuda":
            # The next training needs the memory.
            torch.cuda.empty_cache()
        return score


def run_timed(command: list[str], environment: dict[str, str]) -> tuple[str, list[float]]:
    """Run Python to its end; returns what it printed, and when, in seconds, each line of a step came."""
    began = time.perf_counter()
    lines, arrivals = [], []
    with subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if STEP_LINE.search(line):
                arrivals.append(time.perf_counter() - began)
    if process.returncode != 0:
        raise ProcessFailedError((lines or ["it printed nothing"])[-1].strip())
    return "".join(lines), arrivals


def peak_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of a large matrix product, which is what a device can do at best."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[2:])


def steps_in(seconds: float, probe: Training) -> int:
    return max(WARM_UP_STEPS + 1, round(seconds / probe.step_seconds))


def compare(
    bench: Bench, ours: Mode, our_probe: Training, peer: Mode, steps: int, budgets: Sequence[str]
) -> dict[str, Training]:
    """Train the peer once and ours once for each budget, each with its share of the peer's tokens or time."""
    theirs = bench.train(peer, steps, "reference")
    our_steps = {
        "tokens": steps,
        "training-time": steps_in(theirs.train_seconds, our_probe),
        "wall-clock": steps_in(theirs.wall_seconds - our_probe.start_seconds, our_probe),
    }
    return {"peer": theirs} | {
        f"equal {budget}": bench.train(ours, our_steps[budget], f"equal-{budget}") for budget in budgets
    }


def why_no_peer(checkout: Path | None) -> str | None:
    if checkout is None:
        return "no --peer checkout given"
    known = (checkout / "scripts" / "base_train.py").is_file()
    return None if known else f"{checkout} is not a checkout of karpathy/nanochat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanochat, which is not written to")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of the peer, and so of ours")
    parser.add_argument("--equal", nargs="*", choices=BUDGETS, default=BUDGETS, help="none: probes only")
    parser.add_argument("--peer-attention", help="varlen, own, or a module with FlashAttention 3's functions")
    parser.add_argument("--compile", action="store_true", help="on a CPU, probe ours with torch.compile too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fp8", action="store_true", help="on a GPU, probe both with fp8 too")
    parser.add_argument("--data", type=Path, help="a folder of shard_*.parquet, which gets a manifest if it has none")
    parser.add_argument("--probe-steps", type=int, default=20, help="steps that measure the speed of a mode")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--vocab-size", type=int, help="default: 4096 on a CPU, 32768 on a GPU")
    parser.add_argument("--depth", type=int, default=4)
    for name, (_, kind, meaning) in SHAPES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=meaning)
    parser.add_argument("--eval-rows", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.probe_steps <= WARM_UP_STEPS:
        parser.error(f"--probe-steps must be more than the {WARM_UP_STEPS} that warm up")
    on_gpu = arguments.device == "cuda"
    if on_gpu and arguments.data is None and arguments.equal:
        parser.error("--data FOLDER: of the built-in corpus a GPU sees all in a few steps, so losses say nothing")
    if on_gpu and not torch.cuda.is_available():
        sys.exit("train: skipped, this process sees no GPU — leave out --device cuda to compare on the CPU")
    for name, (defaults, _, _) in SHAPES.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, defaults[on_gpu])
    arguments.vocab_size = arguments.vocab_size or (32768 if on_gpu else 4096)
    shape = Shape(**{name: getattr(arguments, name) for name in Shape.__dataclass_fields__})
    torch.set_num_threads(arguments.threads)
    dtypes = ("bfloat16",) if on_gpu else ("float32", "bfloat16") if cpu_has_fast_bfloat16() else ("float32",)
    compilations = (True,) if on_gpu else (False, True) if arguments.compile else (False,)
    our_modes = [Mode("ours", dtype, compiled) for compiled in compilations for dtype in dtypes]
    our_modes += [Mode("ours", "bfloat16", compiled=True, fp8=True)] if on_gpu and arguments.fp8 else []
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        checkout = arguments.peer and arguments.peer.resolve()
        device = torch.device(arguments.device)
        peer_attention = arguments.peer_attention or best_for_peer(device)
        folders = (Workspace(Path(name, "ours")), Path(name, "peer"), checkout)
        bench = Bench(*folders, shape, device, arguments.threads, peer_attention)
        bench.ours.root.mkdir()
        bench.prepare(arguments.vocab_size, arguments.eval_rows, arguments.data)
        probes = {}
        for mode in our_modes:
            try:
                probes[mode] = bench.train(mode, arguments.probe_steps)
            except ProcessFailedError as error:
                print(f"{mode}: failed: {error}", flush=True)
        default = Mode("ours", dtypes[-1], compiled=compilations[0])
        if on_gpu and probes:
            default = min(probes, key=lambda mode: probes[mode].step_seconds)
        skipped = why_no_peer(bench.peer) or (None if default in probes else f"{default} has failed")
        trainings = {}
        if skipped is None:
            try:
                peers = [Mode("peer", dtype, compiled=True) for dtype in dtypes]
                peers += [Mode("peer", "bfloat16", compiled=True, fp8=True)] if on_gpu and arguments.fp8 else []
                probes |= {mode: bench.train(mode, arguments.probe_steps) for mode in peers}
                fastest = min(peers, key=lambda mode: probes[mode].step_seconds)
                steps = steps_in(60 * arguments.minutes, probes[fastest])
                if arguments.equal:
                    trainings = compare(bench, default, probes[default], fastest, steps, arguments.equal)
            except ProcessFailedError as error:
                skipped = f"a training failed: {error}"
    machine = describe_environment()["cpu"]
    peaks = {dtype: peak_flops(device, dtype) for dtype in dtypes}
    config = model_from_depth(
        shape.depth,
        arguments.vocab_size,
        shape.sequence_len,
        head_dim=shape.head_dim,
        window_pattern=shape.window_pattern,
    )
    hardware = torch.cuda.get_device_name(device) if on_gpu else machine["model"]
    load = [load_before, os.getloadavg()[0]]
    print(
        f"\n{hardware}, {arguments.threads} threads on {machine['cores']} usable cores, torch {torch.__version__}, "
        f"load {load[0]:.1f} → {load[1]:.1f}\n{shape}, vocabulary {arguments.vocab_size:,}, "
        f"{bench.rows.size - len(bench.rows):,} validation tokens\n"
    )
    header = f"{'':34}{'tokens/s':>12}{'ms/step':>12}{'of peak':>10}{'memory':>12}{'start, cold':>14}{'attention':>12}"
    print(header)
    for mode, probe in probes.items():
        rate = shape.total_batch_size / probe.step_seconds
        share = rate * flops_per_token(config) / peaks[mode.dtype]
        memory = "" if probe.memory_bytes is None else f"{probe.memory_bytes / 1e9:.2f} GB"
        speed = f"{rate:12,.0f}{1000 * probe.step_seconds:12,.0f}{share:10.1%}"
        print(f"{mode!s:34}{speed}{memory:>12}{probe.start_seconds:12.1f} s{probe.attention:>12}")
    if trainings:
        print(f"\nlosses: {default} against {fastest}")
        print(f"{'':34}{'steps':>12}{'training':>12}{'wall clock':>14}{'bits/byte':>12}")
    for label, run in trainings.items():
        clocks = f"{run.train_seconds:10.1f} s{run.wall_seconds:12.1f} s"
        print(f"{label if label == 'peer' else f'ours, {label}':34}{run.steps:12,}{clocks}{run.bits_per_byte:12.4f}")
    if skipped is not None:
        print(f"{'karpathy/nanochat':34}skipped: {skipped}")
    result = {
        "probes": {str(mode): asdict(probe) for mode, probe in probes.items()},
        "trainings": {label: asdict(run) for label, run in trainings.items()},
        "settings": {**asdict(shape), **{key: getattr(arguments, key) for key in ("vocab_size", "threads", "minutes")}},
        "peak_flops": peaks,
        "machine": {
            **machine,
            "device": arguments.device,
            "torch": torch.__version__,
            "load": [load_before, os.getloadavg()[0]],
        },
        "peer_skipped": skipped,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
