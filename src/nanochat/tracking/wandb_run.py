"""Weights & Biases: the only module that calls it, and the one that keeps it from ever stopping a run.

W&B is a view of a run, not a part of it. So it goes online only where that is known to work, it never asks a question,
and after it has started, its first failure is reported in one line and it is left alone. The numbers are in
`metrics.jsonl` whatever happens here.
"""

import html
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from nanochat.errors import UsageError
from nanochat.files import fingerprint
from nanochat.identity import DISTRIBUTION, describe_commit, installed_version
from nanochat.tracking.console import record_lines, stop_recording_lines
from nanochat.tracking.wandb_key import answers, base_url, check_key, find_key

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
AskedMode = Literal["auto", "online", "offline", "disabled"]

PROJECT = "nanochat"
# Hundreds of short runs would bury the few long ones, so arms of experiments and sweeps have a project of their own.
EXPERIMENTS_PROJECT = "nanochat-experiments"

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


@dataclass(frozen=True)
class RunNames:
    """What one stage of one run is called in W&B. JSON-able, so that a restart finds the names it started with.

    Attributes:
        id: the same after every restart, so that W&B shows one run.
        name: shown in W&B: `v<version>-<run>-<stage>_<job or time>`.
        project: W&B's project.
        group: shown together in W&B.
        job_type: the stage.
        tags: to filter by.
    """

    id: str
    name: str
    project: str
    group: str
    job_type: str
    tags: tuple[str, ...] = ()


def run_id_for(run_name: str, stage: str) -> str:
    """The W&B id of one stage of one run."""
    run_id = f"{run_name}-{stage}"
    if len(run_id) <= LONGEST_RUN_ID:
        return run_id
    return f"{run_id[: LONGEST_RUN_ID - 17]}-{fingerprint(run_id)}"


