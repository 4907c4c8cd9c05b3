"""What the image costs: its size, what is in it, the start of a command in it beside one without, and a rebuild.

    python benchmarks/image.py nanochat.sif [--rebuild]

Both sides in one run: a command in the image, and the same command of a virtual environment with the same packages,
which is the one this script runs in. --rebuild also builds the image again with itself as the base, as after a change
of the code, and needs the image's wheel of setuptools from pip's index or a folder of wheels.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

REPEATS = 7
BUILD = Path(__file__).parents[1] / "container/build.py"
# Largest first; the parts of the tree that together are nearly all of it.
PARTS = "/usr /opt/nanochat/venv/lib/python3.11/site-packages/*"


def seconds_of(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median wall time of a few repeats, after one that warms the page cache."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(f"image: {' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def start_up(image: Path) -> dict[str, dict[str, float]]:
    """Seconds from the start of a command to its end, in the image and in this environment."""
    inside = ("apptainer", "--silent", "exec", image)
    programs: dict[str, tuple[str | Path, ...]] = {
        "true": ("true",),
        "python -c pass": ("python", "-c", "pass"),
        "nanochat --help": ("nanochat", "--help"),
        "python -c 'import torch'": ("python", "-c", "import torch"),
    }
    here = Path(sys.executable).parent
    found = {}
    for name, program in programs.items():
        bare = (here / program[0] if (here / program[0]).exists() else program[0], *program[1:])
        repeats = 3 if "torch" in name else REPEATS
        found[name] = {
            "image": seconds_of(partial(run, *inside, *program), repeats),
            "bare": seconds_of(partial(run, *bare), repeats),
        }
    return found


def contents(image: Path) -> list[tuple[str, int]]:
    """The largest parts, uncompressed, in MB."""
    listing = run("apptainer", "--silent", "exec", image, "sh", "-c", f"du -sm {PARTS} 2>/dev/null | sort -rn | head")
    rows = [line.split("\t") for line in listing.splitlines()]
    return [(name.removeprefix("/opt/nanochat/venv/lib/python3.11/"), int(size)) for size, name in rows]


def rebuild_seconds(image: Path, variant: str) -> dict[str, float]:
    """Seconds to build again with the image as the base: all in all, and of that for the image's own test."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        # Level 3 is for trying a change; level 9 is for the image that goes to a cluster.
        options = ("--bootstrap", "localimage", "--from", image, "--variant", variant, "--level", "3")
        run(sys.executable, BUILD, *options, "--output", Path(folder) / "again.sif")
        total = time.perf_counter() - began
    began = time.perf_counter()
    run("apptainer", "--silent", "test", image)
    return {"all": total, "its own test": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--rebuild", action="store_true", help="also build it again, which takes a minute or two")
    asked = parser.parse_args()
    manifest = json.loads(run("apptainer", "--silent", "run", asked.image, "manifest"))
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    result = {
        "machine": f"{model[1] if model else 'unknown'}, {os.cpu_count()} cores",
        "image": f"{manifest['variant']}, {manifest['revision'][:10]}",
        "size_MB": asked.image.stat().st_size / 1e6,
        "packages": len(manifest["python"]) + len(manifest["debian"]),
        "start_seconds": start_up(asked.image),
        "largest_MB": dict(contents(asked.image)),
    }
    if asked.rebuild:
        result["rebuild_seconds"] = rebuild_seconds(asked.image.resolve(), manifest["variant"])
    print(f"{result['image']}: {result['size_MB']:.0f} MB, {result['packages']} packages")
    for name, both in result["start_seconds"].items():
        print(f"{name:<28}{both['image']:8.3f} s in the image{both['bare']:8.3f} s without")
    for name, seconds in result.get("rebuild_seconds", {}).items():
        print(f"rebuild, {name:<19}{seconds:8.1f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
