"""What builds the image, as far as it can be tried without Apptainer: locks, mirrors, secrets, stable headers."""

import hashlib
import re
import shutil
import struct
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "container"
LOCKS = sorted(CONTAINER.glob("requirements-*.lock"))


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CONTAINER))
    import build

    return build


@pytest.fixture
def pip_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip with no configuration but PIP_*, and those as the test sets them; returns a folder of wheels."""
    for name in ("PIP_CERT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    return wheels


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_pins_every_dependency_with_hashes_and_names_no_host(lock: Path) -> None:
    text = lock.read_text()
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert all(re.match(r"[\w.-]+==\S+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+$", entry) for entry in entries)
    locked = {entry.partition("==")[0].replace("_", "-") for entry in entries}
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[<>=]", name)[0].replace("_", "-") for name in asked} <= locked
    assert "//" not in text


def test_each_variant_locks_its_own_torch() -> None:
    cpu, cuda = ((CONTAINER / f"requirements-{variant}.lock").read_text() for variant in ("cpu", "cuda"))
    assert "\ntorch==2.13.0+cpu " in cpu
    assert "nvidia" not in cpu
    assert "\ntorch==2.13.0 " in cuda
    assert "\nnvidia-nccl-cu13==" in cuda


@pytest.mark.parametrize(
    ("os_release", "command"),
    [
        ('ID=debian\nVERSION_ID="12"\n', "setup-apptainer.sh"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf"),
        ("ID=ubuntu\nID_LIKE=debian\n", "ppa:apptainer"),
        ("ID=arch\n", "install-unprivileged.sh"),
        ("", "install-unprivileged.sh"),
    ],
)
def test_a_machine_without_apptainer_is_told_the_commands_of_its_distribution(
    build: ModuleType, os_release: str, command: str
) -> None:
    assert command in "\n".join(build.how_to_install(os_release))


def test_without_apptainer_the_build_ends_with_two_commands() -> None:
    done = subprocess.run(
        [sys.executable, CONTAINER / "build.py"],
        env={"PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no command apptainer" in done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_the_build_is_handed_certificates_mirrors_and_wheels_but_no_path_it_cannot_see(
    build: ModuleType, pip_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "site.crt"
    certificate.write_text("certificate")
    monkeypatch.setenv("PIP_CERT", str(certificate))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///srv/index https://pypi.example/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{pip_of} https://wheels.example")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128/?a&b")
    context = tmp_path / "context"
    context.mkdir()
    binds = build.hand_over(context, "cpu")
    shown = subprocess.run(
        ["sh", "-c", f"set -a; . {context}/host.env; env"], env={}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "PIP_CERT=/mnt/ca.crt" in shown
    assert "PIP_EXTRA_INDEX_URL=https://pypi.example/simple" in shown
    assert "PIP_FIND_LINKS=/mnt/wheels0 https://wheels.example" in shown
    assert "https_proxy=http://proxy.example:3128/?a&b" in shown
    assert binds == ["--bind", f"{context}:/mnt:ro", "--bind", f"{pip_of}:/mnt/wheels0:ro"]
    assert (context / "ca.crt").read_text() == "certificate"


@pytest.mark.parametrize(("variant", "asks"), [("cpu", True), ("cu126", True), ("cuda", False)])
def test_only_a_torch_that_is_not_on_pypi_is_asked_of_pytorchs_index(
    build: ModuleType, pip_of: Path, tmp_path: Path, variant: str, asks: bool
) -> None:
    build.hand_over(tmp_path, variant)
    assert (build.TORCH_INDEXES in (tmp_path / "host.env").read_text()) == asks


def test_keys_of_the_environment_are_not_handed_over(
    build: ModuleType, pip_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "PIP_KEYRING_PROVIDER", "SECRET"):
        monkeypatch.setenv(name, "canary")
    build.hand_over(tmp_path, "cuda")
    assert "canary" not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def sif_file(path: Path, contents: list[bytes], clock: int, kind: int = 0x4004) -> Path:
    """An image file as Apptainer lays it out, written at a time `clock` by user 1000."""
    table, data, at = b"", b"", 128 + 585 * len(contents)
    for number, content in enumerate(contents):
        place = (kind, True, number + 1, 1, 0, at + len(data), len(content), len(content), clock, clock, 1000, 1000)
        table += struct.pack("<i?IIIqqqqqqq", *place).ljust(585, b"\0")
        data += content
    identity = hashlib.md5(str(clock).encode()).digest()
    head = b"#!run\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0" + b"02\0" + identity
    counts = struct.pack("<8q", clock, clock, 0, len(contents), 128, len(table), at, len(data))
    path.write_bytes(head + counts + table + data)
    return path


@given(
    contents=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4),
    clocks=st.tuples(*[st.integers(0, 2**40)] * 2),
)
def test_stable_headers_make_equal_contents_equal_files(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], clocks: tuple[int, int]
) -> None:
    stabilise = _stabilise()
    folder = tmp_path_factory.mktemp("images")
    images = [sif_file(folder / f"{number}.sif", contents, clock) for number, clock in enumerate(clocks)]
    found = [stabilise(image, 7) for image in images]
    assert images[0].read_bytes() == images[1].read_bytes()
    assert [entry.digest for entry in found[0]] == [hashlib.sha256(content).hexdigest() for content in contents]
    other = sif_file(folder / "other.sif", [*contents[:-1], contents[-1] + b"x"], clocks[0])
    stabilise(other, 7)
    assert other.read_bytes()[48:64] != images[0].read_bytes()[48:64]


def test_a_signed_image_keeps_its_headers(tmp_path: Path) -> None:
    image = sif_file(tmp_path / "signed.sif", [b"signature"], clock=5, kind=0x4005)
    before = image.read_bytes()
    with pytest.raises(ValueError, match="signed"):
        _stabilise()(image, 7)
    assert image.read_bytes() == before


def test_a_file_that_is_no_image_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 1000)
    with pytest.raises(ValueError, match="no image"):
        _stabilise()(tmp_path / "text", 7)


def _stabilise():  # type: ignore[no-untyped-def]
    import runpy

    return runpy.run_path(str(CONTAINER / "stable_headers.py"))["stabilise"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_shell_script_is_clean() -> None:
    subprocess.run(["shellcheck", CONTAINER / "setup-apptainer.sh"], check=True)
