"""Each suite's results as one short Markdown table: what the README shows of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from bench import records
from bench.measure import Spread
from bench.records import Document, Result
from bench.tables import markdown_table

MIB = 2**20
METHODS = {"lora": "LoRA", "dora": "DoRA"}


def table(document: Document) -> str:
    """The table; empty for a suite that has none, such as `profile`."""
    made = TABLES.get(records.suite_of(document))
    return made[1](document) if made else ""


def title(document: Document) -> str:
    """What the table shows."""
    suite = records.suite_of(document)
    first: Result = next((r for r in document["results"] if not r.get("blocked")), {})
    text = TABLES[suite][0] if suite in TABLES else suite
    values = [{str(r[key]) for r in document["results"] if r.get(key)} for key in ("model", "dtype")]
    shared = [found.pop() for found in values if len(found) == 1]
    shared += [f"tiles of {first['target']}"] if suite == "traffic" else []
    tokens = f"{first['batch']}x{first['sequence']} tokens" if "batch" in first else ""
    return ", ".join(word for word in (text, *shared, tokens) if word)


def absent(document: Document) -> str:
    """A line on the contenders that have no figures, with their reasons."""
    reasons = {records.contender_of(r): str(r["blocked"]) for r in document["results"] if r.get("blocked")}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def with_absent(document: Document, text: str) -> str:
    """The table, and below it who is missing."""
    missing = absent(document)
    return f"{text}\n\nNot measured: {missing}." if missing else text


def layers(document: Document) -> str:
    """Geometric mean, least and cost of each contender in each block and dtype."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for case, results in records.by_case(document).items():
        named = dict(case)
        for name, result in results.items():
            speed = records.speed_up(result, results)
            cost = records.time_ratio(result, results.get(records.FLOOR))
            if speed is not None and cost is not None:
                block = str(named.get("block", "linear"))
                groups.setdefault((name, block, str(named["dtype"])), []).append((speed.median, cost.median))
    rows = [
        [name, block, dtype, _bold(f"{_mean(speed for speed, _ in pairs):.2f}x", name),
         f"{min(speed for speed, _ in pairs):.2f}x of {len(pairs)}", f"{max(cost for _, cost in pairs):.2f}"]
        for (name, block, dtype), pairs in groups.items()
    ]  # fmt: skip
    columns = ("", "block", "dtype", "speed of PEFT's, geometric mean", "least of its cases",
               "time of the frozen block's, most")  # fmt: skip
    return with_absent(document, markdown_table(columns, rows))


def step(document: Document) -> str:
    """Ratios and bytes of each contender at each rank."""
    rows = []
    for case, results in records.by_case(document).items():
        for name, result in results.items():
            if result.get("blocked"):
                continue
            method = records.method_of(name)
            speed = records.speed_up(result, results) if method else None
            rows.append([
                _ranked(name, case),
                f"{1e3 * Spread.of(records.headline(result)).median:.0f}",
                _bold(_times(speed), name),
                _ratio(records.time_ratio(result, results.get("frozen"))),
                _ratio(records.time_ratio(result, results.get("full"))),
                _mib(result, "saved_bytes"), _mib(result, "peak_bytes"),
            ])  # fmt: skip
    columns = ("", "step, ms", "speed of PEFT's", "time of the frozen step's", "of full fine-tuning's",
               "kept for backward, MiB", "peak, MiB")  # fmt: skip
    return with_absent(document, markdown_table(columns, rows))


def sparse(document: Document) -> str:
    """Time against full fine-tuning and PEFT's LoRA, and bytes."""
    rows: list[list[str]] = []
    pefts: list[str] = []
    for results in records.by_case(document).values():
        pefts = [name for name in results if name.startswith("peft-")]
        for name, result in results.items():
            if not result.get("blocked"):
                rows.append([
                    name,
                    _ratio(records.time_ratio(result, results.get("full"))),
                    *(_times(records.time_ratio(results[peer], result)) for peer in pefts),
                    _mib(result, "moments_bytes"), _mib(result, "saved_bytes"), _mib(result, "peak_bytes"),
                ])  # fmt: skip
    columns = ["", "time of full fine-tuning's",
               *(f"speed of PEFT's LoRA {p.split()[1]}" for p in pefts),
               "moments, MiB", "kept for backward, MiB", "peak, MiB"]  # fmt: skip
    return with_absent(document, markdown_table(columns, rows))


def against_peer(document: Document) -> str:
    """Milliseconds, and the speed of each contender's peer."""
    rows = []
    for results in records.by_case(document).values():
        for name, result in results.items():
            if seconds := records.headline(result):
                spread = Spread.of(seconds)
                ratio = records.speed_up(result, results)
                rows.append([
                    name, f"{1e3 * spread.median:.1f} ±{1e3 * spread.half_range:.1f}",
                    _times(ratio), records.peer_of(result) if ratio else "",
                ])  # fmt: skip
    return with_absent(document, markdown_table(("", "ms", "speed of", "the other's"), rows))


