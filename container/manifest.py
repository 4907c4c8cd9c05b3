"""Write down what is inside the image: `manifest.json`, `sbom.cdx.json` and `licences.txt`. Runs while it is built.

The fingerprint in the manifest is that of its contents: packages with their versions, nanochat's source, the lock, the
variant and the commit. It does not depend on the day, the machine, the tools or the base an image was built with, so
two images with the same fingerprint train alike; their files need not be the same to the bit.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def sha256(data: bytes) -> str:
    """The digest as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def source_digest(package: Path) -> str:
    """The digest of a package's files, as `sha256sum` over the sorted output of `sha256sum` would say it."""
    files = sorted(path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return sha256("".join(f"{sha256(path.read_bytes())}  {path.relative_to(package)}\n" for path in files).encode())


def debian_packages() -> list[str]:
    """What dpkg has installed, as name=version."""
    query = ("dpkg-query", "--show", "--showformat", "${Package}=${Version}\n")
    return sorted(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())


def licence(metadata: Any) -> str:
    """A distribution's licence as it states it: an expression, else its classifiers, else the first line of a text."""
    if metadata.get("License-Expression"):
        return str(metadata["License-Expression"])
    classifiers = [name for name in metadata.get_all("Classifier") or () if name.startswith("License ::")]
    named = [name.rpartition(" :: ")[2] for name in classifiers if not name.endswith("OSI Approved")]
    text = (metadata.get("License") or "").strip()
    return "; ".join(named) or (text.splitlines()[0] if text else "not stated")


def component(kind: str, name: str, version: str, stated: str | None = None) -> dict[str, Any]:
    """One package in the words of CycloneDX."""
    url = f"pkg:{kind}/{name}@{version}"
    described = {"type": "library", "name": name, "version": version, "purl": url, "bom-ref": url}
    return described | ({"licenses": [{"license": {"name": stated}}]} if stated else {})


def main() -> None:
    """Write the three files beside this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("variant", "revision", "created"):
        parser.add_argument(f"--{name}", required=True)
    asked = parser.parse_args()

    package = importlib.util.find_spec("nanochat")
    assert package is not None
    assert package.origin is not None
    distributions = sorted(importlib.metadata.distributions(), key=lambda found: found.name.lower())
    contents: dict[str, Any] = {
        "variant": asked.variant,
        "revision": asked.revision,
        "source": source_digest(Path(package.origin).parent),
        "lock": sha256((HERE / "requirements.lock").read_bytes()),
        "python": [f"{found.name}=={found.version}" for found in distributions],
        "debian": debian_packages(),
    }
    fingerprint = sha256(json.dumps(contents, sort_keys=True).encode())
    manifest = contents | {"fingerprint": fingerprint}
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    stated = {found.name: licence(found.metadata) for found in distributions}
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, fingerprint)}",
        "version": 1,
        "metadata": {
            "timestamp": asked.created,
            "component": {"type": "container", "name": "nanochat", "version": asked.revision},
        },
        "components": [
            *(component("pypi", found.name, found.version, stated[found.name]) for found in distributions),
            *(component("deb/debian", *entry.split("=", 1)) for entry in contents["debian"]),
        ],
    }
    (HERE / "sbom.cdx.json").write_text(json.dumps(bill, indent=1) + "\n", encoding="utf-8")

    lines = [f"{found.name} {found.version}: {stated[found.name]}" for found in distributions]
    lines.append("Debian's packages: /usr/share/doc/PACKAGE/copyright in the image")
    (HERE / "licences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
