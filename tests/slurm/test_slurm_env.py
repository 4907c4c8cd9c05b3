"""A site's settings, the environment of a job, and the line that starts nanochat."""

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slurm_scripts import SITES, SLURM, call, run, write_site

KNOWN = call("env.sh", "echo $KNOWN_SETTINGS").split()
READ = 'load_site "$FILE"; complete_site; '
START = READ + "set_environment; "


def setting_names(path: Path) -> set[str]:
    return set(re.findall(r"^SITE_(\w+)=", path.read_text(), re.MULTILINE))


def test_the_example_explains_every_setting() -> None:
    assert setting_names(SLURM / "sites/example.env") == set(KNOWN)


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.name)
def test_a_site_file_sets_what_is_known_and_can_be_read(path: Path) -> None:
    assert setting_names(path) <= set(KNOWN)
    said = call("env.sh", READ + 'echo "$SITE_PARTITION $SITE_SCRATCH $NANOCHAT_BASE_DIR"', env={"FILE": str(path)})
    partition, scratch, workspace = said.split()
    assert partition
    assert scratch.endswith("/me")
    assert workspace == f"{scratch}/nanochat"


def test_ptolemys_nodes_are_known_by_their_names() -> None:
    for host, expected in (("ptolemy-devel-1", "ptolemy.env"), ("laptop", "")):
        assert Path(call("env.sh", f"HOSTNAME={host}; site_file ''").strip()).name == expected


def test_only_what_a_site_file_sets_comes_back(tmp_path: Path) -> None:
    site = write_site(tmp_path, SITE_MAIL="$USER@example.org", NCCL_IB_HCA="mlx5")
    with site.open("a") as file:
        file.write("# SITE_ACCOUNT=ignored\n")
    said = call("env.sh", READ + 'echo "$SITE_MAIL|$SITE_ACCOUNT|$SITE_EXPORTS"', env={"FILE": str(site)})
    assert said == "me@example.org||NCCL_IB_HCA \n"


def test_the_callers_own_choices_win_over_the_sites(tmp_path: Path) -> None:
    site = write_site(tmp_path, SITE_IMAGE="/site.sif")
    show = READ + 'echo "$NANOCHAT_BASE_DIR $NANOCHAT_IMAGE$NANOCHAT_VENV"'
    own = {"NANOCHAT_BASE_DIR": "/mine", "NANOCHAT_VENV": "/venv"}
    assert call("env.sh", show, env={"FILE": str(site), **own}) == "/mine /venv\n"
    assert call("env.sh", show, env={"FILE": str(site)}) == f"{tmp_path}/scratch/nanochat /site.sif\n"


def test_nothing_of_the_logins_python_reaches_the_trainer(tmp_path: Path) -> None:
    hostile = {"PYTHONPATH": "/evil", "PYTHONHOME": "/evil", "LD_PRELOAD": "", "BASH_ENV": "", "SLURM_EXPORT_ENV": "A"}
    said = call("env.sh", START + "env", env={"FILE": str(write_site(tmp_path)), **hostile})
    names = {line.partition("=")[0] for line in said.splitlines()}
    assert not names & set(hostile)
    assert "PYTHONNOUSERSITE=1" in said.splitlines()


def test_everything_is_written_to_scratch(tmp_path: Path) -> None:
    said = call("env.sh", START + "env", env={"FILE": str(write_site(tmp_path)), "SLURM_JOB_ID": "7"})
    variables = dict(line.partition("=")[::2] for line in said.splitlines())
    for name in ("NANOCHAT_BASE_DIR", "HF_HOME", "WANDB_DIR", "TMPDIR"):
        assert variables[name].startswith(f"{tmp_path}/scratch/nanochat"), name
    assert variables["TMPDIR"].endswith("/7")
    assert variables["WANDB_MODE"] == "offline"


def test_a_site_sets_variables_and_the_network_for_the_trainer(tmp_path: Path) -> None:
    site = write_site(tmp_path, SITE_NETWORK="ib0", NCCL_IB_HCA="mlx5")
    said = call("env.sh", START + "env", env={"FILE": str(site)}).splitlines()
    assert {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "NCCL_IB_HCA=mlx5"} <= set(said)


