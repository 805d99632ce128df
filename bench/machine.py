"""What a figure depends on besides the code: processor, threads, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from pathlib import Path
from time import perf_counter

import torch

PACKAGES = ("torch", "transformers", "peft")
# Newest first: the first one present is what bf16 GEMMs run on.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
GEMM_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def facts() -> dict[str, str]:
    """The machine and the software, as printed above every table. Names no path and no host."""
    lines = {
        "cpu": _cpu_model(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical CPUs",
        "instructions": _instructions(),
        "GEMM": ", ".join(f"{name} {_gemm_rate(dtype):.0f} GFLOP/s" for name, dtype in GEMM_DTYPES.items()),
        "load at start": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }
    lines.update({package: _version(package) for package in PACKAGES})
    lines["fastpeft commit"] = _commit()
    return lines


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


def _gemm_rate(dtype: torch.dtype) -> float:
    """Median rate of a 512 x 1024 x 1024 linear.

    Printed because it decides what any ratio means: where bf16 GEMMs are slow, everything else hides behind
    them.
    """
    x, weight = torch.randn(512, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(7):
            start = perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds.append(perf_counter() - start)
    return 2e-9 * x.numel() * weight.shape[0] / statistics.median(seconds[2:])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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
