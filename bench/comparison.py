"""A document beside an earlier one: each measure's ratio, and whether it is more than noise."""

from __future__ import annotations

from bench import records, report
from bench.records import Document


def show(old: Document, new: Document) -> None:
    """Print new over old for every measure that both have."""
    earlier = {(m.case, m.contender, m.name): m for m in records.measures(old)}
    rows = []
    for measure in records.measures(new):
        before = earlier.get((measure.case, measure.contender, measure.name))
        if before is None or not before.spread.median:
            continue
        ratio = measure.spread.median / before.spread.median
        rows.append([
            records.case_text(measure.case), measure.contender, measure.name, before.text(), measure.text(),
            f"{ratio:.2f}", verdict(before, measure),
        ])  # fmt: skip
    columns = ("case", "contender", "measure", "before", "now", "now / before", "")
    note = "more, less: the middle halves of the two runs' rounds do not meet"
    report.print_table(f"beside {old.get('command', 'the earlier file')}", columns, rows, note)
    differing = [key for key, value in new["machine"].items() if old["machine"].get(key) != value]
    out = report.console()
    if differing:
        out.print("not the same then and now: " + ", ".join(
            f"{key} ({old['machine'].get(key, 'unknown')}; {new['machine'][key]})" for key in differing
        ), soft_wrap=True)  # fmt: skip
    if not rows:
        out.print("no case of the earlier file is in this one")


def verdict(before: records.Measure, now: records.Measure) -> str:
    """Whether the interquartile ranges of the two are apart."""
    if now.spread.low > before.spread.high:
        return "more"
    return "less" if now.spread.high < before.spread.low else ""
