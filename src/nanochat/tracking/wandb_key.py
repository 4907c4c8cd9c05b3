"""Where W&B's key comes from, whether it can be one, and whether W&B's host answers. A key is never shown.

No wandb here: login nodes ask before they import anything.
"""

import configparser
import netrc
import os
import re
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nanochat.errors import UsageError

DEFAULT_URL = "https://api.wandb.ai"
# One service under two names; wandb 0.31 goes to the second by default and takes the first one's key for it.
OTHER_HOSTS = ("api.forge.coreweave.com",)

SHORTEST_KEY = 40
SECONDS_TO_ANSWER = 3.0

# `export NAME=value`, quoted or not, is what a shell's `source .env` accepts too.
ENV_LINE = re.compile(r"\s*(?:export\s+)?WANDB_API_KEY=(?P<quote>['\"]?)(?P<key>.*?)(?P=quote)\s*")


@dataclass(frozen=True)
class Key:
    """A key as found.

    Attributes:
        value: the key; not in this object's `repr`, so that no log or traceback shows it.
        source: where it was found.
        warning: what is wrong with the place it was found in, with its fix; empty if nothing is.
    """

    value: str
    source: str
    warning: str = ""

    def __repr__(self) -> str:
        return f"Key(from {self.source})"


def base_url(environment: Mapping[str, str] = os.environ) -> str:
    """W&B's address: WANDB_BASE_URL, or what `wandb login --host` stored, or the public service."""
    stored = configparser.ConfigParser(interpolation=None)
    folder = Path(environment.get("WANDB_CONFIG_DIR") or f"{environment.get('HOME', '')}/.config/wandb")
    with suppress(configparser.Error, UnicodeDecodeError, OSError):
        stored.read(folder / "settings", encoding="utf-8")
    url = environment.get("WANDB_BASE_URL") or stored.get("default", "base_url", fallback="") or DEFAULT_URL
    return url.rstrip("/")


def find_key(environment: Mapping[str, str] = os.environ) -> Key | None:
    """The first key of: WANDB_API_KEY; `.env` here; `.env` in NANOCHAT_BASE_DIR; netrc, where `wandb login` puts it."""
    if key := environment.get("WANDB_API_KEY"):
        return Key(key, "WANDB_API_KEY")
    folders = [Path.cwd()]
    if workspace := environment.get("NANOCHAT_BASE_DIR"):
        folders.append(Path(workspace).expanduser())
    for folder in folders:
        if found := _key_in_file(folder / ".env"):
            return found
    return _key_in_netrc(environment)


def _key_in_file(path: Path) -> Key | None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    keys = [match["key"] for line in lines if (match := ENV_LINE.fullmatch(line)) and match["key"]]
    if not keys:
        return None
    warning = f"{path} can be read by others (mode {mode:04o}) — chmod 600 {path}" if mode & 0o077 else ""
    return Key(keys[-1], str(path), warning)


def _key_in_netrc(environment: Mapping[str, str]) -> Key | None:
    path = Path(environment.get("NETRC") or f"{environment.get('HOME', '')}/.netrc")
    host = urlsplit(base_url(environment)).netloc
    hosts = (host, *OTHER_HOSTS) if base_url(environment) == DEFAULT_URL else (host,)
    try:
        stored = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return None
    return next((Key(stored[name][2], str(path)) for name in hosts if name in stored and stored[name][2]), None)


def check_key(key: Key) -> Key:
    """Return a key that W&B could accept: its own rule, told before anything waits for its server.

    Raises:
        UsageError: it cannot be a key.
    """
    if key.value != key.value.strip():
        raise UsageError(f"the W&B key in {key.source} begins or ends with a blank", "copy it again, without blanks")
    # A self-hosted server's keys have a prefix and a dash; a JWT has three parts with points between.
    secret = key.value.partition("-")[2] or key.value
    if not re.fullmatch(r"[\w.-]+", secret, re.ASCII):
        raise UsageError(
            f"the W&B key in {key.source} has characters that no key has", "copy it again: letters and digits only"
        )
    if len(secret) < SHORTEST_KEY:
        raise UsageError(
            f"the W&B key in {key.source} has {len(secret)} characters, a key has {SHORTEST_KEY} or more",
            "copy the whole key from https://wandb.ai/authorize",
        )
    return key


def answers(url: str, seconds: float = SECONDS_TO_ANSWER) -> bool:
    """Whether a host says anything at all over HTTP, be it an error, within so many seconds.

    Packets may be dropped at each of name look-up, connection and answer, and only the last two have time-outs. So
    the asking is done by a thread, which is left behind when the time is over.
    """
    answered, over = threading.Event(), threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=seconds):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass
        finally:
            over.set()

    threading.Thread(target=ask, name="does W&B answer", daemon=True).start()
    over.wait(seconds)
    return answered.is_set()
