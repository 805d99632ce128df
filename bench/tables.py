"""A document as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from bench import records
from bench.records import Document

CSV_COLUMNS = ("case", "contender", "measure", "unit", "median", "low quartile", "high quartile", "rounds")


def csv_text(document: Document) -> str:
    """A line for each measure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for measure in records.measures(document):
        spread = measure.spread
        writer.writerow([
            records.case_text(measure.case), measure.contender, measure.name, measure.unit,
            f"{spread.median:.9g}", f"{spread.low:.9g}", f"{spread.high:.9g}", len(measure.values),
        ])  # fmt: skip
    return stream.getvalue()


def markdown_text(document: Document) -> str:
    """The command, the machine, and a table for each case."""
    facts = "; ".join(f"{key}: {value}" for key, value in document["machine"].items())
    parts = [f"`{document['command']}`", facts]
    for case, results in records.by_case(document).items():
        found = list(records.measures({"results": list(results.values())}))
        names = list(dict.fromkeys(measure.name for measure in found))
        cells = {(measure.contender, measure.name): measure.text() for measure in found}
        rows = []
        for contender, result in results.items():
            if result.get("blocked"):
                rows.append([contender, f"not measured: {result['blocked']}", *[""] * len(names)])
                continue
            faster = records.speed_up(result, results)
            rows.append([
                contender, *(cells.get((contender, name), "-") for name in names),
                "-" if faster is None else f"{faster.median:.2f}x ±{faster.half_range:.2f}",
            ])  # fmt: skip
        columns = ["contender", *(name.replace("_", " ") for name in names), "speed of its peer's"]
        title = records.case_text(case)
        parts.append((f"**{title}**\n\n" if title else "") + markdown_table(columns, rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without columns in which every cell is empty."""
    rows = [list(row) for row in rows]
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
