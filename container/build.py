"""Build nanochat.sif from this checkout, test it, and make the file depend on nothing but its contents.

    python container/build.py --help

Needs Python, pip and Apptainer, and neither root nor a GPU. The image appears under its name only after its own test
has passed. What pip needs on this machine to reach its index (certificates, proxy, mirrors, folders of wheels) is read
from pip's configuration, handed to the build in a folder bound to /mnt, and left out of the image.
"""

import argparse
import ast
import hashlib
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from stable_headers import stabilise

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
VARIANTS = sorted(path.stem.removeprefix("requirements-") for path in HERE.glob("requirements-*.lock"))
# PyTorch's builds that are not on PyPI, one index for each.
TORCH_INDEXES = "https://download.pytorch.org/whl"
# The image's date where there is no commit to take it from: 2026-01-01.
DEFAULT_EPOCH = 1_767_225_600
# What is handed to the build under /mnt, of pip's options and of the environment.
PIP_OPTIONS = ("cert", "index-url", "extra-index-url", "find-links", "no-index", "proxy", "trusted-host", "timeout")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

# How Apptainer is installed, by the ID or ID_LIKE of /etc/os-release.
INSTALL = {
    "debian": ("sudo apt-get update", "sudo container/setup-apptainer.sh"),
    "ubuntu": ("sudo add-apt-repository --yes ppa:apptainer/ppa", "sudo apt-get install --yes apptainer"),
    "fedora": ("sudo dnf install --assumeyes epel-release || true", "sudo dnf install --assumeyes apptainer"),
}
UPSTREAM_SCRIPT = "https://raw.githubusercontent.com/apptainer/apptainer/main/tools/install-unprivileged.sh"
# Works without root, where the kernel lets users have namespaces.
INSTALL_ANYWHERE = (
    f"curl -sL {UPSTREAM_SCRIPT} | bash -s - ~/apptainer",
    'export PATH="$HOME/apptainer/bin:$PATH"',
)


def how_to_install(os_release: str) -> tuple[str, str]:
    """The two commands that install Apptainer on a distribution, from the text of its /etc/os-release."""
    named = dict(re.findall(r'^(ID|ID_LIKE)="?([^"\n]*)"?$', os_release, re.MULTILINE))
    for name in f"{named.get('ID', '')} {named.get('ID_LIKE', '')}".split():
        if name in INSTALL:
            return INSTALL[name]
    return INSTALL_ANYWHERE


def output(*command: str | Path) -> str:
    """What a command prints, or nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def debian_mirror(label: str) -> str | None:
    """The mirror that this machine's apt uses: of `Debian`, or of `Debian-Security`."""
    listed = output("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Label: {label}")
    return listed.splitlines()[0] if listed else None


def pip_settings() -> dict[str, str]:
    """Pip's options on this machine, by the name of the variable that sets each; variables win over files."""
    settings: dict[str, str] = {}
    lines = output(sys.executable, "-m", "pip", "config", "list").splitlines()
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in PIP_OPTIONS:
            settings[f"PIP_{option.replace('-', '_').upper()}"] = str(ast.literal_eval(value))
    return settings


def hand_over(context: Path, variant: str) -> list[str]:
    """Write into `context` what pip needs inside the build, and return the flags that bind it there."""
    settings = pip_settings() | {name: os.environ[name] for name in PROXIES if name in os.environ}
    if "PIP_CERT" in settings:
        shutil.copy(settings["PIP_CERT"], context / "ca.crt")
        settings["PIP_CERT"] = "/mnt/ca.crt"
    indexes = [url for url in settings.pop("PIP_EXTRA_INDEX_URL", "").split() if not url.startswith("file:")]
    links = settings.pop("PIP_FIND_LINKS", "").split()
    folders = [link for link in links if Path(link).is_dir()]
    if variant != "cuda" and not links:
        indexes.append(f"{TORCH_INDEXES}/{variant}")
    if indexes:
        settings["PIP_EXTRA_INDEX_URL"] = " ".join(indexes)
    binds = ["--bind", f"{context}:/mnt:ro"]
    for number, folder in enumerate(folders):
        (context / f"wheels{number}").mkdir()
        binds += ["--bind", f"{Path(folder).resolve()}:/mnt/wheels{number}:ro"]
    if links:
        inside = [f"/mnt/wheels{number}" for number in range(len(folders))]
        settings["PIP_FIND_LINKS"] = " ".join([*inside, *(link for link in links if link not in folders)])
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in sorted(settings.items())]
    (context / "host.env").write_text("".join(lines), encoding="utf-8")
    return binds


