"""How fast a model answers, beside karpathy/nanochat's engine and the device's memory bandwidth, in one run.

    python benchmarks/decode.py [--peer CHECKOUT] [--depth 12] [--device cpu|cuda]

A model of random weights and one prompt of random tokens, greedy, for batches of 1, 8 and 64 rows. Both sides compute
in the same dtype. `first token` is the time to it, `tokens/s` is of all that follow, over all rows. To decode a token
every weight must be read once, so the bandwidth that a plain copy reaches on this device is the limit for a batch of
one; `of limit` is the share of it. As the rows have one prompt, both sides compute it once. `own prompts` is ours with
rows that differ from the first token on; the peer takes one prompt only.

Then a chat of a few turns: the time to the first token of each turn, with what the turns before have left in the cache
and without. The peer computes all of a conversation at each turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat.chat.engine import Engine, Sampling
from nanochat.config import ModelConfig, model_from_depth
from nanochat.identity import usable_cores
from nanochat.model.gpt import GPT
from nanochat.runtime import cpu_has_fast_bfloat16
from nanochat.tokenizer.train import train_tokenizer
from peer_attention import best_for_peer

BATCH_SIZES = (1, 8, 64)
CHAT_TURNS = 5


@dataclass(frozen=True)
class Speed:
    """Of one side with one batch size."""

    first_token_seconds: float
    tokens_per_second: float


def speed(timings: list[tuple[float, float]], new_tokens: int, rows: int) -> Speed:
    """From seconds to the first and to the last token of a few repeats, their medians."""
    first = statistics.median(first for first, _ in timings)
    rest = statistics.median(last - first for first, last in timings)
    return Speed(first, rows * (new_tokens - 1) / rest)


def build_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config, dtype)
    model.to_empty(device=device)
    model.init_weights()
    cos, sin = GPT(ModelConfig(**{**asdict(config), "n_layer": 1})).to(device).buffers()
    model.cos, model.sin = cos, sin
    # Zero projections would leave attention and MLP with nothing to add.
    with torch.no_grad():
        for parameter in model.get_submodule("transformer.h").parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def our_timings(engine: Engine, prompts: list[list[int]], new_tokens: int, repeats: int) -> list[tuple[float, float]]:
    """Seconds to the first and to the last token of all rows."""
    rows, timings = len(prompts), []
    for _ in range(repeats + 1):
        ends = []
        for count in (1, new_tokens):
            began = time.perf_counter()
            answers = engine.generate(prompts, Sampling(max_new_tokens=count), batch_size=rows)
            ends.append(time.perf_counter() - began)
            assert all(len(answer) == count for answer in answers), "a row stopped early: take another seed"
        timings.append((ends[0], ends[1]))
    return timings[1:]


def chat_seconds(engine: Engine, prompt: list[int], new_tokens: int, *, keeps: bool) -> list[float]:
    """Seconds to the first token of each turn of a conversation, whose questions are as long as the prompt."""
    text, seconds = list[int](), []
    for turn in range(CHAT_TURNS):
        if not keeps:
            engine.forget()
        text += [turn, *prompt[1:]]
        began = time.perf_counter()
        stream = engine.stream(text, Sampling(max_new_tokens=new_tokens))
        answer = [next(stream)]
        seconds.append(time.perf_counter() - began)
        text += [*answer, *stream]
    return seconds


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes that a device reads per second while it copies: as many as it writes."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.int32, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(seconds[1:])


def peer_speeds(checkout: Path, config: ModelConfig, asked: argparse.Namespace, dtype: str) -> dict[int, Speed]:
    """What the peer reaches, in a process of its own."""
    command = [
        *(sys.executable, Path(__file__).with_name("decode_peer.py")),
        *("--config", json.dumps(asdict(config)), "--batch-sizes", json.dumps(BATCH_SIZES), "--device", asked.device),
        *("--prompt-tokens", str(asked.prompt_tokens), "--new-tokens", str(asked.new_tokens)),
        *("--repeats", str(asked.repeats), "--threads", str(asked.threads)),
        *("--attention", asked.peer_attention),
    ]
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "NANOCHAT_DTYPE": dtype, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    timings = json.loads(done.stdout.splitlines()[-1])
    return {int(rows): speed(found, asked.new_tokens, int(rows)) for rows, found in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanochat, which is not written to")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--sequence-len", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--peer-attention", help="own, or a module with FlashAttention 3's functions")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("decode: skipped, this process sees no GPU — use --device cpu")
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    if asked.peer_attention is None:
        best = best_for_peer(device)
        # PyTorch's FlashAttention 2 has nothing for a cache; the peer's own fall-back has.
        asked.peer_attention = "own" if best == "varlen" else best
    dtype = torch.bfloat16 if device.type == "cuda" or cpu_has_fast_bfloat16() else torch.float32
    config = model_from_depth(asked.depth, asked.vocab_size, asked.sequence_len)
    # Its special tokens are all that matters: a model of random weights says none of them.
    engine = Engine(build_model(config, device, dtype), train_tokenizer(["no words"], vocab_size=266, max_chars=100))
    prompt = torch.randint(config.vocab_size, (asked.prompt_tokens,)).tolist()
    ours: dict[int, Speed] = {}
    own_prompts: dict[int, Speed] = {}
    for rows in BATCH_SIZES:
        alike, different = [prompt] * rows, [[row, *prompt[1:]] for row in range(rows)]
        for found, prompts in ((ours, alike), (own_prompts, different)):
            timings = our_timings(engine, prompts, asked.new_tokens, asked.repeats)
            found[rows] = speed(timings, asked.new_tokens, rows)
    turn_tokens = min(asked.prompt_tokens, asked.sequence_len // CHAT_TURNS - asked.new_tokens)
    chat: dict[str, list[float]] = {}
    if turn_tokens > 0:
        for name, keeps in (("warm-up", True), ("kept", True), ("not kept", False)):
            engine.forget()
            chat[name] = chat_seconds(engine, prompt[:turn_tokens], asked.new_tokens, keeps=keeps)
        del chat["warm-up"]
    theirs: dict[int, Speed] = {}
    skipped = None if asked.peer else "no --peer checkout given"
    if asked.peer:
        try:
            theirs = peer_speeds(asked.peer.resolve(), config, asked, str(dtype).removeprefix("torch."))
        except RuntimeError as error:
            skipped = f"it failed: {error}"
    read = engine.network.bytes_per_step
    limit = copy_bytes_per_second(device) / 2 / read
    tokens = f"{asked.prompt_tokens} + {asked.new_tokens} tokens"
    print(f"d{asked.depth}, {dtype}, {asked.device}, {tokens}, torch {torch.__version__}")
    print(f"limit for one row: {limit:,.0f} tokens/s, {read / 1e6:,.0f} MB of weights for each")
    print(
        f"{'rows':>6}{'ours: first token':>20}{'tokens/s':>12}{'of limit':>10}"
        f"{'own prompts':>14}{'peer: first token':>20}{'tokens/s':>12}"
    )
    for rows, mine in ours.items():
        share = f"{mine.tokens_per_second / limit:.0%}" if rows == 1 else ""
        line = f"{rows:6}{mine.first_token_seconds:18.3f} s{mine.tokens_per_second:12,.1f}{share:>10}"
        line += f"{own_prompts[rows].first_token_seconds:12.3f} s"
        peer = theirs.get(rows)
        print(line + (f"{peer.first_token_seconds:18.3f} s{peer.tokens_per_second:12,.1f}" if peer else ""))
    for name, seconds in chat.items():
        shown = " ".join(f"{1000 * turn:.1f}" for turn in seconds)
        print(f"chat of {CHAT_TURNS} turns, {turn_tokens} + {asked.new_tokens} tokens each, {name}: {shown} ms")
    if skipped:
        print(f"karpathy/nanochat skipped: {skipped}")
    elif device.type == "cuda":
        print(f"karpathy/nanochat's attention: {asked.peer_attention}; own is a mask where its hub is out of reach")
    result = {
        "settings": {name: value for name, value in vars(asked).items() if name != "peer"} | {"dtype": str(dtype)},
        "limit_tokens_per_second": limit,
        "ours": {rows: asdict(found) for rows, found in ours.items()},
        "own_prompts": {rows: asdict(found) for rows, found in own_prompts.items()},
        "chat_first_token_seconds": chat,
        "peer": {rows: asdict(found) for rows, found in theirs.items()},
        "peer_skipped": skipped,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
