"""Compile every shipped kernel configuration, without a GPU, and read what the machine code says.

    python -m bench codegen [--target sm_90] [--kernel grad_a] [--quick] [--json PATH]

Fails on any spill, on more shared (or tensor) memory than a block may use, on a compiler error, on a row of
the configuration tables that no case reaches, and on a GEMM without tensor-core instructions. fp32 kernels
are exempt from the last: they keep fp32's products (`input_precision="ieee"`), which NVIDIA's tensor cores
lack.

What is compiled is what would run: the package's own launchers are called on meta tensors for each case
below, with the target's table selected and the kernels replaced by recorders, and each recorded launch is
specialised as Triton's JIT does (strides equal to 1, integers and pointers divisible by 16, pointers within
2 GiB on AMD). Cases, after removal of equal launches:

- bf16 under fp32 adapters (PEFT's default) with bias, with and without dropout, forward and backward: ranks
  8 to 128 at 8192 tokens, which reach every rank tile, and rank 128 at 1024, 512 and 64 tokens, which reach
  every GEMM row at its widest rank tile;
- the same with fp32 throughout, and with sizes that are not multiples of 16;
- one departure at a time: fp16, 16-bit adapters without bias, a transposed weight (Conv1D);
- with `--quick`, only rank 16 without and rank 64 with dropout, at 8192 tokens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A GPU to compile for: Triton's target triple and the shared memory one block may use."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, warp_size=32, shared_limit=163 * KIB),
    "sm_86": Target(backend="cuda", arch=86, warp_size=32, shared_limit=99 * KIB),
    "sm_90": Target(backend="cuda", arch=90, warp_size=32, shared_limit=227 * KIB),
    "sm_100": Target(backend="cuda", arch=100, warp_size=32, shared_limit=227 * KIB),
    "gfx942": Target(backend="hip", arch="gfx942", warp_size=64, shared_limit=64 * KIB),
}
TENSOR_MEMORY_COLUMNS = 512  # sm_100's tensor memory, per streaming multiprocessor
UNITS = 132  # multiprocessors the launchers are told of; only decides how reductions are split

KERNELS = {
    "down_projection": "down_projection_kernel",
    "rank_r_gemm": "rank_r_gemm_kernel",
    "grad_s_b": "grad_s_b_kernel",
    "grad_a": "grad_a_kernel",
    "reduce": "reduce_kernel",
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA|v_mfma)")
SASS_LOCAL = re.compile(r"\b(STL|LDL)(?:\.[A-Z]+)*?(?:\.(64|128|U8|S8|U16|S16))?\s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One linear layer to run forward and backward."""

    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    m: int = 8192
    n: int = 4096
    k: int = 4096
    r: int = 16
    dropout_p: float = 0.0
    bias: bool = True
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One specialised launch: everything `triton.compile` needs, and nothing that cannot be pickled."""

    target: str
    module: str
    kernel: str
    note: str
    tensor_cores: bool
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    def identity(self) -> tuple[object, ...]:
        return self.target, self.kernel, self.signature, self.constants, self.attributes, self.options

    def label(self) -> str:
        blocks = {name: value for name, value in self.constants if name.startswith("BLOCK_")}
        tile = "x".join(f"{name[6:].lower()}{value}" for name, value in blocks.items())
        options = dict(self.options)
        return f"{tile} w{options['num_warps']} s{options.get('num_stages', '-')} {self.note}"


@dataclass(kw_only=True, slots=True)
class Measured:
    """What the machine code of one launch says."""

    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)
    error: str = ""


def cases(quick: bool) -> Iterator[Case]:
    base, dropped = Case(), Case(dropout_p=0.1)
    if quick:
        yield from (base, replace(dropped, r=64))
        return
    for plain in (base, dropped):
        yield from (replace(plain, r=r) for r in (8, 16, 32, 64, 128))
        yield from (replace(plain, m=m, r=128) for m in (1024, 512, 64))
        yield replace(plain, dtype=torch.float32, r=32)
        yield replace(plain, m=8191, n=1001, k=999, r=64)
    yield replace(base, m=8191, n=1001, k=999, r=5)
    yield replace(dropped, dtype=torch.float16)
    yield replace(base, adapter=torch.bfloat16, bias=False)
    yield replace(base, transposed=True)


class Recorder:
    """Stands in for a `triton.jit` function: notes the launch instead of making it."""

    def __init__(self, kernel: Any, make: Callable[[Recorder, dict[str, Any], dict[str, Any]], None]) -> None:
        self.names: list[str] = list(kernel.arg_names)
        self.unspecialised = {param.name for param in kernel.params if param.do_not_specialize}
        self.make = make

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            bound = dict(zip(self.names, arguments, strict=False))
            bound.update((name, keywords.pop(name)) for name in self.names if name in keywords)
            self.make(self, bound, keywords)

        return call


def specialise(backend: str, value: Any) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Type of an argument in Triton's signature, and the hints its JIT attaches to it."""
    if isinstance(value, torch.Tensor):
        hints = [("tt.divisibility", 16)]  # torch's allocator aligns to far more
        if backend == "hip" and value.untyped_storage().nbytes() < 2**31:
            hints.append(("tt.pointer_range", 32))
        return "*" + TYPES[value.dtype], tuple(hints)
    if isinstance(value, float):
        return "fp32", ()
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, (("tt.divisibility", 16),) if value % 16 == 0 else ()