def test_keys_come_from_a_file_unless_the_environment_has_them(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.env"
    # The last line has no end.
    secrets.write_text("# mine\nWANDB_API_KEY=from-file\nLD_PRELOAD=/evil.so\nPATH=/evil\nHF_TOKEN=a=b $HOME")
    site = write_site(tmp_path, SITE_SECRETS=secrets)
    show = START + 'echo "$WANDB_API_KEY|$HF_TOKEN|${LD_PRELOAD:-}|$PATH|$SECRETS_READ"'
    said = call("env.sh", show, env={"FILE": str(site), "PATH": "/usr/bin:/bin"})
    assert said == "from-file|a=b $HOME||/usr/bin:/bin| WANDB_API_KEY HF_TOKEN\n"
    said = call("env.sh", show, env={"FILE": str(site), "PATH": "/usr/bin:/bin", "WANDB_API_KEY": "from-login"})
    assert said.startswith("from-login|")


def started_with(folder: Path, gpus: int, cwd: Path, **site: str | Path) -> list[str]:
    file = write_site(folder, **site)
    (folder / "scratch/nanochat/cache/tmp").mkdir(parents=True, exist_ok=True)
    code = f'{START} cd "$CWD"; build_command {gpus}; printf "%q " "${{NANOCHAT[@]}}"'
    return shlex.split(call("env.sh", code, env={"FILE": str(file), "HOME": str(folder / "home"), "CWD": str(cwd)}))


def test_the_container_sees_scratch_once_and_the_folder_one_submits_in(tmp_path: Path) -> None:
    work, data = tmp_path / "work", tmp_path / "my data"
    work.mkdir()
    data.mkdir()
    words = started_with(tmp_path, 0, work, SITE_IMAGE="/a.sif", SITE_BINDS="/usr/share:/data")
    binds = [words[n + 1] for n, word in enumerate(words) if word == "--bind"]
    assert binds == [f"{tmp_path}/scratch", str(work), "/usr/share:/data"]
    assert words[-4:] == ["--pwd", str(work), "/a.sif", "nanochat"]
    assert "--nv" not in words
    assert "--containall" not in words
    assert "--cleanenv" not in words


def test_gpus_are_shown_to_the_container_where_some_were_asked_for(tmp_path: Path) -> None:
    assert "--nv" in started_with(tmp_path, 2, tmp_path, SITE_IMAGE="/a.sif")


def test_without_an_image_an_environment_runs_by_the_same_line(tmp_path: Path) -> None:
    assert started_with(tmp_path, 2, tmp_path, SITE_VENV="/venv") == ["/venv/bin/nanochat"]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("1-0", 86400), ("2-12:30", 217800), ("1-00:00:08", 86408),
        ("08:09:09", 29349),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(written: str, seconds: int) -> None:
    assert call("env.sh", f"seconds_of {written}") == f"{seconds}\n"


@pytest.mark.parametrize("written", ["90m", "abc", "", "1:2:3:4", "-5", "1-", "infinite", "UNLIMITED", "1h"])
def test_what_is_no_time_limit_is_refused(written: str) -> None:
    assert call("env.sh", f"seconds_of {shlex.quote(written)} || echo no") == "no\n"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_any_time_limit_is_its_sum(days: int, hours: int, minutes: int, seconds: int) -> None:
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert call("env.sh", f"seconds_of {days}-{hours:02}:{minutes:02}:{seconds:02}") == f"{expected}\n"


def test_a_command_on_the_login_node_runs_in_the_sites_environment(tmp_path: Path) -> None:
    venv = tmp_path / "venv/bin"
    venv.mkdir(parents=True)
    (venv / "nanochat").write_text('#!/bin/bash\necho "$NANOCHAT_BASE_DIR $WANDB_MODE" "$@"\n')
    (venv / "nanochat").chmod(0o755)
    site = write_site(tmp_path, SITE_VENV=venv.parent)
    done = run(SLURM / "nanochat", "status", "a b", cwd=tmp_path, env={"NANOCHAT_SITE": str(site)})
    assert done.stdout == f"{tmp_path}/scratch/nanochat offline status a b\n", done.stderr
    done = run(SLURM / "nanochat", "status", cwd=tmp_path)
    assert done.returncode == 2
    assert "NANOCHAT_SITE=NAME" in done.stderr
