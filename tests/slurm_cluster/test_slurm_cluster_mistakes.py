"""Every mistake that Slurm would answer late, in riddles or not at all is told at once, and nothing is queued."""

import shutil
from collections.abc import Callable

import pytest
from cluster_account import IMAGE, Account
from cluster_runs import SHORT, give_texts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

RIGHT = {"WANDB_RUN": "first"}


def refusal(account: Account, *options: str, code: int = 3, **env: str) -> str:
    """What is said to one who submits with a mistake; that is said on stderr alone, and there is no job."""
    flags = ("--data", str(give_texts(account)), *SHORT)
    given = options if "--gpus" in options else ("--gpus", "0", *options)
    done = account.try_to_submit("speedrun", *given, "--", *flags, **{**RIGHT, **env})
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    assert "\njob " not in done.stdout
    assert account.cluster.jobs() == []
    return done.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--partition", "nope"], ["no partition 'nope'", "cpu gpu", "--partition"]),
        (["--partition", "gpu", "--gpus", "9"], ["no node of partition gpu has 9 GPUs", "gpu:h100:8", "--gpus"]),
        (["--partition", "cpu", "--gpus", "1"], ["no node of partition cpu has 1 GPUs", "--partition"]),
        (["--nodes", "3"], ["3 nodes are asked for", "partition cpu has 2", "--nodes 2"]),
        (["--cpus", "65"], ["do not fit a node of 64", "--cpus 64"]),
        (["--time", "3-00:00:00"], ["more than the 2-00:00:00", "--time 2-00:00:00"]),
        (["--time", "1"], ["kept for the last checkpoint", "--time"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value[0], str) and value[0].startswith("--") else "",
)
def test_more_than_the_cluster_has(account: Account, options: list[str], expected: list[str]) -> None:
    said = refusal(account, *options)
    for part in expected:
        assert part in said


@pytest.mark.parametrize("time", ["90m", "abc", "1:2:3:4", ""])
def test_a_time_that_is_none(account: Account, time: str) -> None:
    assert "--time" in refusal(account, "--time", time, code=2)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("", "is empty"), ("  ", "is empty"), ("dummy", "skip midtraining"), ("../up", "file name"), ("a b", "file name")],
)
def test_a_run_name_that_names_nothing(account: Account, name: str, loss: str) -> None:
    assert loss in refusal(account, WANDB_RUN=name)


def test_no_run_name(account: Account) -> None:
    done = account.try_to_submit("speedrun", "--gpus", "0", "--", *SHORT)
    assert done.returncode == 3
    assert "WANDB_RUN is not set" in done.stderr
    assert "WANDB_RUN=my_first_run slurm/submit speedrun" in done.stderr
    assert account.cluster.jobs() == []


def mangle(account: Account, name: str, change: Callable[[bytes], bytes]) -> None:
    path = account.checkout / "slurm" / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name", ["train.sbatch", "env.sh", "job.sh", "task.sh", "sites/test.env"])
def test_windows_line_ends(account: Account, name: str) -> None:
    mangle(account, name, lambda content: content.replace(b"\n", b"\r\n"))
    said = refusal(account)
    assert f"{name} has Windows line ends" in said
    # What mends it, mends it.
    mend = next(line for line in said.splitlines() if name in line).split(" — ")[1]
    assert account.cluster.run("bash", "-c", mend, cwd=account.checkout).returncode == 0
    account.submit("speedrun", "--gpus", "0", "--", "--data", give_texts(account), *SHORT, **RIGHT)


@pytest.mark.parametrize("name", ["train.sbatch", "sites/test.env"])
def test_a_byte_order_mark(account: Account, name: str) -> None:
    mangle(account, name, lambda content: b"\xef\xbb\xbf" + content)
    assert f"{name} begins with a byte-order mark" in refusal(account)


def test_an_image_that_is_not_there(account: Account) -> None:
    account.write_site(SITE_IMAGE="/nonexistent/nanochat.sif", SITE_VENV="")
    said = refusal(account)
    assert "/nonexistent/nanochat.sif is not there" in said
    assert "container/build.py" in said


@pytest.mark.skipif(not IMAGE, reason="without an image there is no other")
def test_an_image_that_is_another(account: Account) -> None:
    account.write_site(SITE_IMAGE_SHA256="0" * 64)
    assert f"{IMAGE} has SHA-256" in refusal(account)


def test_an_environment_that_is_not_there(account: Account) -> None:
    account.write_site(SITE_IMAGE="", SITE_VENV="/nonexistent")
    assert "/nonexistent/bin/nanochat is not there" in refusal(account)


def test_a_scratch_folder_that_may_not_be_written_to(account: Account) -> None:
    shutil.chown(account.scratch, "root")
    account.scratch.chmod(0o755)
    (account.scratch / "nanochat").mkdir()
    account.write_site()
    said = refusal(account)
    assert "scratch" in said
    assert "SITE_SCRATCH" in said or "NANOCHAT_BASE_DIR" in said


def test_a_controller_that_does_not_answer(account: Account) -> None:
    account.cluster.stop_controller()
    try:
        done = account.try_to_submit("speedrun", "--gpus", "0", "--", *SHORT, **RIGHT)
    finally:
        account.cluster.start_controller()
        account.cluster.wait_for_nodes()
    assert done.returncode == 3
    assert "the controller does not answer" in done.stderr
    assert account.cluster.jobs() == []


def test_a_misspelt_option_or_setting(account: Account) -> None:
    assert "there is no option '--partiton'" in refusal(account, "--partiton", "cpu", code=2)
    account.write_site(SITE_PARTITON="cpu")
    assert "sets SITE_PARTITON, which nothing reads" in refusal(account)


def test_keys_that_others_can_read(account: Account) -> None:
    secrets = account.folder / "secrets.env"
    account.write(secrets, "WANDB_API_KEY=0\n")
    secrets.chmod(0o644)
    account.write_site(SITE_SECRETS=secrets)
    assert f"chmod 600 {secrets}" in refusal(account)


def test_flags_that_cannot_be_trained_with(account: Account) -> None:
    done = account.try_to_submit("speedrun", "--gpus", "0", "--", "--data", "/nonexistent", *SHORT, **RIGHT)
    assert done.returncode == 3
    assert "/nonexistent" in done.stdout + done.stderr
    assert account.cluster.jobs() == []


def test_all_mistakes_are_told_at_once(account: Account) -> None:
    account.write_site(SITE_IMAGE="/nonexistent.sif", SITE_VENV="")
    said = refusal(account, "--nodes", "3", "--time", "3-0", WANDB_RUN="dummy")
    for part in ("/nonexistent.sif", "3 nodes", "3-0 is more", "WANDB_RUN is dummy"):
        assert part in said


def test_the_folder_of_the_logs_is_made(account: Account) -> None:
    # Slurm does not make it: the job would end at once, without a word.
    job = account.submit("speedrun", "--gpus", "0", "--", "--data", give_texts(account), *SHORT, **RIGHT)
    account.wait_for_log(job, "attempt 1")


def test_a_dry_run_checks_everything_and_submits_nothing(account: Account) -> None:
    texts = give_texts(account)
    done = account.try_to_submit("speedrun", "--gpus", "0", "--dry-run", "--", "--data", texts, *SHORT, **RIGHT)
    assert done.returncode == 0, done.stderr
    assert "sbatch --parsable" in done.stdout
    assert account.cluster.jobs() == []