def record(target: str, case: Case) -> list[Launch]:
    """Every launch that one forward and backward of `case` makes on `target`."""
    from fastpeft_kernels import configs, launch, lora

    launches: list[Launch] = []
    stage = ["fwd"]

    def recorder(module: str, kernel: str) -> Callable[[Recorder, dict[str, Any], dict[str, Any]], None]:
        def make(self: Recorder, bound: dict[str, Any], options: dict[str, Any]) -> None:
            signature, constants, attributes = [], [], []
            for index, (name, value) in enumerate(bound.items()):
                constexpr = name.isupper() and name not in {"M", "N", "K", "R", "C"}
                free = name in self.unspecialised
                if constexpr or value is None or (type(value) is int and value == 1 and not free):
                    signature.append((name, "constexpr"))
                    constants.append((name, value))
                    continue
                kind, hints = specialise(TARGETS[target].backend, value)
                signature.append((name, kind))
                if hints and not free:
                    attributes.append((index, hints))
            note = f"{stage[0]} {TYPES[case.dtype]} r{case.r}"
            note += " drop" if bound.get("HAS_DROPOUT") else ""
            note += " bias" if bound.get("HAS_BIAS") or bound.get("HAS_SUM") else ""
            launches.append(
                Launch(
                    target=target,
                    module=module,
                    kernel=kernel,
                    note=note,
                    tensor_cores=module != "reduce" and case.dtype != torch.float32,
                    signature=tuple(signature),
                    constants=tuple(constants),
                    attributes=tuple(attributes),
                    options=tuple(options.items()),
                )
            )

        return make

    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = tensor(case.m, case.k, dtype=case.dtype)
    weight = (
        tensor(case.k, case.n, dtype=case.dtype).t()
        if case.transposed
        else tensor(case.n, case.k, dtype=case.dtype)
    )
    bias = tensor(case.n, dtype=case.dtype) if case.bias else None
    lora_A, lora_B = (tensor(*shape, dtype=case.adapter) for shape in ((case.r, case.k), (case.n, case.r)))
    seed = tensor(1, dtype=torch.int64) if case.dropout_p > 0.0 else None
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(configs, "architecture", return_value=target))
        stack.enter_context(mock.patch.object(launch, "unit_count", return_value=UNITS))
        for module, kernel in KERNELS.items():
            home = importlib.import_module(f"fastpeft_kernels.{module}")
            stand_in = Recorder(getattr(home, kernel), recorder(module, kernel))
            stack.enter_context(mock.patch.object(home, kernel, stand_in))
        y, s = lora.lora_forward(x, weight, bias, lora_A, lora_B, 2.0, case.dropout_p, seed)
        stage[0] = "bwd"
        lora.lora_backward(
            y,
            x,
            weight,
            lora_A,
            lora_B,
            s,
            2.0,
            case.dropout_p,
            seed,
            need_x=True,
            need_A=True,
            need_B=True,
            need_bias=case.bias,
        )
    return launches