def name_run(
    run_name: str,
    stage: str,
    *,
    project: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
) -> RunNames:
    """Name a stage of a run. What is given wins, then W&B's own variables, then what is usual here.

    Args:
        run_name: the run, of an experiment's arm with both in it.
        stage: the stage.
        project: default: WANDB_PROJECT, or `nanochat`.
        group: default: WANDB_RUN_GROUP, or the run, so that its stages are together.
        tags: beside those of WANDB_TAGS.
    """
    version = ".".join((installed_version(DISTRIBUTION) or "0.0").split(".")[:2])
    job = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
    named = [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
    return RunNames(
        id=run_id_for(run_name, stage),
        name=os.environ.get("WANDB_NAME") or f"v{version}-{run_name}-{stage}_{job}",
        project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
        group=group or os.environ.get("WANDB_RUN_GROUP") or run_name,
        job_type=stage,
        tags=tuple(dict.fromkeys((*tags, *named))),
    )


class WandbRun:
    """One stage's W&B run, or silence: after a failure, or where W&B is disabled, every method does nothing.

    Attributes:
        folder: the run's own folder; None where nothing is written.
    """

    def __init__(self, run: "wandb.Run | None") -> None:
        self._run = run
        self.folder = Path(run.settings.sync_dir).absolute() if run is not None else None
        # Online, a resumed run begins with steps that the server has, as the same run gives the same numbers. W&B
        # would drop them too, with a warning for each.
        self._first_step = run.starting_step if run is not None else 0

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
            if self._run is not None and step >= self._first_step:
                self._run.log({"step": step, **values}, step=step)

    def table(self, key: str, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Log a table, the keys of its first row as columns.

        As HTML: W&B's own tables are artifacts, which want files outside of the run's folder and a server that
        answers in the middle of a run.
        """
        if self._run is None or not rows:
            return
        cells = [[html.escape(str(cell)) for cell in line] for line in (rows[0], *(row.values() for row in rows))]
        lines = ["".join(f"<td style='white-space:pre-wrap'>{cell}</td>" for cell in line) for line in cells]
        content = "".join(f"<tr>{line}</tr>" for line in lines)
        with self._quiet_after_failure():
            import wandb

            self.log({key: wandb.Html(f"<table border=1>{content}</table>", inject=False)}, step)

    def note(self, line: str) -> None:
        """Add a line to the run's Logs that is, or will be, printed while W&B does not listen."""
        # W&B offers no public way; this is the function that its own capture of stdout calls.
        write = getattr(self._run, "_console_raw_callback", None)
        if write is not None:
            with self._quiet_after_failure():
                write("stdout", line + "\n")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's final figures."""
        with self._quiet_after_failure():
            if self._run is not None:
                self._run.summary.update(dict(values))

    def finish(self, exit_code: int = 0) -> None:
        """Write everything out and end the run with the stage's exit code. Later calls do nothing."""
        stop_recording_lines()
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


def start_wandb(names: RunNames, config: Mapping[str, Any], *, folder: Path, mode: AskedMode = "auto") -> WandbRun:
    """Start a stage's W&B run; call it on rank 0 only.

    It waits for the network for seconds, and for about a minute where a host answers but then does not let it in.
    What was printed since the last run, or since the command began, is put at the head of the run's Logs. W&B's own
    WANDB_DIR wins over `folder`, and so do those of `VARIABLE_DEFAULTS`.

    Args:
        names: what the run is called.
        config: the whole resolved configuration.
        folder: where W&B may write; its run folders appear under `folder/wandb`.
        mode: `auto` is what WANDB_MODE says, else online where there is a key and W&B answers, else offline.

    Raises:
        UsageError: WANDB_MODE is not a mode. Nothing else is raised: what fails later is reported on stderr
            and training goes on without W&B.
    """
    resolved = choose_mode(mode)
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
            run = WandbRun(_init(names, config, mode=attempt, folder=folder))
        except Exception as error:
            _release()
            if attempt == "online":
                _warn(f"W&B cannot go online ({_one_line(error)}); it records offline", "upload later: nanochat sync")
            else:
                _warn(f"W&B is off: it did not start ({_one_line(error)})", "metrics.jsonl has every step")
        else:
            for line in record_lines():
                run.note(line)
            return run
    return WandbRun(None)


def asked_mode(mode: AskedMode) -> Mode | None:
    """The mode that a flag, or else WANDB_MODE, asks for; None if neither does.

    Raises:
        UsageError: WANDB_MODE is not a mode.
    """
    named = os.environ.get("WANDB_MODE") or "" if mode == "auto" else mode
    if named and named not in MODE_NAMES:
        raise UsageError(f"WANDB_MODE={named!r} is not a W&B mode", "unset WANDB_MODE, or export WANDB_MODE=offline")
    return MODE_NAMES[named] if named else None


def choose_mode(mode: AskedMode) -> Mode:
    """The mode to start in: as asked for, then as WANDB_MODE says, then online only where that will work.

    Where it is online by any of them, the key and the host are looked at first, for a few seconds at most, and what
    is wrong with them is a warning, with offline instead.

    Raises:
        UsageError: WANDB_MODE is not a mode.
    """
    asked = asked_mode(mode)
    if asked in ("offline", "disabled"):
        return asked
    key = find_key()
    if key is None:
        if asked == "online":
            _warn(
                "W&B cannot go online (there is no key); it records offline",
                "wandb login, or put WANDB_API_KEY=… into .env (chmod 600 .env); upload later: nanochat sync",
            )
        return "offline"
    if key.warning:
        print(f"warning: {key.warning}", file=sys.stderr, flush=True)
    try:
        check_key(key)
    except UsageError as error:
        _warn(f"W&B cannot go online ({error.what}); it records offline", f"{error.fix}; upload later: nanochat sync")
        return "offline"
    if not answers(base_url()):
        # Nothing to say where nobody asked for online: most compute nodes have no internet.
        if asked == "online":
            _warn(f"W&B cannot go online ({base_url()} does not answer); it records offline", "later: nanochat sync")
        return "offline"
    if Path(key.source).name == ".env":
        # W&B does not look there; the other places it knows itself.
        os.environ["WANDB_API_KEY"] = key.value
    return "online"


def _prepare(folder: Path) -> None:
    """Make the folder W&B writes to, prove it writable, and set what W&B reads from the environment."""
    runs = folder / "wandb"
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=runs):
        pass
    commit = describe_commit().get("commit")
    defaults = {
        **VARIABLE_DEFAULTS,
        "WANDB_BASE_URL": base_url(),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_DATA_DIR": str(folder / "data"),
        # An image has no .git to look into, and the repository that a workspace may lie in is not ours.
        **({"WANDB_GIT_COMMIT": commit} if commit else {"WANDB_DISABLE_GIT": "true"}),
    }
    try:
        Path.home()
    except RuntimeError:
        # A container's arbitrary uid has no home, and W&B looks there for settings.
        defaults["WANDB_CONFIG_DIR"] = str(folder / "config")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _init(names: RunNames, config: Mapping[str, Any], *, mode: Mode, folder: Path) -> "wandb.Run":
    import wandb

    with _nobody_to_ask():
        run = wandb.init(
            mode=mode,
            dir=folder,
            name=names.name,
            id=names.id,
            project=names.project,
            group=names.group,
            job_type=names.job_type,
            tags=list(names.tags),
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
