"""What a figure depends on besides the code: processor, threads, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.clock import Stopwatch

PACKAGES = ("torch", "transformers", "peft")
PEERS = ("torchtune", "torchao", "loralib", "liger-kernel", "unsloth", "axolotl")  # named where installed
ABSENT = "not installed"
# Newest first: the first one present is what bf16 GEMMs run on.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
GEMM_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def facts(device: torch.device | None = None) -> dict[str, str]:
    """The machine and the software, as printed above every table. Names no path and no host."""
    device = device or torch.device("cpu")
    lines = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    lines |= {
        "cpu": _cpu_model(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical CPUs",
        "instructions": _instructions(),
        "GEMM": ", ".join(
            f"{name} {_gemm_rate(dtype, device):.0f} GFLOP/s" for name, dtype in GEMM_DTYPES.items()
        ),
        "load at start": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }
    lines |= {package: _version(package) for package in PACKAGES}
    lines |= {package: _version(package) for package in PEERS if _version(package) != ABSENT}
    lines["fastpeft commit"] = _commit()
    return lines


def name(facts: Mapping[str, str]) -> str:
    """A folder's name for the machine of a document: what decides its figures, and no host's name.

    What was counted and not timed has no machine; it goes to `counted`.
    """
    if "gpu" in facts:
        return _slug(facts["gpu"])
    if "cpu" not in facts:
        return "counted"
    threads = facts.get("threads", "").partition(" ")[0]
    instructions = facts.get("instructions", "").partition(" ")[0]
    return _slug(f"{facts['cpu']} {instructions} {threads} threads")


def _slug(text: str) -> str:
    text = re.sub(r"\((R|TM)\)|processor|cpu|@.*?ghz", " ", text, flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(key)), "")


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instructions() -> str:
    flags = set(_cpuinfo("flags").split())
    found = next((name for name in INSTRUCTIONS if name in flags), "unknown")
    return f"{found} (torch: {torch.backends.cpu.get_cpu_capability()})"


def _gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Median rate of a linear: 512 x 1024 x 1024, 8192 x 4096 x 4096 on a GPU.

    Printed because it decides what any ratio means: where bf16 GEMMs are slow, everything else hides behind
    them.
    """
    m, n, k = (8192, 4096, 4096) if device.type == "cuda" else (512, 1024, 1024)
    x, weight = (torch.randn(rows, k, dtype=dtype, device=device) for rows in (m, n))
    seconds = []
    with torch.no_grad():
        for _ in range(7):
            watch = Stopwatch(device)
            torch.nn.functional.linear(x, weight)
            watch.mark("gemm")
            seconds.append(watch.phases("total")["gemm"])
    return 2e-9 * m * n * k / statistics.median(seconds[2:])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _commit() -> str:
    """Short commit, marked when the working tree differs from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + (" with local changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
