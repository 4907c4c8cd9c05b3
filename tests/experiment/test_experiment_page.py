"""The how-to page works as it stands, at toy size: one arm from a hub, the other from Azure, three machines."""

import io
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from experiment_arms import SETTINGS, sentences

from azurite import azurite
from hub_server import hub_server
from nanochat.files import read_json

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "compare-two-datasets.md"
BLOCK = re.compile(r"^<!-- on (\S+) -->\n```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
HOSTS = ("cpu", "gpu-a", "gpu-b")
ROWS = 400

# Both hosts are folders here.
RSYNC = 'rsync() { mkdir -p "${@: -1}" && cp -r "${@: -2}"; }\n'


def scored_corpus() -> pa.Table:
    """Half of it is noise and has a low score; beside the text there is an embedding, as in the published corpus."""
    noise = [float(row % 2) for row in range(ROWS)]
    texts = [next(sentences(amount * 0.8, 1, seed=row)) for row, amount in enumerate(noise)]
    draw = random.Random(0)
    return pa.table(
        {
            "text": texts,
            "token_count": [len(text) // 4 for text in texts],
            "score": [1 - amount for amount in noise],
            "embedding": [[draw.random() for _ in range(64)] for _ in range(ROWS)],
        }
    )


def as_parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=100)
    return stream.getvalue()


def test_the_page_s_commands_compare_an_arm_of_azure_with_one_of_the_hub(tmp_path: Path) -> None:
    corpus = scored_corpus()
    hub = tmp_path / "hub"
    data = hub / "airtrain-ai" / "fineweb-edu-fortified" / "data"
    data.mkdir(parents=True)
    for part in range(2):
        half = corpus.slice(part * ROWS // 2, ROWS // 2)
        (data / f"train-{part:05d}-of-00002.parquet").write_bytes(as_parquet(half))
    best = corpus.filter(pa.compute.greater(corpus["score"], 0.5))

    text = PAGE.read_text(encoding="utf-8")
    declared = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    settings = re.search(r"^\[settings\]\n.*?\n\n", declared, re.MULTILINE | re.DOTALL)
    assert settings
    declared = declared.replace(settings[0], SETTINGS).replace("[42, 43, 44]", "[42]").replace("0.165", "0.5")
    places = {host: tmp_path / host for host in HOSTS}
    for place in places.values():
        place.mkdir()
    (places["cpu"] / "exp.toml").write_text(declared)

    with hub_server(hub) as server, azurite(tmp_path / "azurite") as store:
        store.upload("quratingfiltered", {"top/shard_00000.parquet": as_parquet(best)})
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {
            **os.environ,
            **store.environment(AZURE_STORAGE_KEY=store.key),
            "PATH": path,
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "WANDB_MODE": "disabled",
        }
        blocks = BLOCK.findall(text)
        assert [host for host, _ in blocks] == ["cpu", "cpu", "gpu-a", "gpu-b", "cpu"]
        for host, block in blocks:
            # Torchrun has tests of its own; the other seeds would show nothing new.
            script = re.sub(r"^torchrun .*? -m nanochat --", "nanochat", block, flags=re.MULTILINE)
            script = re.sub(r"^.*--seed 4[34]\n", "", script, flags=re.MULTILINE)
            for other, place in places.items():
                script = script.replace(f"{other}:/scratch/$USER/nanochat", str(place / "nanochat"))
                script = script.replace(f"{other}:", str(place))
            script = script.replace("/scratch/$USER/nanochat", str(places[host] / "nanochat"))
            environment["NANOCHAT_BASE_DIR"] = str(places[host] / "nanochat")
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", RSYNC + script],
                cwd=places[host],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 0, f"{script}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"

    folder = places["cpu"] / "nanochat" / "experiments" / "exp"
    report = read_json(folder / "report" / "report.json")
    assert {run["arm"] for run in report["runs"]} == {"random16", "top16"}
    assert len({run["tokens"] for run in report["runs"]}) == 1
    # The top arm has not seen the noise that a random half is full of.
    [own] = [by_arm["top16"]["mean"] for metric, by_arm in report["differences"].items() if metric == "bpb/top16"]
    assert own < 0
    assert "one seed cannot tell that from noise: no verdict" in report["verdicts"][0]
