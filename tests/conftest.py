"""What several rooms' tests need: a workspace with real text, tokenizer and tokens, small enough for seconds."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat.corpus.shards import write_corpus
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.tokenizer.train import train_tokenizer
from nanochat.workspace import Workspace
from texts import small_texts

# A developer's key, a site's workspace or the rank of the job that runs the tests is not what a test means.
FOREIGN = ("AZURE_", "HF_", "NANOCHAT_", "SLURM_", "WANDB_")
FOREIGN += ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TIKTOKEN_", "DATA_GYM_", "TORCH_ALLOW_TF32_")
FOREIGN += ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "COLUMNS")
for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    if not name.startswith(("NANOCHAT_TEST_", "NANOCHAT_IMAGE")):
        del os.environ[name]
# Where tests compare runs to the bit, the number of threads must not depend on the machine. Nobody's W&B is filled,
# and measuring the machine for it would take seconds at the end of each run.
os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_X_DISABLE_STATS": "true"}
# A shell has what it starts in its background ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCAB_SIZE = 320


@pytest.fixture(scope="session")
def _prepared_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = Workspace(tmp_path_factory.mktemp("prepared"))
    texts = small_texts()
    write_corpus(workspace.base_data, texts, rows_per_shard=128, source={"name": "test"}, validation_rows=40)
    train_tokenizer(texts, vocab_size=VOCAB_SIZE, max_chars=10**6).save(workspace.tokenizer)
    tokenize_corpus(workspace.base_data, workspace.tokenizer, workspace.tokens, workers=1)
    return workspace.root


@pytest.fixture
def prepared_workspace(_prepared_workspace: Path, tmp_path: Path) -> Workspace:
    """A workspace of one's own that is ready for training."""
    return Workspace(Path(shutil.copytree(_prepared_workspace, tmp_path / "workspace")))


@pytest.fixture
def run_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the `nanochat` command as a user would, in a process of its own; the workspace defaults to a fresh one."""

    def run(*arguments: str, workspace: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nanochat", *arguments],
            env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace or tmp_path / "workspace"), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    return run