def unreached(target: str, launches: list[Launch]) -> list[str]:
    """Rows of the target's table that no launch used."""
    from fastpeft_kernels import configs

    seen = set()
    for item in launches:
        constants, options = dict(item.constants), dict(item.options)
        dropout = "_dropout" if item.module == "rank_r_gemm" and constants["HAS_DROPOUT"] else ""
        blocks = tuple(constants.get(f"BLOCK_{axis}", 0) for axis in "MNK")
        seen.add((item.module + dropout, *blocks, options["num_warps"], options.get("num_stages")))
    missing = []
    tables = (
        *configs.TABLES[target].items(),
        *configs.TABLES["fp32"].items(),
        *configs.TABLES["unaligned"].items(),
    )
    for kernel, rows in tables:
        for row in rows:
            key = (kernel, row.block_m, row.block_n, row.block_k, row.num_warps, row.num_stages)
            if key not in seen:
                missing.append(f"{target}: no case reaches {kernel} {row}")
    return missing


def compile_launch(item: Launch) -> Measured:
    """Compile one launch (in a worker process, where kernels are not the interpreter's) and read its code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[item.target]
    kernel = getattr(importlib.import_module(f"fastpeft_kernels.{item.module}"), item.kernel)
    attributes = {(index,): [list(hint) for hint in hints] for index, hints in item.attributes}
    source = ASTSource(kernel, dict(item.signature), dict(item.constants), attributes)
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=dict(item.options),
        )
    except Exception as error:  # any compiler failure is a finding about this launch, reported in the table
        return Measured(error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}")
    measured = Measured(
        shared=compiled.metadata.shared, tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0
    )
    read = read_amdgcn if target.backend == "hip" else read_cubin
    read(compiled, measured)
    return measured


def read_cubin(compiled: Any, measured: Measured) -> None:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured.registers = int(re.search(r"\bREG:(\d+)", text)[1])  # type: ignore[index]
    measured.stack = int(re.search(r"\bSTACK:(\d+)", text)[1])  # type: ignore[index]
    for name, width in SASS_LOCAL.findall(text):
        size = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(width, 4)
        if name == "STL":
            measured.spill_stores += size
        else:
            measured.spill_loads += size
    measured.tensor_core = dict(Counter(TENSOR_CORE.findall(text)))


def read_amdgcn(compiled: Any, measured: Measured) -> None:
    text = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    # vgpr_count counts accumulation registers too; spills are counted in registers, 4 bytes a lane each.
    measured.registers = metadata("vgpr_count")
    measured.spill_stores = 4 * (metadata("vgpr_spill_count") + metadata("sgpr_spill_count"))
    measured.stack = metadata("private_segment_fixed_size")
    measured.tensor_core = dict(Counter(TENSOR_CORE.findall(text)))


def faults(item: Launch, measured: Measured) -> list[str]:
    """Why this launch may not ship; empty when it may."""
    if measured.error:
        return [measured.error]
    found = []
    limit = TARGETS[item.target].shared_limit
    if measured.spill_stores or measured.spill_loads or measured.stack:
        found.append(f"spills {measured.spill_stores}+{measured.spill_loads} bytes, stack {measured.stack}")
    if measured.shared > limit:
        found.append(f"shared memory {measured.shared} of {limit} bytes")
    if measured.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"tensor memory {measured.tensor_memory} of {TENSOR_MEMORY_COLUMNS} columns")
    if item.tensor_cores and not measured.tensor_core:
        found.append("no tensor-core instruction")
    return found


def compile_all(launches: list[Launch], workers: int) -> Iterator[tuple[Launch, Measured]]:
    """Compile in fresh processes, the compiler being single-threaded; in the order in which they finish."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(compile_launch, item): item for item in launches}
        for done in as_completed(pending):
            yield pending[done], done.result()


