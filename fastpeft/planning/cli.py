"""``python -m fastpeft plan MODEL``: will it fit?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fastpeft.errors import FastPeftError, PatchError
from fastpeft.planning import methods, optimizers
from fastpeft.planning.building import meta_model
from fastpeft.planning.devices import DEVICES
from fastpeft.planning.names import NAMES
from fastpeft.planning.plan import DTYPES, QUANTITIES, MemoryPlan, Quantity, plan
from fastpeft.planning.printing import show

EXAMPLES = """
examples:
  python -m fastpeft plan FOLDER --methods full lora:16 dora:16 lisa:2
  python -m fastpeft plan FOLDER --methods lora-fa:16 vera:256 bitfit series:256 prefix:20
  python -m fastpeft plan config.json --methods lora --batch 4 --sequence 2048 --layers-table
  python -m fastpeft plan FOLDER --methods lora --fit 24GiB sequence
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    arguments = argparse.ArgumentParser(
        prog="python -m fastpeft plan",
        description="What a training step will hold in memory, without allocating the model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("model", metavar="MODEL", help="a folder with config.json, or that file")
    add("--methods", nargs="+", default=["full", "lora", "dora", "lisa"], metavar="METHOD",
        help=f"of {', '.join(NAMES)}, with a number as in lora:64, lisa:2 (default: full lora dora "
             "lisa)")  # fmt: skip
    add("--batch", type=int, default=1, help="sequences a step (default 1)")
    add("--sequence", type=int, default=1024, help="tokens a sequence (default 1024)")
    add("--dtype", choices=DTYPES, help="of the weights (default: the configuration's)")
    add("--optimizer", default="adamw", help=f"of {', '.join(optimizers.OPTIMIZERS)} (default adamw)")
    add("--checkpointing", action="store_true", help="activation checkpointing")
    add("--device", choices=DEVICES, default="cuda", help="what is planned for (default cuda)")
    add("--attention", metavar="NAME", help="attn_implementation (default sdpa)")
    add("--fit", nargs=2, metavar=("SIZE", "WHAT"),
        help=f"the largest WHAT ({', '.join(QUANTITIES)}) that fits in SIZE, e.g. 24GiB batch")  # fmt: skip
    add("--layers-table", action="store_true", help="also every layer's part")
    add("--exact-depth", action="store_true", help="run every block, also where many are alike")
    add("--json", metavar="FILE", help="also write the plans to a file (- for standard output, alone)")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the command: 0, or 2 with one line where it cannot."""
    arguments = parser().parse_args(argv)
    size, largest = arguments.fit or (None, "batch")
    quantity = cast(Quantity, largest)  # plan() checks it
    try:
        wanted = [methods.parse(name) for name in arguments.methods]
        optimizers.checked(arguments.optimizer)
        model = meta_model(arguments.model, DTYPES.get(arguments.dtype), arguments.attention)
        plans: list[MemoryPlan] = []
        unfit: list[PatchError] = []
        for method in wanted:
            try:
                plans.append(
                    plan(
                        model,
                        method,
                        arguments.batch,
                        arguments.sequence,
                        checkpointing=arguments.checkpointing,
                        optimizer=arguments.optimizer,
                        device=arguments.device,
                        fits_in=size,
                        largest=quantity,
                        exact_depth=arguments.exact_depth,
                    )
                )
            except PatchError as error:  # a model without biases, say, beside methods that it can have
                unfit.append(error)
        if not plans:
            raise unfit[0]
        if arguments.json != "-":
            show(plans, per_layer=arguments.layers_table)
            for one in plans if size is not None else ():
                value = largest_value(one, largest)
                print(f"{one.setting.method}: the largest {largest} that fits in {size} is {value}")
        for reason in unfit:
            print(f"not planned: {' '.join(str(reason).split())}", file=sys.stderr)
        if arguments.json is not None:
            document = json.dumps([as_json(one) for one in plans], indent=2) + "\n"
            sys.stdout.write(document) if arguments.json == "-" else Path(arguments.json).write_text(document)
    except (FastPeftError, OSError) as error:
        print(f"python -m fastpeft plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def largest_value(found: MemoryPlan, largest: str) -> int:
    """Return the number that was made as large as fits."""
    return int(getattr(found.setting, largest))


def as_json(found: MemoryPlan) -> dict[str, object]:
    """Return a plan as plain values."""
    values = dataclasses.asdict(found)
    values["setting"]["dtype"] = str(found.setting.dtype).removeprefix("torch.")
    return values
