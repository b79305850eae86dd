"""Where a measurement was made: versions, machine, commit. Imports no torch; asks it where it is installed."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "camshaft", "torch", "transformers", "tokenizers", "safetensors", "numpy", "onnxruntime", "onnx", "onnxscript", "triton",
)  # fmt: skip


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Package -> installed version, None where it is not installed; Camshaft's own also where it runs from its source."""
    from ... import __version__

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = __version__ if name == "camshaft" else None
    return found


def cpu_model() -> str:
    """The processor's name, or the architecture where /proc/cpuinfo does not tell."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model", "cpu model")) and ":" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """CPU, cores, threads of torch, memory, and the GPUs by name."""
    import torch

    from ..memory import host_memory

    free, total = host_memory() if Path("/proc/meminfo").is_file() else (None, None)
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": total,
        "free_memory_bytes": free,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "platform": platform.platform(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def git_commit() -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that this package runs from. Without one, $CAMSHAFT_COMMIT with dirty None; else None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        given = os.environ.get("CAMSHAFT_COMMIT")
        return {"commit": given, "dirty": None} if given else None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def seconds_since_start() -> float | None:
    """Seconds since this process was started, imports included; None where the system does not tell (no /proc)."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (stat.is_file() and uptime.is_file()):
        return None
    started = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(uptime.read_text().split()[0]) - started
