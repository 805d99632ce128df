"""`python -m bench [suite] [options]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from bench import options, outputs

SUITES = {
    "layers": ("bench.layers", "a linear, q/k/v, an MLP: forward and backward beside PEFT and other peers"),
    "step": ("bench.step", "whole training steps: LoRA, DoRA, LISA, IST, BAdam, full; PEFT and other peers"),
    "sparse": ("bench.sparse", "layer-sparse training steps beside full fine-tuning and PEFT's LoRA"),
    "optimizer": ("bench.optimizer", "LayerSparseAdamW beside torch's AdamW; what a switch costs"),
    "memory": ("bench.memory", "bytes kept for backward, of one block and of a whole model"),
    "traffic": ("bench.traffic", "bytes and FLOPs of each Triton kernel, beside floor and peers"),
    "codegen": ("bench.codegen.main", "the Triton kernels compiled for each GPU family: registers, spills"),
    "plan": ("bench.plan_check", "the memory planner beside training that really happens"),
    "patch": ("bench.patch", "time to patch a 7B model, beside get_peft_model"),
    "profile": ("bench.profile_step", "where the time of a step goes"),
    "self-check": ("bench.self_check", "one implementation against itself: the benchmark's own error"),
}

SHORT: list[list[str]] = [
    ["self-check", "--rounds", "30"],
    ["layers", "--shapes", "256x1024x1024", "--ranks", "16", "--dtypes", "float32", "--rounds", "7"],
    ["step", "--sequence", "128", "--dtype", "float32", "--ranks", "16", "--rounds", "5", "--period", "3",
     "--contenders", "frozen", "full", "lisa", "peft-lora", "fastpeft-lora", "peft-dora", "fastpeft-dora"],
    ["memory", "--shape", "1024x1024x2048", "--layer-only", "--dropout", "0"],
    ["patch", "--rounds", "2"],
]  # fmt: skip
FULL: list[list[str]] = [
    ["self-check"],
    ["layers", "--peers", "all", "--modelled", "h100"],
    ["step", "--contenders", "all"],
    ["step", "--model", "smollm2-135m", "--ranks", "16", "--rounds", "5", "--contenders", "all"],
    ["sparse"],
    ["optimizer"],
    ["memory", "--blocks", "linear", "qkv", "mlp"],
    ["traffic"],
    ["codegen"],
    ["plan"],
    ["patch"],
    ["profile"],
]


def usage() -> str:
    """The text of `--help`."""
    width = max(map(len, SUITES))
    short = "\n".join(f"  python -m bench {' '.join(words)}" for words in SHORT)
    return "\n".join(
        [
            "usage: python -m bench [suite] [options]",
            "       python -m bench --full [options]",
            "       python -m bench readme",
            "",
            "Measures fastpeft beside PEFT and others on this machine. No speed is printed for a contender",
            "whose outputs and gradients are not those of PEFT to rounding.",
            "",
            "suites:",
            *(f"  {name:{width}}  {line}" for name, (_, line) in SUITES.items()),
            "",
            "for every suite, and for all of a selection:",
            "  --json, --csv, --markdown PATH   the results as a file",
            "  --plot PATH                      bars against peers and floor, as PNG and SVG",
            "  --compare OLD.json               each measure's ratio to an earlier file's",
            "  --save [LABEL]                   bench/results/MACHINE/SUITE-LABEL.json, for the README",
            "",
            "Options of a suite: python -m bench SUITE --help",
            "`readme` writes the README's figures anew from bench/results; `--full` runs everything.",
            "",
            "Without a suite, a short selection runs, in under five minutes on two cores:",
            short,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite, or a selection."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        suite, *rest = words
        if suite == "readme":
            from bench import readme

            return readme.main(rest)
        if suite not in SUITES:
            known = ", ".join([*SUITES, "readme"])
            print(f"python -m bench: unknown suite {suite!r}, expected one of: {known}", file=sys.stderr)
            return 2
        wanted, arguments = outputs.split(suite, rest)
        return run(suite, arguments, wanted)
    wanted, rest = outputs.split("", words)
    if "--help" in rest or "-h" in rest:
        print(usage())
        return 0
    selection = FULL if "--full" in rest else SHORT
    unknown = [word for word in rest if word != "--full"]
    if unknown:
        options.Parser("", None).error(f"unknown option {unknown[0]}; options of a suite follow its name")
    names = [suite for suite, *_ in selection]
    statuses = []
    for place, (suite, *options_of) in enumerate(selection):
        name = suite if names.count(suite) == 1 else f"{suite}-{names[:place].count(suite) + 1}"
        statuses.append(run(suite, options_of, wanted.of(name)))
    return max(statuses)


def run(suite: str, arguments: Sequence[str], wanted: outputs.Outputs) -> int:
    """Run `suite`, and do with its results what is wanted."""
    module = importlib.import_module(SUITES[suite][0])
    return outputs.run(suite, module.main, arguments, wanted)


if __name__ == "__main__":
    raise SystemExit(main())
