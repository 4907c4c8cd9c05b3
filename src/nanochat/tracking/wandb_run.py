"""Weights & Biases: the only module that calls it, and the one that keeps it from ever stopping a run.

W&B is a view of a run, not a part of it. So it is offline unless asked otherwise, it never asks a question,
and after it has started, its first failure is reported in one line and it is left alone. The numbers are in
`metrics.jsonl` whatever happens here.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from nanochat.errors import UsageError
from nanochat.files import fingerprint

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

# W&B's own second names for its modes.
MODE_NAMES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}

# Set as variables, not as arguments, so that a user overrides each of them in the way W&B documents.
VARIABLE_DEFAULTS = {
    # Without this even an offline run looks up W&B's host name (seen with strace, wandb 0.31).
    "WANDB_ERROR_REPORTING": "false",
    # Rows reach the file this often; the default of 15 s lost every row of a job killed after 6 s.
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "5",
    # `wrap` keeps stdout and stderr in order and leaves file descriptors alone; `redirect` swaps them for a
    # terminal of size 0×0, in which progress bars vanish.
    "WANDB_CONSOLE": "wrap",
    "WANDB_SILENT": "true",
    # Seconds. An unreachable server otherwise holds the start for 109 s, and the end until it is back.
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "120",
}

# W&B allows 128 characters, but the id is also part of a file name with a prefix and a suffix.
LONGEST_RUN_ID = 96


def run_id_for(run_name: str, stage: str) -> str:
    """The W&B id of one stage of one run: the same after every restart, so that W&B shows one run."""
    run_id = f"{run_name}-{stage}"
    if len(run_id) <= LONGEST_RUN_ID:
        return run_id
    return f"{run_id[: LONGEST_RUN_ID - 17]}-{fingerprint(run_id)}"


class WandbRun:
    """One stage's W&B run, or silence: after a failure, or where W&B is disabled, every method does nothing.

    Attributes:
        folder: the run's own folder, which `wandb sync` takes; None where nothing is written.
    """

    def __init__(self, run: "wandb.Run | None") -> None:
        self._run = run
        self.folder = Path(run.settings.sync_dir).absolute() if run is not None else None

    @property
    def active(self) -> bool:
        """Whether W&B still records this run."""
        return self._run is not None

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log one step's values. Values of the same step may come in several calls.

        `step` is also logged as a metric and is every metric's x axis: W&B's internal `_step` is shifted when
        a resumed fragment overlaps an earlier one, and metrics would move with it.
        """
        with self._quiet_after_failure():
            if self._run is not None:
                self._run.log({"step": step, **values}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's final figures."""
        with self._quiet_after_failure():
            if self._run is not None:
                self._run.summary.update(dict(values))

    def finish(self, exit_code: int = 0) -> None:
        """Write everything out and end the run with the stage's exit code. Later calls do nothing."""
        with self._quiet_after_failure():
            if self._run is not None:
                import wandb

                self._run.finish(exit_code=exit_code)
                # finish() can return before the exit record is in the file; the end of its process cannot.
                wandb.teardown(exit_code=exit_code)
        self._run = None

    @contextmanager
    def _quiet_after_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            _release()
            _warn(f"W&B stopped recording ({_one_line(error)})", "metrics.jsonl goes on and has every step")


def start_wandb(
    *,
    run_name: str,
    stage: str,
    config: Mapping[str, Any],
    folder: Path,
    project: str = "nanochat",
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    group: str | None = None,
    run_id: str | None = None,
) -> WandbRun:
    """Start a stage's W&B run; call it on rank 0 only.

    It waits for the network only if `mode`, or WANDB_MODE under `auto`, asks for `online`, and then for about
    a minute at most before it records offline. Where a user has set W&B's own variables they win: WANDB_DIR
    over `folder`, WANDB_PROJECT over `project`, and those of `VARIABLE_DEFAULTS`.

    Args:
        run_name: the run; with `stage` it names the W&B run and is its id.
        stage: the stage, also W&B's job type.
        config: the whole resolved configuration.
        folder: where W&B may write; its run folders appear under `folder/wandb`.
        project: W&B's project.
        mode: `auto` is what WANDB_MODE says, else offline.
        group: shown together in W&B; by default the run, so that its stages are.
        run_id: an id to use instead of the one derived from the names.

    Raises:
        UsageError: WANDB_MODE is not a mode. Nothing else is raised: what fails later is reported on stderr
            and training goes on without W&B.
    """
    resolved = _resolve_mode(mode)
    if resolved == "disabled":
        return WandbRun(None)
    try:
        folder = Path(os.environ.get("WANDB_DIR") or folder).expanduser().absolute()
        _prepare(folder)
    except (OSError, RuntimeError) as error:
        # W&B itself would write to the node's /tmp without a word, and the log would be gone with the job.
        _warn(
            f"W&B is off: its folder cannot be written ({_one_line(error)})",
            "export WANDB_DIR=<a writable folder on a shared file system>",
        )
        return WandbRun(None)

    attempts: tuple[Mode, ...] = ("online", "offline") if resolved == "online" else ("offline",)
    for attempt in attempts:
        try:
            return WandbRun(
                _init(
                    mode=attempt,
                    folder=folder,
                    name=f"{run_name}-{stage}",
                    run_id=run_id or run_id_for(run_name, stage),
                    project=os.environ.get("WANDB_PROJECT") or project,
                    group=group or os.environ.get("WANDB_RUN_GROUP") or run_name,
                    stage=stage,
                    config=config,
                )
            )
        except Exception as error:
            _release()
            if attempt == "online":
                _warn(
                    f"W&B cannot go online ({_one_line(error)}); it records offline",
                    f"upload later: wandb sync {folder}/wandb/offline-run-*",
                )
            else:
                _warn(f"W&B is off: it did not start ({_one_line(error)})", "metrics.jsonl has every step")
    return WandbRun(None)


def _resolve_mode(mode: Literal["auto", "online", "offline", "disabled"]) -> Mode:
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE") or "offline"
    if asked not in MODE_NAMES:
        raise UsageError(f"WANDB_MODE={asked!r} is not a W&B mode", "unset WANDB_MODE, or export WANDB_MODE=offline")
    return MODE_NAMES[asked]


def _prepare(folder: Path) -> None:
    """Make the folder W&B writes to, prove it writable, and set what W&B reads from the environment."""
    runs = folder / "wandb"
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=runs):
        pass
    defaults = {**VARIABLE_DEFAULTS, "WANDB_CACHE_DIR": str(folder / "cache")}
    try:
        Path.home()
    except RuntimeError:
        # A container's arbitrary uid has no home, and W&B looks there for settings.
        defaults["WANDB_CONFIG_DIR"] = str(folder / "config")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _init(
    *,
    mode: Mode,
    folder: Path,
    name: str,
    run_id: str,
    project: str,
    group: str,
    stage: str,
    config: Mapping[str, Any],
) -> "wandb.Run":
    import wandb

    with _nobody_to_ask():
        run = wandb.init(
            mode=mode,
            dir=folder,
            name=name,
            id=run_id,
            project=project,
            group=group,
            job_type=stage,
            config=dict(config),
            resume="allow",
        )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Make stdin look like a batch job's, so that a missing key is an error at once and never a prompt."""
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        stdin, sys.stdin = sys.stdin, cast(Any, nothing)
        try:
            yield
        finally:
            sys.stdin = stdin


def _release() -> None:
    """End W&B's own process after a failure.

    It would otherwise hold the run's id against a second start, and complain once more as Python exits.
    """
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _warn(what: str, fix: str) -> None:
    print(f"warning: {what} — {fix}", file=sys.stderr, flush=True)
