"""Snippets of movie reviews and what 20 people thought of each, from the `vaderSentiment` package on PyPI.

The source archive (VADER: Hutto and Gilbert, ICWSM 2014) is downloaded into the cache and read in place; an
archive inside holds the ratings. A snippet is positive or negative by the sign of its mean rating; those
within 1/2 of zero, about which people do not agree, are left out.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import downloads
from errors import InputError

VERSION = "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = f"vaderSentiment-{VERSION}.tar.gz"
INNER = "hutto_ICWSM_2014.tar.gz"
FILE = "movieReviewSnippets_GroundTruth.txt"
LEAST = 0.5  # of |rating|, from -4 to 4

Snippets = list[tuple[str, int]]  # text, and 1 for positive, 0 for negative


def load(cache: Path, say: Callable[[str], None]) -> Snippets:
    """Return the snippets in the file's order, downloading the archive once.

    Raises InputError if it cannot be downloaded, or is not the archive expected.
    """
    archive = cache / ARCHIVE
    if not downloads.is_expected(archive, SHA256):
        say(f"downloading movie reviews ({ARCHIVE}, 2 MB, once) ...")
        otherwise = f"put {ARCHIVE} into {cache}"
        downloads.source_archive("vaderSentiment", VERSION, archive, SHA256, otherwise)
    return parse(member(member(archive.read_bytes(), INNER), FILE).decode("utf-8"))


def from_file(path: Path) -> Snippets:
    """Read a file of the user's own, of the same form; InputError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"--data {path}: {error.strerror}") from error
    return parse(text, str(path))


def member(archive: bytes, name: str) -> bytes:
    """Return a file of a gzipped tar archive, by its name without folders."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for entry in tar:
            file = tar.extractfile(entry) if PurePosixPath(entry.name).name == name else None
            if file is not None:
                return file.read()
    raise InputError(f"{ARCHIVE}: holds no {name}")


def parse(text: str, name: str = FILE) -> Snippets:
    """Return (text, label) of the lines `id TAB rating TAB text` whose rating is clear."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            _, rating, snippet = line.split("\t", 2)
            value = float(rating)
        except ValueError as error:
            raise InputError(f"{name}, line {number}: expected id, rating and text, got {line!r}") from error
        if abs(value) >= LEAST:
            found.append((snippet.strip(), int(value > 0)))
    return found
