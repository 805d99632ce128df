"""Compile launches and read their machine code: registers, spills, memory, instruction mix."""

from __future__ import annotations

import bisect
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .disassembly import disassemble
from .loops import Step, natural_loops
from .specialised import Launch
from .targets import TARGETS, TENSOR_MEMORY_COLUMNS

# Address, predicate, instruction, operands.
SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:\d+|T))\s+)?([A-Z][\w.]*)([^;]*);")
SASS_LOCAL = re.compile(r"\b(STL|LDL)(?:\.[A-Z]+)*?(?:\.(64|128|U8|S8|U16|S16))?$")
TENSOR_CORE = re.compile(r"(HMMA|HGMMA|UTC[A-Z]*MMA|v_mfma|v_s?wmma)")
SASS_LOAD = re.compile(r"(LD|LDG|LDGSTS|UTMALDG)(\.|$)")  # and not LDGDEPBAR, which waits for copies
SASS_WIDE = re.compile(r"^UTMALDG|\.(128|256)(\.|$)")
SASS_SHARED = re.compile(r"(LDS|LDSM)(\.|$)")
AMD_WIDE = re.compile(r"(?:buffer|global)_load_(?:lds_)?(?:dwordx4|b128)")
AMD_LOAD = re.compile(r"(?:buffer|global|flat)_load_")


@dataclass(kw_only=True, slots=True)
class Mix:
    """Instructions by kind.

    wide_loads are loads from global memory of at least 16 bytes a lane (or a whole tile by TMA), with or
    without a stop in registers; other_loads are narrower ones.
    """

    total: int = 0
    tensor_core: int = 0
    wide_loads: int = 0
    other_loads: int = 0
    shared_loads: int = 0

    def __str__(self) -> str:
        return (
            f"{self.total}:{self.tensor_core}tc {self.wide_loads}+{self.other_loads}ld {self.shared_loads}sh"
        )


@dataclass(kw_only=True, slots=True)
class Measured:
    """What the machine code of one launch says; `loop` is of the main loop, all zeros where there is none."""

    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)
    whole: Mix = field(default_factory=Mix)
    loop: Mix = field(default_factory=Mix)
    error: str = ""


def compile_launches(items: Sequence[Launch]) -> list[Measured]:
    """Compile launches of one target (in a worker process, where kernels are not the interpreter's) and read
    their code."""
    results = [compile_launch(item) for item in items]
    cubins = [result.cubin for result in results if result.cubin]
    if cubins:
        arch = TARGETS[items[0].target].arch
        assert isinstance(arch, int)
        texts = iter(disassemble(cubins, arch))
        for result in results:
            if result.cubin:
                read_sass(next(texts), result.measured)
    return [result.measured for result in results]


@dataclass(kw_only=True, slots=True)
class Compiled:
    """A launch's figures as far as the compiler tells them; `cubin` has the rest, where there is one."""

    measured: Measured
    cubin: bytes = b""


