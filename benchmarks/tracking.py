"""What tracking costs: per step, and at the start and the end of a run.

    python benchmarks/tracking.py [--steps N] [--interval SECONDS]

Each case is a process that sleeps for a step and then logs what training logs (15 numbers). It is the time inside of
the calls that counts; the sleep leaves W&B's own process the core it has in a real run. Cases: `metrics.jsonl` alone,
with W&B offline, and with W&B offline and a printed line, which W&B captures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ("off", "offline", "offline, printing")


def measure(folder: Path, case: str, steps: int, interval: float) -> dict[str, float]:
    """Run one case in this process."""
    from nanochat.tracking.metrics import MetricsLog
    from nanochat.tracking.wandb_run import name_run, start_wandb

    begun = time.perf_counter()
    config = {f"setting_{index}": index for index in range(100)}
    names = name_run("benchmark", "base")
    run = start_wandb(names, config, folder=folder, mode="disabled" if case == "off" else "offline")
    started = time.perf_counter()
    durations = []
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(steps):
            time.sleep(interval)
            values = {f"batch/metric_{index}": step / (index + 1) for index in range(15)}
            before = time.perf_counter()
            log.log(step, values)
            run.log(values, step)
            if "printing" in case:
                print(f"step {step}/{steps} loss={1 / (step + 1):.4f}", flush=True)
            durations.append(time.perf_counter() - before)
    before = time.perf_counter()
    run.finish()
    durations.sort()
    return {
        "start": started - begun,
        "median": statistics.median(durations),
        "p99": durations[int(0.99 * (len(durations) - 1))],
        "mean": statistics.fmean(durations),
        "finish": time.perf_counter() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--interval", type=float, default=0.01, help="seconds of each step")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(Path(folder), arguments.case, arguments.steps, arguments.interval)
        print(json.dumps(measured), file=sys.stderr)
        return
    print(f"{arguments.steps} steps of {1000 * arguments.interval:g} ms; of a 100 ms step 0.5 % are 500 µs\n")
    print("| Tracking | Start, s | Per step, median µs | p99 µs | mean µs | Finish, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--steps", str(arguments.steps)]
        command += ["--interval", str(arguments.interval)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        figures: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
        micro = [f"{1e6 * figures[name]:.0f}" for name in ("median", "p99", "mean")]
        print(f"| {case} | {figures['start']:.2f} | {' | '.join(micro)} | {figures['finish']:.2f} |")


if __name__ == "__main__":
    main()