def build_wheel(folder: Path, epoch: int) -> None:
    """Build nanochat's wheel from the checkout, by the lock's setuptools, so that it is the same on any machine."""
    lock = (HERE / "requirements-cpu.lock").read_text(encoding="utf-8")
    pinned = re.findall(r"^setuptools==\S+", lock, re.MULTILINE)
    with tempfile.TemporaryDirectory() as work:
        constraint, source = Path(work) / "constraint.txt", Path(work) / "source"
        constraint.write_text("\n".join(pinned) + "\n", encoding="utf-8")
        # A copy: setuptools builds in place, and would take up what an earlier build left in `build`.
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(CHECKOUT / name, source / name)
        shutil.copytree(CHECKOUT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        environment = os.environ | {
            "SOURCE_DATE_EPOCH": str(epoch),
            "PIP_CONSTRAINT": str(constraint),
            "PIP_BUILD_CONSTRAINT": str(constraint),
        }
        command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
        subprocess.run(command, env=environment, check=True)


def builder() -> pwd.struct_passwd | None:
    """The user that the command written by setup-apptainer.sh runs Apptainer as for root."""
    try:
        return pwd.getpwnam(os.environ.get("APPTAINER_USER", "hpc")) if os.geteuid() == 0 else None
    except KeyError:
        return None


def give(folder: Path) -> None:
    """Give a folder and what is in it to the user that builds."""
    user = builder()
    if user is not None:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder of the user that builds; it needs a few gigabytes, where APPTAINER_TMPDIR or TMPDIR say."""
    with tempfile.TemporaryDirectory(prefix="nanochat-image-", dir=os.environ.get("APPTAINER_TMPDIR")) as name:
        give(Path(name))
        yield Path(name)


def commit() -> tuple[str, int]:
    """The checkout's commit, with `-dirty` if it was changed since, and its time."""
    revision, epoch = output("git", "rev-parse", "HEAD"), output("git", "log", "-1", "--format=%ct")
    if not revision or not epoch:
        return "unknown", DEFAULT_EPOCH
    changed = output("git", "status", "--porcelain", "src", "container", "pyproject.toml")
    return revision + ("-dirty" if changed else ""), int(epoch)


def build(asked: argparse.Namespace, image: Path) -> None:
    """Build one image, with stable headers."""
    revision, epoch = commit()
    with work_folder() as work:
        context, handed = work / "context", work / "handed"
        context.mkdir()
        handed.mkdir()
        for name in ("nanochat.def", "manifest.py", "selftest.py", f"requirements-{asked.variant}.lock"):
            shutil.copy(HERE / name, context / name)
        build_wheel(context / "wheel", epoch)
        binds = hand_over(handed, asked.variant)
        arguments = {
            "bootstrap": asked.bootstrap,
            "variant": asked.variant,
            "revision": revision,
            "created": datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "from": asked.base,
            "mirror": asked.mirror,
            "security_mirror": asked.security_mirror,
        }
        # --force: also what lets %labels fix the date. The test comes later, on the image as it will be.
        command = ["apptainer", "build", "--force", "--notest", *binds]
        command += ["--mksquashfs-args", f"-comp zstd -Xcompression-level {asked.level}"]
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"] if value else []
        give(work)
        subprocess.run(
            [*command, image, "nanochat.def"],
            cwd=context,
            env=os.environ | {"SOURCE_DATE_EPOCH": str(epoch)},
            check=True,
        )
    stabilise(image, epoch)


def digest(image: Path) -> str:
    """The digest of a file."""
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_inside(image: Path) -> set[str]:
    """A line with digest and path for every file of an image, and with its target for every link."""
    listing = (
        "cd / && find . -xdev -path ./proc -prune -o -path ./sys -prune -o -path ./dev -prune -o -path ./tmp -prune "
        "-o -type l -printf '%l -> %p\\n' -o -type f -readable -exec sha256sum {} +"
    )
    command = ("apptainer", "--silent", "exec", "--containall", "--no-home", image, "sh", "-c", listing)
    return set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())


def main() -> None:
    """Build, test, and put the image in its place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default="cuda", help="whose lock is installed (default: cuda)")
    parser.add_argument("--bootstrap", choices=("docker", "debootstrap", "localimage"), default="docker")
    parser.add_argument("--from", dest="base", help="public image, or with localimage an image file")
    parser.add_argument("--mirror", help="Debian mirror; default with debootstrap: the one this machine's apt uses")
    parser.add_argument("--security-mirror", help="of Debian's security updates; default as for --mirror")
    parser.add_argument("--level", type=int, default=9, help="of zstd; 3 builds quicker and is 8%% larger (default: 9)")
    parser.add_argument("--output", type=Path, default=Path("nanochat.sif"), help="default: nanochat.sif")
    parser.add_argument("--setup", action="store_true", help="install Apptainer first (root on Debian)")
    parser.add_argument("--reproduce", action="store_true", help="build twice and compare")
    asked = parser.parse_args()

    if asked.setup:
        subprocess.run([HERE / "setup-apptainer.sh"], check=True)
    if not shutil.which("apptainer"):
        os_release = Path("/etc/os-release")
        first, second = how_to_install(os_release.read_text(encoding="utf-8") if os_release.is_file() else "")
        sys.exit(f"build: there is no command apptainer — install it:\n  {first}\n  {second}")
    if asked.bootstrap == "debootstrap":
        asked.mirror = asked.mirror or debian_mirror("Debian")
        asked.security_mirror = asked.security_mirror or debian_mirror("Debian-Security")
        if not asked.mirror:
            sys.exit("build: this machine's apt names no Debian mirror — add --mirror with the address of one")
    if asked.bootstrap == "localimage":
        if not asked.base or not Path(asked.base).exists():
            sys.exit(f"build: --bootstrap localimage needs an image file, not {asked.base} — add --from FILE.sif")
        asked.base = str(Path(asked.base).resolve())

    with work_folder() as work:
        image, again = work / "nanochat.sif", work / "again.sif"
        build(asked, image)
        subprocess.run(["apptainer", "test", image], check=True)
        if asked.reproduce:
            build(asked, again)
            if digest(image) != digest(again):
                differing = sorted(files_inside(image) ^ files_inside(again)) or ["only what is not a file's content"]
                sys.exit("\n".join(["build: two builds differ:", *differing]))
            print(f"two builds, one file: sha256 {digest(image)}")
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place first: the image appears whole or not at all, whatever file systems are involved.
        beside = asked.output.with_name(f"{asked.output.name}.{os.getpid()}.tmp")
        shutil.copyfile(image, beside)
        beside.chmod(0o755)
        beside.replace(asked.output)
    print(f"{asked.output}: {asked.output.stat().st_size / 1e6:.0f} MB, sha256 {digest(asked.output)}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"build: {shlex.join(map(str, error.cmd))} ended with {error.returncode}; see its messages above")
