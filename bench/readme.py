"""`python -m bench readme`: the README's figures, made anew of every file under `bench/results`.

What stands between the two marker lines is replaced, and nothing else; nobody writes there by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import options, records, summaries
from bench.outputs import RESULTS
from bench.records import Document

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- figures: begin. Made by `python -m bench readme` from bench/results; do not edit. -->"
END = "<!-- figures: end -->"
FACTS = ("gpu", "cpu", "threads", "instructions", "GEMM", "torch", "triton", "transformers", "peft",
         "torchtune", "torchao", "loralib", "liger-kernel", "unsloth", "axolotl")  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Rewrite the section; 1 with `--check` if it is not what the files give."""
    arguments = options.Parser("readme", __doc__)
    arguments.add_argument("--check", action="store_true", help="change nothing; 1 if something would change")
    arguments.add_argument("--file", type=options.old_file, default=README, help="default README.md")
    parsed = arguments.parse_args(argv)
    before = parsed.file.read_text()
    try:
        after = replaced(before, section(RESULTS))
    except ValueError as error:
        arguments.error(str(error))
    if parsed.check:
        if before != after:
            print(
                f"{parsed.file.name}: its figures are not those of bench/results: run python -m bench readme"
            )
        return int(before != after)
    parsed.file.write_text(after)
    print(f"{parsed.file.name}: {'unchanged' if before == after else 'figures rewritten'}")
    return 0


def replaced(text: str, figures: str) -> str:
    """`text` with `figures` between its markers.

    Raises:
        ValueError: not exactly one of each marker, in order.
    """
    head, found, rest = text.partition(BEGIN)
    _, ends, tail = rest.partition(END)
    if not (found and ends) or BEGIN in rest or END in tail:
        raise ValueError(f"expected one line {BEGIN!r} and after it one line {END!r}")
    return f"{head}{BEGIN}\n\n{figures}\n\n{END}{tail}"


def section(folder: Path) -> str:
    """The figures of every file, machine by machine; what was counted and not timed comes last."""
    parts = []
    for machine in sorted(
        (path for path in folder.iterdir() if path.is_dir()),
        key=lambda path: (path.name == "counted", path.name),
    ):
        documents = [(path, records.read(path)) for path in sorted(machine.glob("*.json"))]
        tables = [(path, document, summaries.table(document)) for path, document in documents]
        tables = [entry for entry in tables if entry[2]]
        if tables:
            parts.append(heading(machine.name, [document for _, document, _ in tables]))
        for path, document, table in tables:
            name = path.relative_to(folder.parent.parent)
            title = f"**{summaries.title(document)}**: `{document['command']}` ({_run(document)}`{name}`)"
            parts.append(f"{title}\n\n{table}")
    return "\n\n".join(parts)


def heading(name: str, documents: Sequence[Document]) -> str:
    """The machine and the versions that its files share."""
    if name == "counted":
        return "### Counted, the same on every machine"
    shared = [
        f"{key} {value}" if key not in ("cpu", "gpu", "threads", "instructions", "GEMM") else value
        for key in FACTS
        if (value := documents[0]["machine"].get(key))
        and (key == "GEMM" or all(d["machine"].get(key) == value for d in documents))
    ]
    return f"### {'; '.join(shared)}"


def _run(document: Document) -> str:
    """What differs from run to run on one machine."""
    facts = document["machine"]
    commit, load = facts.get("fastpeft commit"), facts.get("load at start")
    return "".join([f"commit {commit}, " if commit else "", f"load {load}, " if load else ""])
