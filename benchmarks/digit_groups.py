"""How many digits may stand in one token? Train the demo's model with each choice and compare bits per byte.

Everything but the split pattern is equal: text, vocabulary size, model, steps, seed. Bits per byte count the same bytes
whatever the tokens are, so the figures compare directly; a difference below the spread over seeds shows nothing.

    python benchmarks/digit_groups.py --steps 300 --seeds 42 43
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DIGIT_GROUPS = (1, 2, 3)


def final_bits_per_byte(folder: Path, digit_group: int, seed: int, steps: int) -> float:
    """Run the pipeline in a folder of its own; tokenizer and tokens are shared by the seeds of one choice."""
    shape = (
        "--vocab-size 4096 --depth 4 --head-dim 64 --sequence-len 256 --total-batch-size 4096 --device-batch-size 16"
    )
    rest = "--lanes 8 --no-scale-hyperparameters --eval-every 0 --eval-tokens 131072 --save-every 0 --wandb disabled"
    run = f"k{digit_group}-s{seed}"
    command = [
        *(sys.executable, "-m", "nanochat", "speedrun", "--run", run, "--data", "builtin", "--model-tag", run),
        *("--digit-group", str(digit_group), "--seed", str(seed), "--num-steps", str(steps)),
        *shape.split(),
        *rest.split(),
    ]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(folder)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    record = json.loads((folder / "runs" / run / "stages" / "base.json").read_text())
    return float(record["outputs"]["epoch/bpb"])


def main() -> None:
    """Run every choice with every seed and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 4,096 tokens (default: 300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43], help="seeds (default: 42 43)")
    flags = parser.parse_args()
    results: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for digit_group in DIGIT_GROUPS:
            folder = Path(scratch) / str(digit_group)
            results[digit_group] = [final_bits_per_byte(folder, digit_group, seed, flags.steps) for seed in flags.seeds]
            values = "  ".join(f"{value:.4f}" for value in results[digit_group])
            print(
                f"up to {digit_group} digits: {statistics.mean(results[digit_group]):.4f} bpb  ({values})", flush=True
            )
    print(json.dumps({"benchmark": "digit_groups", "steps": flags.steps, "seeds": flags.seeds, "bpb": results}))


if __name__ == "__main__":
    main()
