"""The results of an evaluation on disk: one JSON file per checkpoint and kind of evaluation."""

from pathlib import Path
from typing import Any, Literal

from nanochat.checkpoint.trained_model import TrainedModel
from nanochat.files import write_json
from nanochat.workspace import Workspace

Evaluation = Literal["base", "chat"]


def results_path(workspace: Workspace, trained: TrainedModel, evaluation: Evaluation) -> Path:
    """Where the results of an evaluation of a checkpoint are."""
    return workspace.evaluations(trained.stage, trained.tag) / f"step_{trained.step:06d}_{evaluation}.json"


def write_results(workspace: Workspace, trained: TrainedModel, evaluation: Evaluation, results: dict[str, Any]) -> Path:
    """Write what an evaluation of a checkpoint found, in place of an earlier one of the same kind.

    The file holds no times: the same checkpoint, data and settings give the same file.
    """
    path = results_path(workspace, trained, evaluation)
    about = {"stage": trained.stage, "model_tag": trained.tag, "step": trained.step, "checkpoint": trained.fingerprint}
    write_json(path, {**about, "dtype": str(trained.model.compute_dtype).removeprefix("torch."), **results})
    return path
