"""What several commands understand alike."""

import os

from nanochat.workspace import check_run_name


def run_name(given: str) -> str:
    """The name of a run: as given, or else as WANDB_RUN says, which Slurm users are used to set.

    Raises:
        UsageError: neither names a run.
    """
    return check_run_name(given or os.environ.get("WANDB_RUN", ""))