def compile_launch(item: Launch) -> Compiled:
    """Compile one launch; of AMD's code, which is text already, read it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[item.target]
    kernel = getattr(importlib.import_module(f"fastpeft_kernels.{item.kernel.module}"), item.kernel.function)
    attributes = {path: [list(hint) for hint in hints] for path, hints in item.attributes}
    source = ASTSource(kernel, dict(item.signature), dict(item.constants), attributes)
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=dict(item.options),
        )
    except Exception as error:  # any compiler failure is a finding about this launch, reported in the table
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        return Compiled(measured=Measured(error=reason))
    measured = Measured(
        shared=compiled.metadata.shared, tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0
    )
    if target.backend == "hip":
        read_amdgcn(compiled.asm["amdgcn"], measured)
        return Compiled(measured=measured)
    return Compiled(measured=measured, cubin=compiled.asm["cubin"])


def read_sass(text: str, measured: Measured) -> None:
    """Fill `measured` from a kernel's resource usage and SASS."""
    measured.registers = int(re.search(r"\bREG:(\d+)", text)[1])  # type: ignore[index]
    measured.stack = int(re.search(r"\bSTACK:(\d+)", text)[1])  # type: ignore[index]
    # What is predicated on !PT never runs: fillers for a fault of the hardware.
    code = [line for line in SASS_LINE.findall(text) if line[1] not in ("!PT", "!UPT")]
    addresses = [int(line[0], 16) for line in code]
    names = [name for _, _, name, _ in code]
    for name in names:
        local = SASS_LOCAL.match(name)
        if local:
            size = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(local[2], 4)
            if local[1] == "STL":
                measured.spill_stores += size
            else:
                measured.spill_loads += size
    steps = []
    for _, predicate, name, rest in code:
        goal = re.search(r"\b0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        # "BRA.U UP0, 0x..." carries its condition among the operands.
        conditional = bool(predicate) or bool(goal and "," in rest)
        leaves = name.startswith(("BRA", "EXIT", "BRX", "RET")) and not conditional
        # A branch may lead to one of those fillers: then on to what comes after it.
        target = min(bisect.bisect_left(addresses, int(goal[1], 16)), len(code) - 1) if goal else None
        steps.append(Step(name, target, not leaves))
    fill_mix(measured, steps, sass_kind)


def sass_kind(name: str) -> str:
    """Field of Mix that counts a SASS instruction."""
    if TENSOR_CORE.match(name):
        return "tensor_core"
    if SASS_LOAD.match(name):
        return "wide_loads" if SASS_WIDE.search(name) else "other_loads"
    return "shared_loads" if SASS_SHARED.match(name) else ""


def read_amdgcn(text: str, measured: Measured) -> None:
    """Fill `measured` from AMD assembly."""

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    # vgpr_count counts accumulation registers too; spills are counted in registers, 4 bytes a lane each.
    # Scalar registers are parked in lanes of a vector register (v_writelane): no memory, unless a stack says
    # so.
    measured.registers = metadata("vgpr_count")
    measured.spill_stores = 4 * metadata("vgpr_spill_count")
    measured.stack = metadata("private_segment_fixed_size")
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.split(".rodata")[0].splitlines():
        label = re.match(r"(\.?\w+):", line)
        instruction = re.match(r"\s+([a-z]\w+)\s*([^;]*)", line)
        if label:
            labels[label[1]] = len(code)
        elif instruction:
            code.append((instruction[1], instruction[2].strip()))
    steps = [
        Step(
            name,
            labels.get(goal) if name.startswith(("s_cbranch", "s_branch")) else None,
            not name.startswith(("s_branch", "s_endpgm", "s_setpc")),
        )
        for name, goal in code
    ]
    fill_mix(measured, steps, amd_kind)


def amd_kind(name: str) -> str:
    """Field of Mix that counts an AMD instruction."""
    if TENSOR_CORE.match(name):
        return "tensor_core"
    if AMD_WIDE.match(name):
        return "wide_loads"
    if AMD_LOAD.match(name):
        return "other_loads"
    return "shared_loads" if name.startswith(("ds_read", "ds_load")) else ""


def fill_mix(measured: Measured, steps: list[Step], kind: Callable[[str], str]) -> None:
    """Count kinds over the whole kernel and in the main loop.

    That is the first of the innermost loops with tensor-core instructions, where there are none with 16-byte
    loads. Loops inside it that only wait count as part of it.
    """
    kinds = [kind(step.name) for step in steps]

    def count(positions: Iterable[int]) -> Mix:
        found = Counter(kinds[position] for position in positions)
        return Mix(total=found.total(), **{name: number for name, number in found.items() if name})

    measured.tensor_core = dict(
        Counter(match[1] for step in steps if (match := TENSOR_CORE.match(step.name)))
    )
    measured.whole = count(range(len(steps)))
    work = "tensor_core" if measured.tensor_core else "wide_loads"
    loops = [body for body in natural_loops(steps) if any(kinds[position] == work for position in body)]
    inner = [body for body in loops if not any(other < body for other in loops)]
    if inner:
        measured.loop = count(min(inner, key=min))


def faults(item: Launch, measured: Measured) -> list[str]:
    """Why this launch may not ship; empty when it may."""
    if measured.error:
        return [measured.error]
    found = []
    target = TARGETS[item.target]
    if measured.spill_stores or measured.spill_loads or measured.stack:
        found.append(f"spills {measured.spill_stores}+{measured.spill_loads} bytes, stack {measured.stack}")
    if measured.shared > target.shared_limit:
        found.append(f"shared memory {measured.shared} of {target.shared_limit} bytes")
    if measured.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"tensor memory {measured.tensor_memory} of {TENSOR_MEMORY_COLUMNS} columns")
    if not item.is_16_bit:
        return found
    if item.kernel.tensor_cores and not measured.tensor_core:
        found.append("no tensor-core instruction")
    elif item.kernel.gemm and not any(name.startswith(target.main_core) for name in measured.tensor_core):
        found.append(f"no {target.main_core}*MMA instruction, only {' '.join(measured.tensor_core)}")
    if item.kernel.streams and item.aligned:
        # Where warps are specialised, the loop that multiplies loads nothing: another warp's does.
        loads = measured.loop.wide_loads + measured.loop.other_loads
        mix = measured.loop if loads else measured.whole
        # Narrow loads have at most 8 bytes: twice as many of them still carry half of the bytes at most.
        if not mix.wide_loads or mix.other_loads > 2 * mix.wide_loads:
            found.append(f"main loop: {mix.wide_loads} loads of 16 bytes, {mix.other_loads} narrower ones")
    if item.kernel.reads_tile and item.aligned:
        outside, needed = measured.whole.wide_loads - measured.loop.wide_loads, item.stream_loads()
        if outside < needed:
            found.append(f"outside the main loop {outside} loads of 16 bytes, its tile takes {needed}")
    return found
