"""Fashion-MNIST (arXiv 1708.07747), from Debian's package `dataset-fashion-mnist`: 28x28 grey, 10 classes.

apt downloads the package into the cache, and the four files are read out of it: nothing is installed.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

import downloads
from errors import InputError

PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_BYTES = 8  # the kind of numbers, in an IDX file's header: unsigned bytes


@dataclass(frozen=True)
class Images:
    """Pictures [count, 28, 28] and classes [count], both uint8."""

    pictures: torch.Tensor
    labels: torch.Tensor


def load(cache: Path, say: Callable[[str], None]) -> tuple[Images, Images]:
    """Return the 60,000 pictures to train on and the 10,000 held out, downloading them once.

    Raises InputError if they cannot be downloaded, or are not those expected.
    """
    folder = cache / "fashion-mnist"
    if not _is_whole(folder):
        say("downloading Fashion-MNIST (31 MB, once) ...")
        _download(folder)
    return tuple(  # type: ignore[return-value]  # two
        Images(
            read_idx((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()),
            read_idx((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()),
        )
        for part in ("train", "t10k")
    )


def read_idx(packed: bytes) -> torch.Tensor:
    """Return what a gzipped IDX file of unsigned bytes holds; InputError if it is none."""
    try:
        data = gzip.decompress(packed)
        kind, dims = data[2], data[3]
        shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
        if data[:2] != b"\0\0" or kind != _BYTES or len(data) != 4 + 4 * dims + math.prod(shape):
            raise ValueError(f"a header of {data[:4]!r} and {len(data)} bytes")
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise InputError(f"not a gzipped IDX file of bytes: {error}") from error
    return torch.frombuffer(bytearray(data[4 + 4 * dims :]), dtype=torch.uint8).view(shape)


def unpack(archive: bytes, folder: Path) -> None:
    """Write the four files of a package's tar archive into a folder; names inside play no other part."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            file = tar.extractfile(member) if member.isfile() and name in SHA256 else None
            if file is not None:
                (folder / name).write_bytes(file.read())


def _is_whole(folder: Path) -> bool:
    return all(downloads.is_expected(folder / name, sha256) for name, sha256 in SHA256.items())


def _download(folder: Path) -> None:
    otherwise = f"put {', '.join(SHA256)} into {folder}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as name:
        temporary = Path(name)
        package = downloads.debian_package(PACKAGE, temporary, otherwise)
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=False)
        if done.returncode != 0:
            raise InputError(f"{package.name}: dpkg-deb cannot read it; {otherwise}")
        unpack(done.stdout, temporary)
        if not _is_whole(temporary):
            raise InputError(f"{package.name}: its files are not those expected; {otherwise}")
        for file in SHA256:
            os.replace(temporary / file, folder / file)
