"""What becomes of a suite's results: files, comparisons, pictures. One place for all suites.

A suite only writes its JSON document; the rest is made of that document, so a saved file gives the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import comparison, machine, options, plot, records, report, tables

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Where results go besides the screen."""

    json: Path | None
    csv: Path | None
    markdown: Path | None
    plot: Path | None
    compare: Path | None
    save: str | None
    """A label, empty for the suite's own; None to save nothing."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return any(value is not None for value in (self.json, self.csv, self.markdown, self.plot,
                                                   self.compare, self.save))  # fmt: skip

    def of(self, suite: str) -> Outputs:
        """For one suite of several: its name joins every file's."""

        def named(path: Path | None) -> Path | None:
            return path and path.with_name(f"{path.stem}-{suite}{path.suffix}")

        return Outputs(
            json=named(self.json), csv=named(self.csv), markdown=named(self.markdown), plot=named(self.plot),
            compare=self.compare, save=self.save,
        )  # fmt: skip


def split(prog: str, argv: Sequence[str]) -> tuple[Outputs, list[str]]:
    """Take the options of `options.add_outputs` out of a suite's words; exits with 2 where they are wrong."""
    parser = options.Parser(prog, None, add_help=False)  # --help is the suite's own
    options.add_outputs(parser)
    parsed, rest = parser.parse_known_args(list(argv))
    if parsed.compare is not None:
        try:
            records.read(parsed.compare)
        except ValueError as error:
            parser.error(f"argument --compare: {error}")
    values = {name: getattr(parsed, name) for name in Outputs.__slots__}
    return Outputs(**values), rest


def run(suite: str, main: Callable[[Sequence[str]], int], argv: Sequence[str], outputs: Outputs) -> int:
    """Run a suite's `main`, then do with its document what was asked for; its exit status."""
    if not outputs.wanted:
        return main(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        status = main([*argv, "--json", str(path)])
        if not path.exists():
            return status
        document = records.read(path)
    document["command"] = " ".join(["python -m bench", suite, *argv])
    out = report.console()
    for written in write(document, outputs):
        out.print(f"wrote {_shown(written)}", soft_wrap=True)
    if outputs.compare is not None:
        comparison.show(records.read(outputs.compare), document)
    return status


def write(document: records.Document, outputs: Outputs) -> list[Path]:
    """Write the files asked for; their paths."""
    written = []
    if outputs.json is not None:
        records.write(outputs.json, document)
        written.append(outputs.json)
    if outputs.csv is not None:
        outputs.csv.write_text(tables.csv_text(document))
        written.append(outputs.csv)
    if outputs.markdown is not None:
        outputs.markdown.write_text(tables.markdown_text(document))
        written.append(outputs.markdown)
    if outputs.save is not None:
        target = saved_path(document, outputs.save)
        target.parent.mkdir(parents=True, exist_ok=True)
        records.write(target, document)
        written.append(target)
    if outputs.plot is not None:
        written += plot.draw(document, outputs.plot)
    return written


def saved_path(document: records.Document, label: str = "") -> Path:
    """`bench/results/MACHINE/SUITE-LABEL.json`: the same run on the same machine replaces its file."""
    words = [records.suite_of(document)]
    if label:
        words.append(label)
    else:
        for key in ("model", "dtype"):
            values = {str(result[key]) for result in document["results"] if key in result}
            words += values if len(values) == 1 else ()
    return RESULTS / machine.name(document["machine"]) / f"{'-'.join(words)}.json"


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
