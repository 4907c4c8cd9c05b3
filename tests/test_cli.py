"""The command as a person meets it: help at once; for every mistake one line, the fix, and the right exit code."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from nanochat.commands import COMMANDS
from nanochat.workspace import Workspace

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("flag", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(run_command: Run, flag: tuple[str, ...]) -> None:
    result = run_command(*flag)
    assert result.returncode == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from nanochat.cli import help_text; help_text(); "
        "print([name for name in ('torch', 'numpy', 'pyarrow', 'wandb', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "command",
    [
        "tokenizer train --vocab-size 300",
        "tokenizer eval",
        "data tokenize --workers 1",
        "data conversations sft --tasks arithmetic:20 --sequence-len 64",
    ],
)
def test_data_are_prepared_without_torch(
    command: str, prepared_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import takes two seconds, and a minute from a busy file system."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(prepared_workspace.root))
    code = "import sys\nfrom nanochat.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_experiments_are_prepared_without_torch() -> None:
    code = "import sys, nanochat.experiment.prepare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_itself(run_command: Run, command: str) -> None:
    result = run_command(*command.split(), "--help")
    assert result.returncode == 0
    assert (COMMANDS[command].__doc__ or "").splitlines()[0] in " ".join(result.stdout.replace("│", " ").split())


def test_every_flag_of_training_has_help(run_command: Run) -> None:
    text = run_command("train", "base", "--help").stdout
    for words in (
        "--depth INT",
        "Layers. The one dial",
        "--target-flops",
        "Horizon: training FLOPs",
        "(default: 250)",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("trian", "base"), 2, "did you mean: nanochat train base"),
        (("frobnicate",), 2, "see: nanochat --help"),
        (("train", "base", "--run", "dummy"), 2, "run name 'dummy' names nothing"),
        (("train", "base"), 2, "choose one, for example --run my_first_run"),
        (("train", "base", "--run", "x/y"), 2, "not usable as a file name"),
        (("train", "base", "--run", "x", "--num-steps", "0"), 2, "would train nothing"),
        (("train", "base", "--run", "x", "--device", "cuda"), 2, "sees no GPU"),
        (("train", "base", "--run", "x"), 4, "nanochat tokenizer train"),
        (("data", "tokenize"), 4, "nanochat data"),
        (("tokenizer", "train"), 4, "nanochat data"),
        (("data", "local", "/does/not/exist"), 2, "/does/not/exist"),
    ],
)
def test_a_mistake_gets_one_line_and_its_exit_code(
    run_command: Run, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run_command(*arguments, CUDA_VISIBLE_DEVICES="", WANDB_RUN="")
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_mistyped_flag_is_refused_with_what_was_meant(run_command: Run) -> None:
    result = run_command("train", "base", "--run", "x", "--detph", "4")
    assert result.returncode == 2
    assert "--depth" in result.stdout + result.stderr


def test_the_traceback_is_shown_on_request_only(run_command: Run) -> None:
    assert "Traceback" not in run_command("data", "tokenize").stderr
    assert "Traceback" in run_command("data", "tokenize", "--debug").stderr


def test_the_run_name_may_come_from_the_environment_as_slurm_users_set_it(run_command: Run) -> None:
    assert "tokenizer train" in run_command("train", "base", WANDB_RUN="my_run").stderr
    assert "names nothing" in run_command("train", "base", WANDB_RUN="dummy").stderr


def test_an_empty_base_dir_is_refused(run_command: Run) -> None:
    result = run_command("data", "tokenize", NANOCHAT_BASE_DIR="")
    assert (result.returncode, "NANOCHAT_BASE_DIR is set but empty" in result.stderr) == (2, True)


def test_output_into_a_closed_pipe_is_told_by_the_code_alone() -> None:
    # 0 would tell a batch script that a training whose output broke off is done.
    command = f"{sys.executable} -m nanochat --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (141, b"")


def test_version_is_printed(run_command: Run) -> None:
    assert run_command("--version").stdout.startswith("nanochat ")
