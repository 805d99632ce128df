"""What a results file holds, and how every reader of one takes it apart.

A document is `{"command", "machine", "results"}`; a result is one contender in one case. What names the case
is under the keys of `CASE`; what was measured is `seconds` (by phase, one entry a round), every key that
ends in `_bytes`, and the keys of `COUNTS`. `peer` names the contender it is compared with, if it is not
PEFT's of the same method; `blocked` says why it was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Spread, pairwise_ratio

Document = dict[str, Any]
Result = dict[str, Any]
Case = tuple[tuple[str, Any], ...]

CASE = (
    "table", "target", "kernel", "model", "block", "batch", "sequence", "shape", "tokens", "features",
    "widths", "dtype", "rank", "dropout", "bias", "method", "pass", "layers", "blocks", "period", "case",
    "label",
)  # fmt: skip
COUNTS = ("registers", "spill_stores", "spill_loads", "shared")
BYTES = ("issued", "compulsory", "planned", "tracked", "resident")  # of suites whose keys carry no unit
CODEGEN = ("target", "kernel", "label", *COUNTS, "tensor_core", "loop", "error")
HEADLINE = ("step", "both", "patch")
FLOOR = "frozen"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One measured quantity of one contender in one case."""

    case: Case
    contender: str
    name: str
    """A phase, or the key of a count."""
    unit: str
    """`s`, `bytes` or `count`."""
    values: tuple[float, ...]
    """One entry a round; one alone for what is counted."""

    @property
    def spread(self) -> Spread:
        """Median and quartiles."""
        return Spread.of(self.values)

    def text(self) -> str:
        """With its unit, for people."""
        spread = self.spread
        if self.unit == "s":
            digits = 1 if spread.median < 0.1 else 0
            return f"{1e3 * spread.median:.{digits}f} ±{1e3 * spread.half_range:.{digits}f} ms"
        return f"{spread.median / 2**20:.2f} MiB" if self.unit == "bytes" else f"{spread.median:g}"


def read(path: Path) -> Document:
    """A document from a file.

    Raises:
        ValueError: it is no results file.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a results file of the benchmarks: {error}") from None
    if isinstance(document, list):  # what `codegen` writes
        rows = [
            {key: row[key] for key in CODEGEN if key in row} | {"kernel": _kernel(row["kernel"])}
            for row in document
        ]
        document = {"command": "python -m bench codegen", "machine": {}, "results": rows}
    if not isinstance(document, dict) or not isinstance(document.get("results"), list):
        raise ValueError(f"{path}: not a results file of the benchmarks: no list of results")
    return document


def _kernel(value: Any) -> Any:
    """A kernel by its name alone."""
    return str(value["function"]).removesuffix("_kernel") if isinstance(value, dict) else value


def write(path: Path, document: Document) -> None:
    """A document into a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(document, indent=2, default=str) + "\n")
    temporary.replace(path)


def suite_of(document: Document) -> str:
    """The suite that made it."""
    words = str(document.get("command", "")).split()
    return words[3] if len(words) > 3 else "unknown"


def case_of(result: Result) -> Case:
    """What names the case."""
    found = ((key, result[key]) for key in CASE if result.get(key) is not None)
    return tuple(
        (key, "/".join(map(str, value)) if isinstance(value, list) else value) for key, value in found
    )


def contender_of(result: Result) -> str:
    """Whose result it is; what is counted of our own kernels names nobody."""
    return str(result.get("contender", "fastpeft"))


def case_text(case: Case) -> str:
    """For people: values that speak for themselves stand alone."""
    alone = ("model", "block", "shape", "dtype", "case", "target", "kernel", "method", "pass", "label")
    words = []
    for key, value in case:
        if key == "rank":
            words.append(f"r={value}")
        elif not (key == "dropout" and value in (0, "0", "-")):
            words.append(str(value) if key in alone else f"{key} {value}")
    return ", ".join(words)


def measures(document: Document) -> Iterator[Measure]:
    """Everything measured, in the file's order."""
    for result in document["results"]:
        case, contender = case_of(result), contender_of(result)
        for name, unit, values in _values(result):
            yield Measure(case=case, contender=contender, name=name, unit=unit, values=values)


def _values(result: Result) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """Name, unit and values of each measure of a result."""
    for phase, seconds in (result.get("seconds") or {}).items():
        yield phase, "s", tuple(seconds)
    for key, value in result.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if key.endswith("_bytes") or key in BYTES:
                yield key, "bytes", (float(value),)
            elif key in COUNTS:
                yield key, "count", (float(value),)


def method_of(contender: str) -> str:
    """`lora` or `dora`, or nothing for a contender without adapters."""
    last = contender.split()[0].rpartition("-")[2]
    return last if last in ("lora", "dora") else ""


def by_case(document: Document) -> dict[Case, dict[str, Result]]:
    """Results by case, then by contender."""
    cases: dict[Case, dict[str, Result]] = {}
    for result in document["results"]:
        cases.setdefault(case_of(result), {})[contender_of(result)] = result
    return cases


def headline(result: Result) -> list[float]:
    """The seconds that stand for the whole, one entry a round; none where nothing was timed."""
    seconds = result.get("seconds") or {}
    return next((list(seconds[phase]) for phase in HEADLINE if phase in seconds), [])


def peer_of(result: Result) -> str:
    """The name of the contender that a result is compared with; nothing where there is none."""
    method = method_of(contender_of(result))
    name = str(result.get("peer") or (f"peft-{method}" if method else ""))
    return "" if name == contender_of(result) else name


def speed_up(result: Result, others: dict[str, Result]) -> Spread | None:
    """How many times as fast as its peer, round by round."""
    return time_ratio(others.get(peer_of(result)), result)


def time_ratio(result: Result | None, other: Result | None) -> Spread | None:
    """The time of one over that of the other, round by round, where both were timed."""
    if result is None or other is None:
        return None
    upper, lower = headline(result), headline(other)
    return pairwise_ratio(upper, lower) if upper and len(upper) == len(lower) else None