def memory(document: Document) -> str:
    """Bytes kept for backward by contender and dropout."""
    rows: list[list[str]] = []
    last = ""
    for case, results in records.by_case(document).items():
        named = dict(case)
        for name, result in results.items():
            if not result.get("blocked"):
                peer = results.get(records.peer_of(result))
                share = f"{result['saved_bytes'] / peer['saved_bytes']:.1%}" if peer else ""
                dropout = f", dropout {named['dropout']:g}" if named.get("dropout") else ""
                shown = str(named["case"])
                rows.append(["" if shown == last else shown, f"{name}{dropout}",
                             _bold(_mib(result, "saved_bytes"), name), share])  # fmt: skip
                last = shown
    columns = ("case", "", "kept for backward, MiB", "of PEFT's")
    return with_absent(document, markdown_table(columns, rows))


def traffic(document: Document) -> str:
    """Compulsory MiB and launches of each pass; of a linear, beside those peers whose formula is known."""
    rows: list[list[str]] = []
    last = ""
    for result in document["results"]:
        shown = f"{result.get('block', 'linear')} {_sizes(result)}, r={result['rank']}"
        shown += ", bias" if result.get("bias") else ""
        launches = result["launches"]
        rows.append([
            "" if shown == last else shown,
            f"{METHODS.get(result['method'], result['method'])} {result['pass']}",
            f"**{result['compulsory'] / MIB:.0f}**",
            str(len(launches)),
            ", ".join(f"{name} {mebibytes:.0f}" for name, mebibytes in _peers_mebibytes(result)),
        ])  # fmt: skip
        last = shown
    columns = (
        "tokens x in x out",
        "pass",
        "MiB",
        "launches",
        "others by formula, MiB without terms of the rank",
    )
    return markdown_table(columns, rows)


def _sizes(result: Result) -> str:
    if "shape" in result:
        return str(result["shape"])
    return f"{result['tokens']}x{result['features']}x{'/'.join(map(str, result['widths']))}"


def _peers_mebibytes(result: Result) -> Iterator[tuple[str, float]]:
    """Formulas are of one linear."""
    from bench.blocks import Shape
    from bench.peers import PEERS, PUBLISHED, PUBLISHED_AT

    if "shape" not in result:
        return
    shape = Shape.parse(result["shape"])
    key = result["method"], result["pass"]
    for peer in PEERS.get(key, ()):
        yield peer.name, peer.bytes(shape.M, shape.N, shape.K) / MIB
    if (shape.M, shape.N, shape.K, result["rank"]) == PUBLISHED_AT:
        for name, mebibytes, _ in PUBLISHED.get(key, ()):
            yield name, float(mebibytes)


def plan(document: Document) -> str:
    """Planned peaks beside counted and resident ones, or beside the papers' figures."""
    results = document["results"]
    if results and "tracked" in results[0]:
        rows = [
            [f"{r['model']}, {r['method']}", f"{r['planned'] / MIB:.0f}",
             *(f"{r[key] / MIB:.0f} ({r[f'{key}_error']:+.1%})" for key in ("tracked", "resident"))]
            for r in results
        ]  # fmt: skip
        columns = (
            "",
            "planned peak, MiB",
            "every storage of the real step",
            "resident, as the kernel counts",
        )
        return markdown_table(columns, rows)
    rows = []
    last = ("", "")
    for r in results:
        shown = str(r["table"]), str(r["assumptions"])
        recalled = " (recalled)" if r.get("paper_recalled") else ""
        rows.append([
            "" if shown[0] == last[0] else shown[0],
            f"{r['model']}, {r['method']}", f"{r['peak'] / 1e9:.2f}", f"{r['paper_gb']:g}{recalled}",
            "" if shown == last else shown[1],
        ])  # fmt: skip
        last = shown
    return markdown_table(("paper's table", "", "planned peak, GB", "paper, GB", "assumed"), rows)


def codegen(document: Document) -> str:
    """The most registers and shared memory on each target, and every spill."""
    targets: dict[str, list[Result]] = {}
    for result in document["results"]:
        targets.setdefault(str(result["target"]), []).append(result)
    rows = [
        [target, str(len(found)), str(max(r["registers"] for r in found)),
         str(max(r["shared"] for r in found)), str(sum(r["spill_stores"] + r["spill_loads"] for r in found))]
        for target, found in targets.items()
    ]  # fmt: skip
    columns = ("target", "launches compiled", "registers, most", "bytes shared, most", "bytes spilled")
    return markdown_table(columns, rows)


TABLES: dict[str, tuple[str, Callable[[Document], str]]] = {
    "layers": ("Blocks of a transformer, forward and backward", layers),
    "step": ("Whole training step", step),
    "sparse": ("A few layers at a time", sparse),
    "optimizer": ("The optimiser's step", against_peer),
    "patch": ("Time to put adapters on a model", against_peer),
    "self-check": ("One implementation against itself", against_peer),
    "plan": ("The memory planner", plan),
    "memory": ("Bytes kept for backward, parameters left out", memory),
    "traffic": ("Bytes that the GPU kernels move", traffic),
    "codegen": ("Machine code of the GPU kernels", codegen),
}


def _ranked(name: str, case: records.Case) -> str:
    rank = dict(case).get("rank")
    return f"{name}, r={rank}" if rank else name


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.exp(sum(map(math.log, found)) / len(found))


def _bold(text: str, contender: str) -> str:
    return f"**{text}**" if text and contender.startswith("fastpeft") else text


def _times(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f}x"


def _ratio(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f}"


def _mib(result: Result, key: str) -> str:
    return f"{result[key] / MIB:.1f}" if result.get(key) is not None else ""