def row_text(item: Launch, measured: Measured) -> str:
    limit = TARGETS[item.target].shared_limit
    cores = " ".join(f"{name}:{count}" for name, count in sorted(measured.tensor_core.items())) or "-"
    spills = f"{measured.spill_stores}/{measured.spill_loads}"
    shared = f"{measured.shared}/{limit}"
    name = f"{item.target:7}{item.module:16}{item.label():44}"
    return f"{name}{measured.registers:5}{spills:>10}{shared:>15}  {cores}"


def summary(results: list[tuple[Launch, Measured]]) -> Iterator[str]:
    """The largest registers and shared memory of each kernel on each target."""
    for target in TARGETS:
        for module in KERNELS:
            found = [measured for item, measured in results if (item.target, item.module) == (target, module)]
            if found:
                spills = sum(measured.spill_stores + measured.spill_loads for measured in found)
                yield (
                    f"{target:7}{module:16}{len(found):4} compiled, at most "
                    f"{max(m.registers for m in found):3} registers, {max(m.shared for m in found):6} of "
                    f"{TARGETS[target].shared_limit} bytes shared, {spills} bytes spilled"
                )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench codegen", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable; default all")
    parser.add_argument("--kernel", action="append", choices=list(KERNELS), help="repeatable; default all")
    parser.add_argument("--quick", action="store_true", help="a few bf16 cases only")
    parser.add_argument("--json", type=Path, help="also write every row here")
    parser.add_argument("--workers", type=int, default=2, help="compiler processes (default 2)")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        # Kernels decorated for the interpreter cannot be compiled, and they are decorated on import.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        words = [sys.executable, "-m", "bench.codegen", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(words, env=environment, check=False).returncode

    launches: dict[tuple[object, ...], Launch] = {}
    problems: list[str] = []
    for target in options.target or list(TARGETS):
        found = [item for case in cases(options.quick) for item in record(target, case)]
        wanted = [item for item in found if item.module in (options.kernel or KERNELS)]
        launches.update((item.identity(), item) for item in reversed(wanted))
        if not options.quick:
            problems += unreached(target, found)
    ordered = sorted(launches.values(), key=lambda item: (list(TARGETS).index(item.target), item.module))
    print(
        f"{'target':7}{'kernel':16}{'configuration':44}{'regs':>5}{'spills':>10}{'shared':>15}  tensor cores"
    )
    results: list[tuple[Launch, Measured]] = []
    for count, (item, measured) in enumerate(compile_all(ordered, options.workers), start=1):
        results.append((item, measured))
        wrong = faults(item, measured)
        problems += [f"{item.target} {item.module} {item.label()}: {fault}" for fault in wrong]
        print(f"{row_text(item, measured)}{'  FAULT' if wrong else ''}", flush=True)
        if sys.stderr.isatty():
            print(f"\r{count}/{len(ordered)}", end="\r", file=sys.stderr)
    print(*summary(results), *(f"FAULT {problem}" for problem in problems), sep="\n")
    print(f"{len(results)} compiled, {len(problems)} faults")
    if options.json:
        rows = [{**asdict(item), **asdict(measured), "label": item.label()} for item, measured in results]
        options.json.write_text(json.dumps(rows, indent=1, default=str))
    return 1 if problems or not results else 0


if __name__ == "__main__":
    sys.exit(main())
