"""A corpus: texts to train on, texts held out, and both cut into token windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import InputError

# With a file of the user's own, the last tenth is what the model never trains on.
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts by title; no title is in both groups.

    `prompt` is what the samples before and after training start from.
    """

    name: str
    train: dict[str, str]
    held_out: dict[str, str]
    prompt: str


def from_file(path: Path) -> Corpus:
    """Read a UTF-8 text file: the last tenth is held out, cut at a line's end where there is one.

    Raises InputError if the file cannot be read or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"--text {path}: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"--text {path}: the file holds no text")
    cut = round(len(text) * (1 - HELD_OUT_FRACTION))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    held_out = text[cut:]
    return Corpus(
        name=path.name,
        train={f"first 90% of {path.name}": text[:cut]},
        held_out={f"last 10% of {path.name}": held_out},
        prompt=" ".join((held_out.split() or text.split())[:8]),
    )


def windows(tokenizer: Any, texts: Iterable[str], length: int) -> torch.Tensor:
    """Tokenise the texts and cut each into consecutive windows: `(windows, length)`, int64.

    No window crosses from one text into the next; what is left at a text's end is dropped.
    """
    cut = []
    # verbose=False: a whole play is longer than the model's context, which is fine, it gets cut here.
    for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        count = len(ids) // length
        cut.append(torch.tensor(ids[: count * length], dtype=torch.long).view(count, length))
    return torch.cat(cut)


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Take at most `count` rows, evenly spread from the first to the last."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]
